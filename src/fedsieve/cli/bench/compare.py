"""Variants of one computation against one another: who is fastest, dense and sparse, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsieve.cli.bench.clock import Work, in_turns


@dataclass(frozen=True)
class Effort:
    """How long to measure: until every variant has ``samples`` undisturbed ones, or ``seconds`` have passed."""

    threads: int
    samples: int = 7
    seconds: float = 60.0
    compiled: bool = False
    """Whether dense PyTorch also runs through torch.compile."""
    processes: int = 1
    """How many processes measure it all; each variant's best one counts."""


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


def best(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row's times from those of several processes: of each variant those of its fastest process.

    A process keeps the memory that it was given, and where a hypervisor backs that by small pages, all that streams
    through memory takes up to three times as long, for this process's whole life.
    """
    times = ("ms_sparse", "ms_dense_fp32", "ms_dense_bf16")
    row = found[0] | {name: min((r[name] for r in found if r[name] is not None), default=None) for name in times}
    row |= {name: sum(r[name] for r in found) for name in ("samples_kept", "samples_dropped")}
    row |= {f"ratio_{kind}": ratio(row[f"ms_dense_{kind}"], row["ms_sparse"]) for kind in ("fp32", "bf16")}
    return row


def ratio(dense: float | None, sparse: float | None) -> float | None:
    """Return how many times less the sparse variant takes, None where either is not known."""
    return dense / sparse if dense is not None and sparse else None
