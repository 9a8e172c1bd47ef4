"""Variants of one computation against one another: who is fastest, dense and sparse, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsieve.bench.clock import Work, in_turns


@dataclass(frozen=True)
class Effort:
    """How long to measure: until every variant has ``samples`` undisturbed ones, or ``seconds`` have passed."""

    threads: int
    samples: int = 7
    seconds: float = 60.0
    compiled: bool = False
    """Whether dense PyTorch also runs through torch.compile."""


def compared(works: Mapping[tuple[str, ...], Work], effort: Effort) -> dict[str, Any]:
    """Return the part of a row that tells times; the variants' keys begin with sparse, fp32 or bf16.

    Of several variants of a kind the fastest counts; how many samples, of the variant that kept fewest.
    """
    found = in_turns(works, effort.samples, effort.seconds)

    def best(kind: str) -> float | None:
        return min((t.ms for key, t in found.items() if key[0] == kind and t.ms is not None), default=None)

    sparse, fp32, bf16 = best("sparse"), best("fp32"), best("bf16")
    poorest = min(found.values(), key=lambda timing: timing.kept)
    return {
        "ms_sparse": sparse,
        "ms_dense_fp32": fp32,
        "ms_dense_bf16": bf16,
        "ratio_fp32": ratio(fp32, sparse),
        "ratio_bf16": ratio(bf16, sparse),
        "samples_kept": poorest.kept,
        "samples_dropped": poorest.dropped,
    }


def ratio(dense: float | None, sparse: float | None) -> float | None:
    """Return how many times less the sparse variant takes, None where either is not known."""
    return dense / sparse if dense is not None and sparse else None
