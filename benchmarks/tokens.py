"""Training steps of transformers, dense and by the kernels, at 80, 90 and 95 % sparsity: the table of docs.

    python benchmarks/tokens.py          # measure what is not there for this machine, with one and two threads
    python benchmarks/tokens.py --again  # measure anew
    python benchmarks/tokens.py --peaks  # measure memory anew, and no more

A step is forward, backward and AdamW, on a frozen random mask of the linear layers. Dense twice: as nn.Linear comes,
and with every linear layer as a 1x1 convolution in channels_last, which PyTorch gives to oneDNN: on AMD, PyTorch's
linear layers reach half of what the CPU can do, and a ratio to them alone would flatter. All variants in turns in one
process of each number of threads; medians of samples that nothing disturbed (``fedsieve.cli.bench.measurement``).
Peaks are the growth of a process's memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rows import hardware, markdown, read_rows, without, write_results
from torch import Tensor, nn

from fedsieve.cli.bench.measurement import (
    RepeatedCall,
    machine,
    processor_time_in_turns,
    time_calls,
    warm_up,
)
from fedsieve.cli.bench.roof import measure_roof, roof_seconds
from fedsieve.client.losses import NextToken
from fedsieve.client.process import keep_freed_memory, num_threads, seeded
from fedsieve.client.vector_models import CharGPT, ViTTiny
from fedsieve.kernels import Trainer
from fedsieve.sparse.masks import layer_counts, random_masks
from fedsieve.sparse.policy import select_weights, uniform_densities
from fedsieve.types import Mask
from fedsieve.types.optimizers import AdamW

RESULTS = Path(__file__).parent / "results" / "tokens.json"
CASES = ("vit, batch 32", "gpt, batch 8", "gpt, batch 1")
SPARSITIES = (0.8, 0.9, 0.95)
WANTED = {
    "vit, batch 32": {"installed": (3.3, 5, 6.2), "best": (1.6, 2.4, 3)},
    "gpt, batch 8": {"installed": (3.3, 5, 6.5), "best": (1.6, 2.5, 3.2)},
    "gpt, batch 1": {"installed": (3.5, 5, 6.5)},
}
"""The ratios that were asked for, at least."""
SAMPLES, SECONDS = 7, 60.0


def workload(case: str) -> tuple[nn.Module, Tensor, Tensor, Callable[[Any, Any], Tensor]]:
    """Return a model, a batch and the loss."""
    name, _, n = case.partition(", batch ")
    chance = torch.Generator().manual_seed(0)
    with seeded(0, []):
        if name == "vit":
            model: nn.Module = ViTTiny()
            return model, torch.randn(int(n), 3, 32, 32, generator=chance), torch.arange(int(n)) % 10, F.cross_entropy
        model = CharGPT(256, 96, width=256, blocks=6, heads=8)
    x, y = (torch.randint(96, (int(n), 256), generator=chance) for _ in range(2))
    return model, x, y, NextToken()


def mask_of(model: nn.Module, sparsity: float) -> Mask:
    """Return a random mask of the linear layers that FLASH's policy makes sparse."""
    names = select_weights("flash", model)
    like = {name: model.get_parameter(name) for name in names}
    return random_masks(0, layer_counts(uniform_densities(names, 1 - sparsity), like), like)


@contextmanager
def linear_as_convolution() -> Iterator[None]:
    """Let linear layers be 1x1 convolutions of tokens, channels last."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        y = F.conv2d(wide, weight[:, :, None, None], bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)

    with patch("torch.nn.functional.linear", linear):
        yield


def dense_step(case: str, best: bool) -> Callable[[], object]:
    """Return a dense training step of PyTorch's."""
    model, x, y, loss = workload(case)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    def by_convolutions() -> None:
        with linear_as_convolution():
            step()

    return by_convolutions if best else step


def trainer_of(case: str, sparsity: float, storage: str, **how: Any) -> tuple[Trainer, Callable[[], object]]:
    """Return a trainer on a mask, which has done a step, and its step."""
    model, x, y, loss = workload(case)
    how |= {"lr": 1e-3, "loss": loss, "optimizer": AdamW(), "storage": storage, "weight_decay": 0.01}
    trainer = Trainer(model, mask_of(model, sparsity), len(x), **how)
    trainer.step(x, y)
    return trainer, lambda: trainer.step(x, y)


def measured(case: str, threads: int) -> dict[str, Any]:
    """Return a row: milliseconds of all variants, the density of the multiply-adds, and the roof."""
    keep_freed_memory()
    with num_threads(threads):
        calls: dict[str, RepeatedCall] = {}
        for name, best in (("installed", False), ("best", True)):
            calls[name] = warm_up(dense_step(case, best))
        trainers = {}
        for sparsity in SPARSITIES:
            for storage in ("fp32", "bf16"):
                key = f"{storage} {sparsity:g}"
                trainers[key], step = trainer_of(case, sparsity, storage)
                calls[key] = warm_up(step)
        timings, clock = time_calls(calls, SAMPLES, SECONDS)
        roof = measure_roof(threads)
        real = {key: trainer.multiply_adds for key, trainer in trainers.items()}
    return {
        "case": case,
        "threads": threads,
        "machine": machine(),
        "clock": clock,
        "ms": {key: timing.ms for key, timing in timings.items()},
        "kept": min(timing.kept for timing in timings.values()),
        "dropped": max(timing.dropped for timing in timings.values()),
        "multiply_adds": {key: products / dense for key, (products, dense) in real.items()},
        "roof_ms": {key: 1e3 * roof_seconds(trainer, roof) for key, trainer in trainers.items()},
    }


