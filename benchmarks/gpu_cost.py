"""What a training step of ResNet-18 takes of a GPU, counted from the model, and what a round should take: computed.

Claim: nothing of a GPU is measured here. Every operation of one step (batch 16, CIFAR-10's shapes, bf16 autocast,
float32 weights) is recorded: its launches on a GPU, the bytes that it reads and writes, its floating-point operations.
Of the times that launches, bytes and operations take at the rates of ``H100``, the longest counts. What replies take
stands in benchmarks/results/wire.json, what else a round takes on the host is measured by gpu_host.py, both on one
core; who waits for whom in a round is simulated (gpu_schedule.py). Counts and times are kept in
benchmarks/results/gpu_cost.json.

    python benchmarks/gpu_cost.py       (half a minute)
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import topk
import torch
from gpu_host import CLIENTS, host_times
from gpu_schedule import Stage, seconds_of
from gpu_steps import Stepper, Work
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fedsieve.engine.cohorts import ENCODERS, FULL
from fedsieve.engine.loop import READERS, SEVERAL
from fedsieve.recipes import load_recipe
from fedsieve.sparse.policy import select_weights

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu_cost.json"
WORK = replace(Work("cpu"), clients=1, examples=16)
TOGETHER = CLIENTS
CORES = 10


@dataclass(frozen=True)
class Gpu:
    """The rates that times are computed with."""

    flops: float = 989e12
    """bf16 by tensor cores, dense, a second: the H100's data sheet."""
    share: float = 0.5
    """Of these a convolution that fills the chip is assumed to reach. A product of two matrices of 8192 reaches .8 of
    them on an H200, of the same cores; implicit convolutions of 64 to 512 channels, less."""
    bandwidth: float = 3.35e12
    """Bytes a second: the data sheet."""
    bandwidth_share: float = 0.7
    launch: float = 2.5e-6
    """Seconds from one kernel of a graph to the next that waits for it."""
    processors: int = 132
    tile: int = 128
    """The side of the tile of a product that one processor computes at a time."""
    overlap: float = 0.25e-6
    """Seconds a kernel costs the GPU at least where others run beside it."""
    host_bandwidth: float = 20e9
    """Bytes a second from the host's memory or to it, a third of PCIe 5 x16's data sheet: the host copies, too."""


H100 = Gpu()


@dataclass
class Kernels:
    """What a class of operations takes a step."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    alone: float = 0.0
    """Seconds where one operation waits for the other."""
    together: float = 0.0
    """Seconds of the GPU where those of other clients run beside it."""

    def add(self, launches: int, size: int, flops: int = 0, tiles: float = float("inf"), gpu: Gpu = H100) -> None:
        """Count an operation, of whose output ``tiles`` can be computed at once."""
        moved, full = size / (gpu.bandwidth * gpu.bandwidth_share), flops / (gpu.flops * gpu.share)
        self.launches, self.bytes, self.flops = self.launches + launches, self.bytes + size, self.flops + flops
        self.alone += max(launches * gpu.launch, moved, full / min(1, tiles / gpu.processors))
        self.together += max(launches * gpu.overlap, moved, full)


CLASSES: dict[str, tuple[str, ...]] = {
    "convolutions, forward": ("convolution",),
    "convolutions, backward": ("convolution_backward",),
    "norms": ("native_batch_norm", "native_batch_norm_backward"),
    "activations and sums": ("relu", "threshold_backward", "add", "mean", "expand", "div", "mul"),
    "casts and layouts": ("_to_copy", "clone", "copy_"),
    "update": ("_foreach_add_",),
}
OTHER = "batch, last layer, loss"


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what every operation would take of a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.classes: dict[str, Kernels] = defaultdict(Kernels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as without the mode."""
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (_tensors(tree) for tree in ((args, kwargs or {}), result))
        name = func._overloadpacket._qualified_op_name.split("::")[-1]
        if not _is_view(func, inputs, outputs):
            label = next((label for label, names in CLASSES.items() if name in names), OTHER)
            parts = [*_parts(name, func, inputs, outputs, args, kwargs or {}, result)]
            for size, flops, tiles in parts:
                self.classes[label].add(1, size, flops, tiles)
        return result


