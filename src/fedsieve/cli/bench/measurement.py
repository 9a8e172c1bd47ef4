"""A measurement of sparse against dense, and how it is taken: in fresh processes, of which the fastest counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedsieve.cli.bench.clock import RepeatedCall, time_in_turns
from fedsieve.cli.bench.fresh import run_fresh
from fedsieve.cli.bench.workload import Workload

TIMES = ("ms_sparse", "ms_dense_fp32", "ms_dense_bf16")


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


@dataclass(frozen=True)
class Measurement:
    """One workload, measured; None where it was not. Times in ms, memory in MB of 10^6 bytes."""

    model: str
    batch: int
    sparsity: float
    rule: str
    storage: str
    density_per_multiply_add: float | None
    """Multiply-adds of the sparse variant over those of the dense one: a speed-up compares with its inverse."""
    ms_sparse: float | None
    ms_dense_fp32: float | None
    ms_dense_bf16: float | None
    ratio_fp32: float | None
    ratio_bf16: float | None
    samples_kept: int
    samples_dropped: int
    peak_mb_sparse: float | None = None
    peak_mb_dense: float | None = None
    """Of dense training in fp32."""


def measure(time: Callable[..., dict[str, Any]], workload: Workload, effort: Effort, **peaks: Any) -> Measurement:
    """Return what ``time(workload, **effort)`` tells of a workload in fresh processes, with its ``peaks`` of memory."""
    rows = [run_fresh(time, workload, effort.threads, **asdict(effort)) for _ in range(effort.processes)]
    names = ("model", "batch", "sparsity", "rule", "storage")
    return Measurement(**{name: getattr(workload, name) for name in names}, **fastest(rows), **peaks)


def compare_times(calls: Mapping[tuple[str, ...], RepeatedCall], effort: Effort) -> dict[str, Any]:
    """Return the part of a row that tells times; the variants' keys begin with sparse, fp32 or bf16.

    Of several variants of a kind the fastest counts; how many samples, of the variant that kept fewest.
    """
    timings = time_in_turns(calls, effort.samples, effort.seconds)
    by_kind = {
        kind: [timing.ms for key, timing in timings.items() if key[0] == kind] for kind in ("sparse", "fp32", "bf16")
    }
    poorest = min(timings.values(), key=lambda timing: timing.kept)
    return {
        **dict(zip(TIMES, map(least, by_kind.values()), strict=True)),
        "samples_kept": poorest.kept,
        "samples_dropped": poorest.dropped,
    }


def fastest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row's times, with their ratios, from those of several processes: of each variant the fastest one's.

    A process keeps the memory that it was given, and where a hypervisor backs that by small pages, all that streams
    through memory takes up to three times as long, for this process's whole life.
    """
    row = rows[0] | {name: least([one[name] for one in rows]) for name in TIMES}
    row |= {name: sum(one[name] for one in rows) for name in ("samples_kept", "samples_dropped")}
    return row | {f"ratio_{kind}": ratio(row[f"ms_dense_{kind}"], row["ms_sparse"]) for kind in ("fp32", "bf16")}


def ratio(dense: float | None, sparse: float | None) -> float | None:
    """Return how many times less the sparse variant takes, None where either is not known."""
    return dense / sparse if dense is not None and sparse else None


def least(values: list[float | None]) -> float | None:
    """Return the least of the known values, None without one."""
    return min((value for value in values if value is not None), default=None)
