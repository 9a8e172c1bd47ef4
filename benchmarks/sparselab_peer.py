"""Training steps of transformers by SparseLab, the other library with sparse kernels, beside ours.

    pip install --no-deps --target peers sparselab==0.2.2
    SPARSELAB=peers python benchmarks/sparselab_peer.py          # measure what is not there, with one and two threads
    SPARSELAB=peers python benchmarks/sparselab_peer.py --again  # measure anew

The cases, masks and losses are those of tokens.py. SparseLab has sparse linear layers; attention, norms, activations,
and AdamW are PyTorch's, as its own examples have them. Both compute the same outputs, to 1e-4, before they are
measured, in turns in one process of each number of threads; medians of samples that nothing disturbed. SparseLab
brings threads of its own, which wait for work by spinning, and so do PyTorch's, which the kernels share: with two
threads a second process measures with GOMP_SPINCOUNT=0, and the lesser time of each library counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import hardware, read_rows, without, write_results
from tokens import CASES, SAMPLES, SECONDS, SPARSITIES, mask_of, trainer_of, workload
from torch import Tensor, nn

from fedsieve.cli.bench.measurement import (
    RepeatedCall,
    machine,
    time_calls,
    warm_up,
)
from fedsieve.client.process import keep_freed_memory, num_threads
from fedsieve.types import Mask

RESULTS = Path(__file__).parent / "results" / "sparselab.json"
WANTED = {"vit, batch 32": 2.5, "gpt, batch 8": 3}
"""The ratios that were asked for, at least."""


def sparselab() -> Any:
    """Return the library, from the folder in which it is."""
    if folder := os.environ.get("SPARSELAB"):
        sys.path.append(folder)
    try:
        return importlib.import_module("sparselab")
    except ImportError:
        sys.exit("SparseLab is not there: pip install --no-deps --target peers sparselab, and SPARSELAB=peers")


def with_sparse_layers(model: nn.Module, mask: Mask) -> nn.Module:
    """Let the masked linear layers of a model be SparseLab's; raise what does not compute the same."""
    library = sparselab()
    for name, kept in mask.items():
        path, _, last = name.rpartition(".")
        layer = model.get_submodule(path)
        with torch.no_grad():
            model.get_parameter(name).mul_(kept)
        if not isinstance(layer, nn.Linear) or last != "weight":
            continue
        sparse = library.SparseLinear(layer.in_features, layer.out_features, layer.bias is not None)
        sparse._csr = library.PaddedCSR.from_dense(layer.weight.detach())
        sparse._values, sparse.bias = nn.Parameter(torch.from_numpy(sparse._csr.values)), layer.bias
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, sparse)
    return model


def peer_step(case: str, sparsity: float) -> Callable[[], object]:
    """Return a training step by SparseLab, once it has given what the dense masked model gives."""
    model, x, y, loss = workload(case)
    mask = mask_of(model, sparsity)
    dense = workload(case)[0]
    with torch.no_grad():
        for name, kept in mask.items():
            dense.get_parameter(name).mul_(kept)
        want: Tensor = dense(x)
        got: Tensor = with_sparse_layers(model, mask)(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def measured(case: str, threads: int) -> dict[str, Any]:
    """Return a row: milliseconds of both at each sparsity."""
    keep_freed_memory()
    with num_threads(threads):
        calls: dict[str, RepeatedCall] = {}
        for sparsity in SPARSITIES:
            calls[f"sparselab {sparsity:g}"] = warm_up(peer_step(case, sparsity))
            calls[f"kernels {sparsity:g}"] = warm_up(trainer_of(case, sparsity, "fp32")[1])
        timings, clock = time_calls(calls, SAMPLES, SECONDS)
    ms = {name: timing.ms for name, timing in timings.items()}
    return {"case": case, "threads": threads, "machine": machine(), "clock": clock, "ms": ms}


def quickest(case: str, threads: int) -> dict[str, Any]:
    """Return a row with the lesser time of each, of processes whose waiting threads spin or do not."""
    rows = []
    for how in ({}, {"GOMP_SPINCOUNT": "0"}) if threads > 1 else ({},):
        command = [sys.executable, __file__, "--one", case, str(threads)]
        done = subprocess.run(command, env=os.environ | how, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
    return rows[0] | {"ms": {name: min(row["ms"][name] for row in rows) for name in rows[0]["ms"]}}


def committed() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return read_rows(RESULTS)


def table() -> str:
    """Return the table as the page shows it."""
    lines = ["| step with AdamW | threads | sparsity | SparseLab 0.2.2 | kernels | ratio (wanted) |", "|---" * 6 + "|"]
    for row in committed():
        for sparsity in SPARSITIES:
            theirs, ours = (row["ms"][f"{name} {sparsity:g}"] for name in ("sparselab", "kernels"))
            wanted = f" ({WANTED[row['case']]:g})" if row["case"] in WANTED else ""
            cells = f"{row['case']} | {row['threads']} | {sparsity:.0%} | {theirs:.0f} ms | {ours:.0f} ms"
            lines.append(f"| {cells} | {theirs / ours:.1f}x{wanted} |")
    return "\n".join(lines)


def circumstances() -> str:
    """Return the hardware and the versions, in one line."""
    return hardware(committed())


def main() -> None:
    """Measure what is not there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--one", nargs=2)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one[0], int(arguments.one[1]))))
        return
    rows = committed()
    for case in CASES:
        for threads in (1, 2):
            identity = {"case": case, "threads": threads, "machine": machine()}
            others = without(rows, identity)
            if len(others) < len(rows) and not arguments.again:
                continue
            row = quickest(case, threads)
            rows = sorted([*others, row], key=lambda row: (CASES.index(row["case"]), row["threads"]))
            write_results(RESULTS, rows)
            print(f"{case}, {threads} threads: {row['ms']}", file=sys.stderr, flush=True)
    print(f"{circumstances()}\n\n{table()}")


if __name__ == "__main__":
    main()
