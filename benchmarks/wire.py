"""What messages weigh: the tables of docs/benchmarks/messages.md.

Claim: a whole message takes at most 1.02 times its empirical entropy at densities .3 to .001; ZeroFL at 95 %, 17 times
less than dense without side information and 23 times when the server's model is known; FLASH at density .05, 24 times;
SparseFedPP at 99.9 %, 440 times. n: one client's upload after two short rounds on real CIFAR-10, ResNet-18: weights are
near their first ones, so that churn is that of an early round. Speeds: best of 5, of one thread's processor time.

    python benchmarks/wire.py [--drawn]   (--drawn: no data, no training: weights from a generator, nothing is kept)
    python benchmarks/wire.py --units     (seconds: random masks of single weights, and in units of eight channels)
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.cli.bench.measurement import machine
from fedsieve.cli.bench.wire import (
    DENSITIES,
    Message,
    cpu_seconds,
    float32_bytes,
    keep_largest,
    measure_message,
    messages_of,
    random_messages,
)
from fedsieve.cli.bench.workload import Workload
from fedsieve.client.training import params_of
from fedsieve.engine.messages import Messages
from fedsieve.engine.setup import open_run
from fedsieve.engine.worker import Worker, run_client
from fedsieve.recipes import load_recipe
from fedsieve.types import RoundContext, Sparse, Tree, Update, rng
from fedsieve.wire import Known, Manifest, decode, encode, find_sharing

Codec = tuple[str, Callable[[], Any], Callable[[Any], Any]]
"""A way to pack: its name, packing, and unpacking what that gave."""
RESULTS = Path(__file__).parent / "results" / "wire.json"
UNITS = RESULTS.with_name("wire_units.json")
ROUNDS, CLIENTS = 2, 2
RUNS = {
    "ZeroFL 95 %, r_mask 0": ("zerofl.cifar10_iid", {"sparsity": 0.95, "r_mask": 0.0}),
    "FLASH d .05": ("flash.cifar10_iid", {"density": 0.05}),
    "SparseFedPP 99.9 %": ("sparsefedpp.cifar10_iid", {"sparsity": 0.999}),
}


def flat(tree: Tree) -> dict[str, torch.Tensor | Sparse]:
    """The tensors of a tree by their own names."""
    tensors: dict[str, torch.Tensor | Sparse] = {}
    for name, value in tree.items():
        tensors |= flat(value) if isinstance(value, dict) else {name: value} if not isinstance(value, float) else {}
    return tensors


def uploaded(recipe: str, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """Train for some rounds: what a client sent in the last one, what it was sent, and its own dense model."""
    run = load_recipe(recipe)
    run = replace(run, method=replace(run.method, **changes), epochs=1, rounds=100, per_round=CLIENTS)
    federation = open_run(run, os.environ.get("FEDSIEVE_DATA"))
    worker, messages = Worker(federation, "cpu", "auto"), Messages(federation)
    state = run.method.init(federation.model(), rng(run.seed, "init"))
    for t in range(run.first, run.first + ROUNDS + 1):
        tree = run.method.broadcast(state, RoundContext())
        broadcast = messages.broadcast(t, dict.fromkeys(run.sample(t)[:CLIENTS], 0), {0: tree})
        down, updates = flat(tree), []
        for client, message in broadcast.items():
            reply: Any = broadcast.decode_reply(client, run_client(worker, t, client, message)[0])
            updates.append(Update(reply["tree"], int(reply["n"]), reply["metrics"]))
        state = run.method.aggregate(state, updates, RoundContext())
        print(f"# {recipe}: round {t}, loss {reply['metrics'].get('loss', 0):.3f}", file=sys.stderr)
    return flat(updates[-1].tree), down, params_of(worker.model)


def kept(recipe: str, changes: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What ``uploaded`` returns, kept in runs/wire as a message of its own: training is not repeated."""
    path = Path("runs/wire") / f"{recipe}.fsv3"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(dict(zip(("up", "down", "params"), uploaded(recipe, changes), strict=True))))
    message = decode(path.read_bytes())
    return message["up"], message["down"], message["params"]