def growth(case: str, kind: str) -> float:
    """Return the MB by which this process grows for three training steps: dense, or by the kernels at 90 %."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6

    nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()
    small = CharGPT(8, 96, width=8, blocks=1, heads=1)  # what reading a first model takes is no step's
    Trainer(small, {}, 2, lr=1e-3, loss=NextToken()).step(torch.zeros(2, 8).long(), torch.zeros(2, 8).long())
    start = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc(5)
    step = dense_step(case, False) if kind == "dense" else trainer_of(case, 0.9, kind, low_memory=True)[1]
    for _ in range(3):
        step()
    return resident("VmHWM") - start


def peaks(case: str) -> dict[str, float]:
    """Return the growth of a process of each kind."""
    megabytes = {}
    for kind in ("dense", "fp32", "bf16"):
        command = [sys.executable, __file__, "--peak", case, kind]
        megabytes[kind] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return megabytes | {"longer": longer(case)}


def longer(case: str) -> float:
    """Return how many times as long a step at 90 % takes that computes activations again, in processor time."""
    keep_freed_memory()
    trainers = {low: trainer_of(case, 0.9, "fp32", low_memory=low) for low in (False, True)}
    timings = processor_time_in_turns({low: warm_up(step) for low, (_, step) in trainers.items()}, 3 * SAMPLES)
    return timings[True].ms / timings[False].ms


def committed() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return read_rows(RESULTS)


def ratio_cell(row: dict[str, Any], to: str, key: str) -> str:
    """Return how many times as fast as a dense step one by the kernels is, and what was wanted."""
    ratio = row["ms"][to] / row["ms"][key]
    storage, sparsity = key.split()
    wanted = WANTED[row["case"]].get(to) if storage == "fp32" else None
    return f"{ratio:.1f}x" + (f" ({wanted[SPARSITIES.index(float(sparsity))]:g})" if wanted else "")


def table() -> str:
    """Return the table as the page shows it."""
    header = (
        "| step with AdamW | threads | sparsity | multiply-adds | dense, as installed | dense, best form | kernels "
        "| to installed (wanted) | to best (wanted) | of roof | bf16 storage | to fp32 |"
    )
    rows = []
    for row in committed():
        for sparsity in SPARSITIES:
            key, half = (f"{storage} {sparsity:g}" for storage in ("fp32", "bf16"))
            ms = row["ms"]
            rows.append([
                row["case"], str(row["threads"]), f"{sparsity:.0%}", f"{row['multiply_adds'][key]:.1%}",
                f"{ms['installed']:.0f} ms", f"{ms['best']:.0f} ms", f"{ms[key]:.0f} ms",
                ratio_cell(row, "installed", key), ratio_cell(row, "best", key), f"{row['roof_ms'][key] / ms[key]:.0%}",
                f"{ms[half]:.0f} ms", f"{ms[key] / ms[half]:.2f}x",
            ])  # fmt: skip
    return markdown(header, rows)


def memory_table() -> str:
    """Return the peaks as the page shows them."""
    rows = []
    for row in committed():
        if own := row.get("peaks"):
            cells = (f"{own[kind]:.0f} MB ({own[kind] / own['dense']:.0%})" for kind in ("fp32", "bf16"))
            rows.append((row["case"], f"{own['dense']:.0f} MB", *cells, f"{own['longer'] - 1:.0%}"))
    return markdown("| step with AdamW, 90 % | dense | kernels | bf16 storage | longer by |", rows)


def circumstances() -> str:
    """Return the hardware and the versions, in one line."""
    return hardware(committed())


def main() -> None:
    """Measure what is not there, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--peaks", action="store_true")
    parser.add_argument("--peak", nargs=2)
    arguments = parser.parse_args()
    if arguments.peak:
        print(growth(*arguments.peak))
        return
    rows = committed()
    for row in rows if arguments.peaks else ():
        if row["threads"] == 1 and row["machine"] == machine():
            row["peaks"] = peaks(row["case"])
    write_results(RESULTS, rows)
    for case in CASES if not arguments.peaks else ():
        for threads in (1, 2):
            identity = {"case": case, "threads": threads, "machine": machine()}
            others = without(rows, identity)
            if len(others) < len(rows) and not arguments.again:
                continue
            row = measured(case, threads) | ({"peaks": peaks(case)} if threads == 1 else {})
            rows = sorted([*others, row], key=lambda row: (CASES.index(row["case"]), row["threads"]))
            write_results(RESULTS, rows)
            print(f"{case}, {threads} threads: {row['ms']}", file=sys.stderr, flush=True)
    print(f"{circumstances()}\n\n{table()}\n\n{memory_table()}")


if __name__ == "__main__":
    main()