def _parts(
    name: str, func: Any, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any, result: Any
) -> Iterator[tuple[int, int, float]]:
    """Yield bytes, operations and tiles of each kernel of an operation."""
    formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
    flops = formula(*args, **kwargs, out_val=result) if formula else 0
    if name == "convolution_backward":
        gradient, x, w = inputs[:3]
        for output, other in ((outputs[-1], x), (outputs[0] if len(outputs) > 1 else None, w)):
            if output is not None:
                size = sum(t.nbytes for t in (gradient, other, output))
                yield size, flops // len(outputs), _tiles(output, is_weight=output.shape == w.shape)
        return
    unique = {(t.data_ptr(), t.numel()): t.nbytes for t in (*inputs, *outputs)}
    size = sum(unique.values()) + (sum(t.nbytes for t in inputs[: len(inputs) // 2]) if name == "_foreach_add_" else 0)
    yield size, flops, _tiles(outputs[0], is_weight=False) if name == "convolution" else float("inf")


def _tiles(output: Tensor, *, is_weight: bool) -> float:
    """Return how many tiles the output of a convolution's product has: of pixels by channels, or of a weight."""
    rows, columns = output.shape[0], output[0].numel()
    if not is_weight:
        rows, columns = output.shape[1], output.numel() // output.shape[1]
    return -(-rows // H100.tile) * -(-columns // H100.tile)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Say whether an operation only looks at its input in another way, or makes room."""
    if "empty" in str(func) or not outputs:
        return not func._schema.is_mutable
    storages = {t.untyped_storage().data_ptr() for t in inputs}
    return not func._schema.is_mutable and all(t.untyped_storage().data_ptr() in storages for t in outputs)


def dense_step() -> dict[str, Kernels]:
    """Return what each class of operations takes in a dense step."""
    stepper = Stepper(WORK, "bf16")
    with Recorder() as recorder:
        stepper.step()
    order = [*CLASSES, OTHER]
    return {label: recorder.classes[label] for label in order}


DIGITS = {torch.float32: 3, torch.bfloat16: 2}
"""The digits that the exact selection counts of a key (``sparse.selection_launch``): a launch and a read for each, and
three launches, a read, and a write in bfloat16."""


def selections() -> Kernels:
    """Return what SWAT adds to a step: exact cuts of inner weights, all at once, and of inputs; their densities."""
    layers, kernels = topk.layers_of(WORK.batch), Kernels()
    keys = [(sum(weight.numel() for weight, _ in layers), torch.float32)]
    for numel, dtype in keys + [(x.numel(), torch.bfloat16) for _, x in layers]:
        for size in (*[dtype.itemsize] * DIGITS[dtype], dtype.itemsize + torch.bfloat16.itemsize, 0, 0):
            kernels.add(1, numel * size)
    for weight, x in layers:  # non-zeros are counted, and added up for the layer's three products
        for numel in (weight.numel(), x.numel()):
            kernels.add(1, numel * torch.bfloat16.itemsize)
            kernels.add(1, 0)
        for _ in range(3):
            kernels.add(1, 0)
    return kernels


def masks() -> Kernels:
    """Return what a frozen mask adds to a step: weights times their masks, all in one go."""
    model, kernels = WORK.network(), Kernels()
    weights = [model.get_parameter(name) for name in select_weights("flash", model)]
    kernels.add(1, sum(3 * w.nbytes for w in weights))  # masks are float32
    return kernels


CELLS = {
    "ZeroFL .95": ("zerofl.cifar10_iid", ("method.sparsity=.95", "method.r_mask=0"), "ZeroFL 95 %, r_mask 0", 60, 150),
    "FLASH .05": ("flash.cifar10_iid", ("method.density=.05",), "FLASH d .05", 45, 120),
}
"""A cell's recipe, what is changed in it, its messages' row of wire.json, the aim and the least in seconds."""
CIFAR10 = 50_000
TESTS = 10_000


def computed() -> dict[str, Any]:
    """Return all counts and times."""
    dense = dense_step()
    methods = {"dense": Kernels(), "ZeroFL .95": selections(), "FLASH .05": masks()}
    steps = {name: step_times(dense, extra) for name, extra in methods.items()}
    forward = sum(dense[label].together for label in ("convolutions, forward", "norms", "activations and sums"))
    cells = {}
    for name, (recipe, settings, case, aim, least) in CELLS.items():
        run = load_recipe(recipe, settings)
        examples = int(CIFAR10 // run.task.clients * (1 - run.task.validation))
        each = -(-examples // run.batch) * run.epochs
        warm_up = sum(run.method.warm_ups) * getattr(run.method, "E_d", 0) * -(-examples // run.batch)
        count = run.rounds * run.per_round * each + warm_up
        tests = run.rounds // run.evaluate_every * TESTS / WORK.batch * forward
        seconds = {way: count * steps[name][way] for way in ("alone", "together")}
        message = message_times(case)
        encode, decode = (run.rounds * run.per_round * each_message for each_message in message)
        host = host_times(run)
        times = {**seconds, "tests": tests, "encode": encode, "decode": decode}
        times["host_alone"] = run.rounds * round_on_host(host, 0)[0]
        first_stage = warm_up * steps[name]["together"]
        for way, (at_once, processes) in WAYS.items():
            collected = seconds_of(stages(each, steps[name], host, message, processes), CLIENTS, at_once, WORKERS)
            round_ = collected + round_on_host(host, collected)[1]
            times[way] = first_stage + tests + run.rounds * round_
        cells[name] = {"steps": count, **times, "host": host, "aim": aim, "least": least}
    kernels = {name: asdict(own) for name, own in dense.items()}
    extras = {name: asdict(own) for name, own in methods.items() if own.launches}
    return {"gpu": asdict(H100), "kernels": kernels, "extras": extras, "steps": steps, "cells": cells}


WAYS = {"ten": (TOGETHER, 0), "five": (FULL, 0), "processes": (FULL, CORES)}
"""How many clients train at once, and how many processes encode and decode replies; 0: threads, as it is."""
WORKERS = ("train", "copy", "choose")
"""What a client goes through with a worker of its own."""


def stages(
    steps: int, step: dict[str, float], host: dict[str, float], message: tuple[float, float], processes: int
) -> list[Stage]:
    """Return what a client goes through in a round, up to the sum of the answers."""
    moved = _moved(host) if host["choose_support"] else 0.0
    encoders, readers = (processes, processes) if processes else (ENCODERS, READERS)

    def on_gpu(n: int) -> float:
        return n / max(step["alone"], n * step["together"])

    def on_host(what: str, n: int) -> float:
        return n if processes or n == 1 else host[what]

    return [
        Stage("train", steps, on_gpu),
        Stage("copy", moved, lambda n: 1.0),
        Stage("choose", host["choose"] - host["choose_support"], float),
        Stage("encode", message[0], partial(on_host, "encode_speed"), encoders),
        Stage("decode", message[1], partial(on_host, "decode_speed"), readers),
        Stage("mean", _share(host) * host["mean"] / CLIENTS, lambda n: 1.0, 1),
    ]


def _share(host: dict[str, float]) -> float:
    """Return the part of what is computed tensor by tensor that the threads must wait for."""
    return max(host["largest"], 1 / SEVERAL)


def _moved(host: dict[str, float]) -> float:
    """Return the seconds in which the selected layers go to a GPU, and their masks come back."""
    return host["selected"] * (4 + 1) / H100.host_bandwidth


def round_on_host(host: dict[str, float], collected: float) -> tuple[float, float]:
    """Return the seconds of a round beside training and replies in turn by one thread; and those before and after.

    Before and after the answers are ``collected``: tensors beside one another, top weights found by the GPU, and what
    of the rest is not done by then.
    """
    share, moved = _share(host), _moved(host)
    sent = share * host["broadcast"] + host["open"]  # long streams are packed by as many threads as there are
    alone = sent + sum(host[name] for name in ("choose", "mean", "deploy", "bound", "checkpoint"))
    deploy = share * (host["deploy"] - host["deploy_support"]) + (moved if host["deploy_support"] else 0)
    late = max(0.0, host["bound"] - collected) + max(0.0, host["checkpoint"] - collected)
    return alone, sent + deploy + late


def message_times(case: str) -> tuple[float, float]:
    """Return the seconds of one core that an answer takes to be encoded, and to be decoded.

    Of further answers against a base: what the first would take longer is done ahead, while the clients train.
    """
    rows = json.loads((HERE / "results" / "wire.json").read_text())["rows"]
    row = next(row for row in rows if (row["case"], row["known"], row["values"]) == (case, "manifest, base", "f32"))
    encode, decode = (row["dense_bytes"] / 1e6 / row[f"{what}_mb_s"] for what in ("encode", "decode"))
    return encode, decode


def step_times(dense: dict[str, Kernels], extra: Kernels) -> dict[str, float]:
    """Return the seconds of a step alone, and its share of ten clients' that run at once."""
    alone, together = (sum(getattr(one, way) for one in (*dense.values(), extra)) for way in ("alone", "together"))
    return {"alone": alone, "together": max(together, alone / TOGETHER)}


def table(what: str) -> str:
    """Return the table of the kernels of a step, of the steps, of the cells, or of threads that are two."""
    results = json.loads(RESULTS.read_text())
    tables = {"kernels": _kernel_table, "steps": _step_table, "cells": _cell_table, "threads": _thread_table}
    return tables[what](results)


def _kernel_table(results: dict[str, Any]) -> str:
    lines = ["| of a dense step | launches | MB | GFLOP | ms alone | ms beside others |", "|---|---|---|---|---|---|"]
    rows = {**results["kernels"], **{f"{name} adds": own for name, own in results["extras"].items()}}
    for name, own in rows.items():
        numbers = f"{own['launches']} | {own['bytes'] / 1e6:.0f} | {own['flops'] / 1e9:.1f}"
        lines.append(f"| {name} | {numbers} | {1e3 * own['alone']:.3f} | {1e3 * own['together']:.3f} |")
    return "\n".join(lines)


def _step_table(results: dict[str, Any]) -> str:
    names = ("ms alone", "ms, one of ten at once", "faster at once", "to dense", "TFLOP/s, ten")
    lines = [f"| step | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    flops, dense = sum(own["flops"] for own in results["kernels"].values()), results["steps"]["dense"]
    for name, own in results["steps"].items():
        faster, ratio = own["alone"] / own["together"], own["together"] / dense["together"]
        times = f"{1e3 * own['alone']:.2f} | {1e3 * own['together']:.2f} | {faster:.1f}x | {ratio:.2f}x"
        lines.append(f"| {name} | {times} | {flops / own['together'] / 1e12:.0f} |")
    return "\n".join(lines)


TIMES = ("alone", "together", "tests", "encode", "decode", "host_alone", *WAYS)


def _cell_table(results: dict[str, Any]) -> str:
    training = ("steps", "s, one client at a time", "s, ten at once", "s of tests")
    messages = ("s of encoding, a core", "s of decoding, a core")
    ways = ("s in all, ten at once", "five at once", "five, and ten processes for replies")
    names = (*training, *messages, "s of the rest in turn", *ways)
    lines = [f"| cell | {' | '.join(names)} | aim, s | at least, s |", "|---" * (len(names) + 3) + "|"]
    for name, own in results["cells"].items():
        times = " | ".join(f"{own[what]:.0f}" for what in TIMES)
        lines.append(f"| {name} | {own['steps']:,} | {times} | {own['aim']} | {own['least']} |")
    return "\n".join(lines)


def _thread_table(results: dict[str, Any]) -> str:
    lines = ["| two threads to one, measured | encode | decode |", "|---|---|---|"]
    for name, own in results["cells"].items():
        encode, decode = (own["host"][f"{what}_speed"] for what in ("encode", "decode"))
        lines.append(f"| {name} | {encode:.2f}x | {decode:.2f}x |")
    return "\n".join(lines)


def main() -> None:
    """Count, compute and print the tables."""
    RESULTS.write_text(json.dumps(computed(), indent=1) + "\n")
    print("\n\n".join(map(table, ("kernels", "steps", "cells", "threads"))))


if __name__ == "__main__":
    main()
