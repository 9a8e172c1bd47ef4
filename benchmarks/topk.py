"""The exact top-k selections of a SWAT step: ResNet-18, batch 16, the weight and the input of each inner convolution.

Claim: on an H100 the 32 selections take at most 1 ms. On a GPU all of them are captured in one CUDA graph, by counting
(Triton) and by sorts (PyTorch alone); the median of 20 replays counts. What they should take is computed from their
launches and bytes, and kept in benchmarks/results/topk.json.

    python benchmarks/topk.py             computes (needs Triton); then python benchmarks/readme.py
    python benchmarks/topk.py --measure   measures on this machine's GPU, or on its CPU (seconds)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedsieve.client.models import MODELS
from fedsieve.sparse import selection
from fedsieve.sparse.masks import topk_count
from fedsieve.sparse.policy import select_weights

RESULTS = Path(__file__).parent / "results" / "topk.json"
BATCH, DENSITY = 16, 0.05
LAUNCH, BANDWIDTH = 2.5e-6, 3.35e12
"""An H100's: seconds from one kernel's begin to the next one's within a graph, bytes a second."""
ACTIVATIONS = (torch.float32, torch.bfloat16)
Cut: TypeAlias = Callable[[Tensor, int, torch.dtype], Tensor]


def layers_of(batch: int, model: str = "resnet18", policy: str = "zerofl") -> list[tuple[Tensor, Tensor]]:
    """Return weight and input of every layer that the policy names: drawn numbers, inputs after a ReLU."""
    torch.manual_seed(0)
    net = MODELS[model](3, 10)
    inputs: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, arguments: inputs.update({name: tuple(arguments[0].shape)})

    names = select_weights(policy, net)
    for name in names:
        net.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(note(name))
    with torch.no_grad():
        net(torch.zeros(batch, 3, 32, 32))
    return [(net.get_parameter(name).detach(), torch.randn(inputs[name]).relu()) for name in names]


def measure(
    device: str, activations: torch.dtype = torch.float32, batch: int = BATCH, repeats: int = 20
) -> dict[str, Any]:
    """Return the milliseconds that all selections take together: as training does them, each alone, and by sorts.

    ``activations``: the dtype of the inputs, which weights are rounded to after they are cut in float32; all are
    channels_last. Training cuts all weights at once, and each input. On a GPU each way is one graph; the values that
    all keep have to be the same bits.
    """
    layers = layers_of(batch)
    weights = [w.to(device).to(memory_format=torch.channels_last) for w, _ in layers]
    inputs = [a.to(device, activations).to(memory_format=torch.channels_last) for _, a in layers]
    counts = [topk_count(DENSITY, x.numel()) for x in (*weights, *inputs)]
    cut_weights = selection.cuts(weights, counts[: len(weights)], activations)

    def each(cut: Cut, tensors: list[Tensor]) -> list[Tensor]:
        return [cut(x, k, activations) for x, k in zip(tensors, counts[-len(tensors) :], strict=True)]

    ways: dict[str, Callable[[], list[Tensor]]] = {
        "ms": lambda: [*cut_weights()[0], *each(counted_cut, inputs)],
        "single_ms": lambda: each(counted_cut, [*weights, *inputs]),
        "sort_ms": lambda: each(sorted_cut, [*weights, *inputs]),
    }
    results = {name: milliseconds(work, device, repeats) for name, work in ways.items()}
    (_, first), *others = results.values()
    assert all(torch.equal(a, b) for _, values in others for a, b in zip(first, values, strict=True))
    return {
        "selections": len(counts),
        "elements": sum(x.numel() for x in first),
        "activations": str(activations).removeprefix("torch."),
        **{name: time for name, (time, _) in results.items()},
    }


def counted_cut(x: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return selection.cut(x, k, dtype)[0]


def sorted_cut(x: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    support, _ = selection.sort_select(selection.magnitude_keys(x), k)
    return x.clone().masked_fill_(~support.view(x.shape), 0).to(dtype)


def milliseconds(work: Callable[[], list[Tensor]], device: str, repeats: int) -> tuple[float, list[Tensor]]:
    """Return the median milliseconds of a call, on a GPU of a graph's replay, and the tensors that it gives."""
    times = []
    if not device.startswith("cuda"):
        for _ in range(repeats):
            began = time.perf_counter()
            values = work()
            times.append(1e3 * (time.perf_counter() - began))
        return median(times), values
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled at its first call is compiled before the capture
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = work()
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times[3:]), values


def computed(activations: torch.dtype) -> dict[str, Any]:
    """Return launches and megabytes of all selections, and the milliseconds that they come to on an H100.

    Zeroed tables are a launch, so are each digit, the count of equals, and the last pass; all weights share theirs.
    Each digit and the last pass read the tensor, the last one writes it. The count of equals reads it, too, where not
    all of them are kept.
    """
    from fedsieve.sparse.selection_launch import DIGITS

    layers = layers_of(BATCH)
    weights, inputs = sum(w.numel() for w, _ in layers), sum(a.numel() for _, a in layers)
    of_weight, of_input = len(DIGITS[torch.float32]), len(DIGITS[activations])
    read = 4 * weights * (of_weight + 1) + activations.itemsize * inputs * (of_input + 1)
    moved = read + activations.itemsize * (weights + inputs)
    launches = of_weight + 3 + len(layers) * (of_input + 3)
    return {
        "activations": str(activations).removeprefix("torch."),
        "selections": 2 * len(layers),
        "launches": launches,
        "single_launches": launches + (len(layers) - 1) * (of_weight + 3),
        "megabytes": moved / 1e6,
        "equals_megabytes": (4 * weights + activations.itemsize * inputs) / 1e6,
        "launch_ms": 1e3 * launches * LAUNCH,
        "memory_ms": 1e3 * moved / BANDWIDTH,
    }


def table() -> str:
    """Return what is computed as a table."""
    lines = [
        "| inputs | launches (weights one by one) | read and written, MB (more, with equals) | ms of launches "
        "| of memory | together |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads(RESULTS.read_text())["computed"]:
        cells = [
            row["activations"],
            f"{row['launches']} ({row['single_launches']})",
            f"{row['megabytes']:.0f} ({row['equals_megabytes']:.0f})",
            *(f"{row[name]:.2f}" for name in ("launch_ms", "memory_ms")),
            f"{row['launch_ms'] + row['memory_ms']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compute, or measure and print."""
    if "--measure" in sys.argv:
        device, small = ("cuda", {}) if torch.cuda.is_available() else ("cpu", {"repeats": 3})
        for activations in ACTIVATIONS:
            print(json.dumps({"device": device, **measure(device, activations, **small)}), flush=True)
        return
    RESULTS.write_text(json.dumps({"computed": [computed(dtype) for dtype in ACTIVATIONS]}, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()