def trained() -> Iterator[Message]:
    """Messages of the papers' settings, then the trained weights of ZeroFL's server at every density."""
    for name, (recipe, changes) in RUNS.items():
        up, down, params = kept(recipe, changes)
        manifest = Manifest.of(params)
        base = {n: v for n, v in down.items() if isinstance(v, Sparse) or v.dtype == torch.float32}
        for values in ("f32", "bf16", "int8", "int4"):
            yield Message(name, up, "manifest", Known(manifest), values)
            yield Message(name, up, "manifest, base", Known(manifest, base), values)
        if name.startswith("ZeroFL"):
            yield from messages_of("trained, top weights", params, base, DENSITIES)
            tree = keep_largest(params, 0.05)
            PEERS.extend([*compare_codecs(tree), *rounded(tree), *nncodec(tree)])


def in_units(repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Yield what models on random masks weigh, positions told or not, by how many channels share a pattern."""
    for network, density, unit in product(("resnet18", "digits_net"), (0.1, 0.05), (1, 8)):
        model, mask = Workload(network, sparsity=1 - density, policy="flash", unit=unit).pruned_network()
        params = params_of(model)
        tree = {name: Sparse.of(v, mask[name]) if name in mask else v for name, v in params.items()}
        known, drawn = Known(Manifest.of(params)), Known(Manifest.of(params), masks=mask)
        content = encode(tree, known)
        index = [(np.flatnonzero(own.numpy()), tuple(own.shape)) for own in mask.values()]
        calls: dict[str, Callable[[], Any]] = {
            "encode_ms": partial(encode, tree, known),
            "decode_ms": partial(decode, content, known),
            "look_ms": lambda: [find_sharing(*own) for own in index],  # noqa: B023
        }
        row: dict[str, Any] = {"model": network, "density": density, "unit": unit, "bytes": len(content)}
        row |= {"positions": len(content) - len(encode(tree, drawn)), "dense_bytes": float32_bytes(params)}
        row["nonzeros"] = sum(int(own.sum()) for own in mask.values())
        yield row | {name: 1e3 * min(cpu_seconds(call) for _ in range(repeats)) for name, call in calls.items()}


def rounded(tree: dict[str, Tensor | Sparse]) -> Iterator[dict[str, Any]]:
    """What our rounded values weigh and lose, for the comparison with codecs that round."""
    known, weights = Known(Manifest.of(tree)), {n: v for n, v in tree.items() if len(v.shape) > 1}
    for values in ("bf16", "int8", "int4"):
        row = asdict(measure_message(Message("", tree, context=known, values=values)))
        back = decode(encode(tree, known, values), known)
        lost = sum(float(((dense(back[n]) - dense(v)) ** 2).sum()) for n, v in weights.items())
        error = math.sqrt(lost / sum(float((dense(v) ** 2).sum()) for v in weights.values()))
        common = sum(int((dense(back[n]) * dense(v)).count_nonzero()) for n, v in weights.items())
        row |= {"codec": f"FedSieve, {values}", "error": error}
        row["kept"] = common / sum(int(dense(v).count_nonzero()) for v in weights.values())
        yield {name: row[name] for name in ("codec", "bytes", "encode_mb_s", "decode_mb_s", "error", "kept")}


def dense(value: Any) -> Tensor:
    """A tensor with its zeros."""
    tensor: Tensor = value.dense() if isinstance(value, Sparse) else value
    return tensor


def other_codecs(tree: Mapping[str, Tensor]) -> Iterator[Codec]:
    """Yield other ways to pack dense tensors with zeros: name, packing, and unpacking. Those that are installed."""
    import scipy.sparse
    import zstandard
    from safetensors.torch import load, save

    arrays = {name: v.numpy().reshape(1, -1) for name, v in tree.items()}

    def csr() -> bytes:
        out = io.BytesIO()
        for value in arrays.values():
            scipy.sparse.save_npz(out, scipy.sparse.csr_array(value), compressed=False)
        return out.getvalue()

    def from_csr(_: bytes) -> list[NDArray[Any]]:
        return [scipy.sparse.csr_array(value).toarray() for value in sparse]

    sparse = [scipy.sparse.csr_array(value) for value in arrays.values()]

    def bitmap() -> list[tuple[bytes, bytes]]:
        pack = zstandard.ZstdCompressor(level=3).compress
        return [(pack(np.packbits(v != 0).tobytes()), pack(v[v != 0].tobytes())) for v in arrays.values()]

    def from_bitmap(packed: list[tuple[bytes, bytes]]) -> list[NDArray[Any]]:
        unpack, out = zstandard.ZstdDecompressor().decompress, []
        for (bits, values), value in zip(packed, arrays.values(), strict=True):
            dense = np.zeros(value.size, np.float32)
            mask = np.unpackbits(np.frombuffer(unpack(bits), np.uint8))[: value.size].view(bool)
            dense[mask] = np.frombuffer(unpack(values), np.float32)
            out.append(dense)
        return out

    yield "scipy CSR", csr, from_csr
    yield "bitmap + zstd", bitmap, from_bitmap
    plain = dict(tree)
    packing, unpacking = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    yield "safetensors + zstd", lambda: packing.compress(save(plain)), lambda packed: load(unpacking.decompress(packed))


def compare_codecs(tree: Tree, repeats: int = 3) -> Iterator[dict[str, Any]]:
    """Yield what each codec makes of a sparse tree, dense in memory: bytes, and speeds in MB/s of dense float32."""
    dense = {n: v.dense() if isinstance(v, Sparse) else v for n, v in tree.items() if isinstance(v, Tensor | Sparse)}
    size, known = float32_bytes(dense), Known(Manifest.of(dense))
    own: Codec = ("FedSieve", lambda: encode(dense, known), lambda packed: decode(packed, known))
    for name, pack, unpack in (own, *other_codecs(dense)):
        packed = pack()
        out, back = (min(cpu_seconds(call) for _ in range(repeats)) for call in (pack, lambda: unpack(packed)))  # noqa: B023
        size_packed = sum(map(len, sum(packed, ()))) if isinstance(packed, list) else len(packed)
        yield {"codec": name, "bytes": size_packed, "encode_mb_s": size / 1e6 / out, "decode_mb_s": size / 1e6 / back}


def nncodec(tree: dict[str, Tensor | Sparse]) -> Iterator[dict[str, Any]]:
    """What NNC makes of the same tensors, where NNCODEC_PYTHON names a Python that has it."""
    if not (python := os.environ.get("NNCODEC_PYTHON")):
        return
    arrays = {name: dense(v).numpy() for name, v in tree.items()}
    size = sum(v.nbytes for v in arrays.values()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        np.savez(path := Path(folder) / "tree.npz", **arrays)  # type: ignore[arg-type]
        output = subprocess.check_output([python, Path(__file__).with_name("nncodec_peer.py"), path, "-32", "-24"])
    results = json.loads(output.splitlines()[-1])
    for row in results["rows"]:
        speeds = {"encode_mb_s": size / row["encode_s"], "decode_mb_s": size / row["decode_s"]}
        codec = f"nncodec {results['version']}, qp {row['qp']}"
        yield {"codec": codec, "bytes": row["bytes"], **speeds, "error": row["error"], "kept": row["kept"]}


PEERS: list[dict[str, Any]] = []

if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--units" in sys.argv:
        UNITS.write_text(json.dumps({"machine": machine(), "rows": [*in_units()]}, indent=1) + "\n")
        sys.exit()
    source = random_messages() if "--drawn" in sys.argv else trained()
    rows = []
    packages = {name: version(name) for name in ("numpy", "pcodec", "scipy", "zstandard")}
    for message in source:
        rows.append(asdict(measure_message(message)))
        print(json.dumps(rows[-1]), flush=True)
        if "--drawn" not in sys.argv:
            results = {"machine": machine(), "versions": packages, "rows": rows, "beside": PEERS}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
