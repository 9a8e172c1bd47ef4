"""Tokens a second of a GPT's generation, batch 1, dense and by the kernels, at 80, 90 and 95 %: a table of docs.

    python benchmarks/generation.py          # measure what is not there for this machine, with one and two threads
    python benchmarks/generation.py --again  # measure anew

The GPT of ``benchmarks/tokens.py``: width 256, 6 layers, windows of 256 of 96 characters. 64 tokens come behind
96 others, each the likeliest, so that attention looks back as far as it does on average. Dense PyTorch keeps keys and
values in preallocated memory, in inference mode: by ``F.linear``; with each weight transposed beforehand (``addmm``);
and as a sum of products, number by number. The faster of the last two is the best form: a matrix times one vector is
read once, and how fast is a matter of the library. All variants in turns in one process of each number of threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokens
import torch
import torch.nn.functional as F
from rows import hardware, markdown, read_rows, without, write_results
from torch import Tensor, nn

from fedsieve.cli.bench.measurement import PROCESSOR, WALL, machine, processor_time_in_turns, time_in_turns, warm_up
from fedsieve.cli.bench.roof import measure_roof
from fedsieve.client.process import keep_freed_memory, num_threads
from fedsieve.client.vector_models import CharGPT
from fedsieve.kernels import Decoder

RESULTS = Path(__file__).parent / "results" / "generation.json"
BEFORE, TOKENS, LENGTH = 96, 64, 256
WANTED = {0.9: 4}
"""The ratio to dense that was asked for, at least."""
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "linear": (lambda weight: weight, F.linear),
    "addmm": (
        lambda weight: weight.t().contiguous(),
        lambda x, weight, bias=None: x @ weight if bias is None else torch.addmm(bias, x, weight),
    ),
    "sum": (
        lambda weight: weight,
        lambda x, weight, bias=None: (x * weight).sum(1)[None] + (0 if bias is None else bias),
    ),
}
"""How a dense product is computed: what is made of the weight beforehand, and the product of a token [1, channels]."""
SAMPLES, SECONDS = 9, 45.0


class DenseDecoder:
    """The GPT a token at a time, in PyTorch, with preallocated keys and values; a product by one of ``FORMS``."""

    def __init__(self, model: CharGPT, form: str):
        prepare, self.product = FORMS[form]
        self.model, self.blocks = model, [*model.blocks]
        self.weights = {m: prepare(m.weight.detach()) for m in model.modules() if isinstance(m, nn.Linear)}
        self.heads = int(self.blocks[0].heads)  # type: ignore[arg-type]
        width = model.norm.weight.numel()
        shape = len(self.blocks), 1, self.heads, LENGTH, width // self.heads
        self.keys, self.values, self.position = torch.zeros(shape), torch.zeros(shape), 0

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """Return a layer's output for a token [1, channels]."""
        return self.product(x, self.weights[layer], layer.bias)

    def __call__(self, token: int) -> Tensor:
        """Return the logits [vocabulary] behind the next token."""
        model, p, n = self.model, self.position, self.position + 1
        x = model.tokens.weight[token : token + 1] + model.positions.weight[p:n]
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            one: Any = block
            q, k, v = self.linear(one.qkv, one.ln1(x)).view(3, 1, self.heads, 1, -1).unbind()
            keys[:, :, p:n], values[:, :, p:n] = k, v
            y = F.scaled_dot_product_attention(q, keys[:, :, :n], values[:, :, :n])
            x = x + self.linear(one.proj, y.view(1, -1))
            x = x + self.linear(one.fc2, F.gelu(self.linear(one.fc1, one.ln2(x))))
        self.position = n
        return self.linear(model.head, model.norm(x))[0]


def network(sparsity: float) -> CharGPT:
    """Return the GPT on a random mask of the layers that FLASH's policy makes sparse."""
    model = tokens.workload("gpt, batch 1")[0].eval()
    assert isinstance(model, CharGPT)
    for name, mask in tokens.mask_of(model, sparsity).items() if sparsity else ():
        model.get_parameter(name).data.mul_(mask)
    return model.requires_grad_(False)


def greedy(decoder: Any) -> Callable[[], list[int]]:
    """Return a call that generates ``TOKENS`` behind ``BEFORE`` others, which are taken in once."""
    with torch.inference_mode():
        first = [int(decoder(token % 96).argmax()) for token in range(BEFORE)][-1]

    def call() -> list[int]:
        decoder.position, continuation = BEFORE, [first]
        with torch.inference_mode():
            for _ in range(TOKENS):
                continuation.append(int(decoder(continuation[-1]).argmax()))
        return continuation

    return call


def measured(threads: int) -> dict[str, Any]:
    """Return a row: tokens a second of all variants, and the bytes that a token reads of the lists and the cache."""
    keep_freed_memory()
    with num_threads(threads):
        calls = {form: greedy(DenseDecoder(network(0), form)) for form in FORMS}
        assert len({tuple(call()) for call in calls.values()}) == 1
        decoders = {f"{sparsity:g}": Decoder(network(sparsity), LENGTH) for sparsity in tokens.SPARSITIES}
        for sparsity, decoder in decoders.items():
            calls[sparsity] = greedy(decoder)
            assert calls[sparsity]() == greedy(DenseDecoder(network(float(sparsity)), "linear"))()
        ready = {name: warm_up(call) for name, call in calls.items()}
        timings, clock = time_in_turns(ready, SAMPLES, SECONDS), WALL
        if threads == 1 and any(timing.kept == 0 for timing in timings.values()):
            timings, clock = processor_time_in_turns(ready, SAMPLES), PROCESSOR
        roof = measure_roof(threads) if clock == WALL else measure_roof(1, time.thread_time)
    cache = 2 * 4 * len(network(0).blocks) * 256 * (BEFORE + TOKENS / 2)
    return {
        "threads": threads,
        "machine": machine(),
        "clock": clock,
        "tokens_s": {name: 1e3 * TOKENS / timing.ms for name, timing in timings.items() if timing.ms},
        "kept": min(timing.kept for timing in timings.values()),
        "multiply_adds": {name: decoder.multiply_adds for name, decoder in decoders.items()},
        "list_bytes": {name: decoder.bytes for name, decoder in decoders.items()},
        "roof_s": {
            name: (decoder.bytes + cache) / measured_bandwidth
            for name, decoder in decoders.items()
            for measured_bandwidth in [roof.bandwidth(decoder.bytes + cache)]
        },
    }


def committed() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return read_rows(RESULTS)


def table() -> str:
    """Return the table as the page shows it."""
    header = (
        "| tokens a second | threads | sparsity | dense, as installed | dense, best form | kernels | to installed "
        "| to best (wanted) | non-zeros read | of roof |"
    )
    rows = []
    for row in committed():
        for sparsity in tokens.SPARSITIES:
            key, speed = f"{sparsity:g}", row["tokens_s"]
            best = max(speed["addmm"], speed["sum"], speed["linear"])
            wanted = f" ({WANTED[sparsity]:g})" if sparsity in WANTED else ""
            rows.append([
                "gpt, batch 1", str(row["threads"]), f"{sparsity:.0%}", f"{speed['linear']:.0f}", f"{best:.0f}",
                f"{speed[key]:,.0f}", f"{speed[key] / speed['linear']:.1f}x", f"{speed[key] / best:.1f}x{wanted}",
                f"{row['list_bytes'][key] / 1e6:.1f} MB", f"{row['roof_s'][key] * speed[key]:.0%}",
            ])  # fmt: skip
    return markdown(header, rows)


def circumstances() -> str:
    """Return the hardware and the versions, in one line."""
    return hardware(committed())


def main() -> None:
    """Measure what is not there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    again = parser.parse_args().again
    rows = committed()
    for threads in (1, 2):
        identity = {"threads": threads, "machine": machine()}
        others = without(rows, identity)
        if len(others) < len(rows) and not again:
            continue
        row = measured(threads)
        if len(row["tokens_s"]) < len(FORMS) + len(tokens.SPARSITIES):
            print(f"{threads} threads: the machine was never idle, and nothing is kept", file=sys.stderr)
            continue
        rows = sorted([*others, row], key=lambda row: int(row["threads"]))
        write_results(RESULTS, rows)
    print(f"{circumstances()}\n\n{table()}")


if __name__ == "__main__":
    main()
