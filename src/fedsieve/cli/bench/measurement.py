"""How sparse against dense is measured: in fresh processes, all variants in turns, and of several the fastest counts.

A disturbed sample does not count: one during which this process's threads waited more than 2 % of it on a run queue,
or the hypervisor took time from the machine (steal). Where the system tells neither (outside Linux), every one counts.
Where all samples of a variant were disturbed, all variants are measured again by the processor time of one thread,
which others at work lengthen less, and the row says so (``clock``).

In a process of its own no other has a part in a measurement's memory and threads. Threads that wait for one another
spin there for about a millisecond before they sleep, as in a plain PyTorch script (GNU's default): ``fedsieve run``,
where runs share the machine, lets them sleep at once, which costs some per cent.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch

from fedsieve.cli.bench.workload import Workload
from fedsieve.client.process import num_threads
from fedsieve.runs.provenance import cpu_model
from fedsieve.types import InputError

Key = TypeVar("Key")
Result = TypeVar("Result")
WAITING = 0.02
"""The share of a sample's time that its threads may have waited on a run queue."""
SHORTEST = 0.02
"""The seconds that a sample takes at least: as many calls as that needs."""
WARM = 3
STEAL = 8
"""The column of /proc/stat that counts stolen time."""
WALL, PROCESSOR = "wall", "processor, 1 thread"
TIMES = ("ms_sparse", "ms_dense_fp32", "ms_dense_bf16")
SPINNING = {"GOMP_SPINCOUNT": "300000"}


class Timing(NamedTuple):
    """The median of the undisturbed samples in seconds (NaN without one), and how many were kept and dropped."""

    seconds: float
    kept: int
    dropped: int

    @property
    def ms(self) -> float | None:
        """The median in milliseconds, None where nothing was kept."""
        return None if math.isnan(self.seconds) else self.seconds * 1e3


@dataclass(frozen=True)
class RepeatedCall:
    """What one sample times: ``calls`` calls of a function; the sample is their mean."""

    call: Callable[[], object]
    calls: int = 1

    def __call__(self) -> None:
        """Call the function ``calls`` times."""
        for _ in range(self.calls):
            self.call()


def wait_seconds() -> float:
    """Return the seconds that this process's threads have spent runnable but not running (Linux's schedstat)."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            total += int(task.read_text().split()[1])
    return total / 1e9


def steal_ticks() -> int:
    """Return the ticks that the hypervisor has taken from this machine since it started."""
    stat = Path("/proc/stat")
    return int(stat.read_text().split(maxsplit=STEAL + 1)[STEAL]) if stat.exists() else 0


def time_sample(call: Callable[[], object]) -> tuple[float, bool]:
    """Return how long a call took, in seconds, and whether the machine left it undisturbed."""
    steal, waited, began = steal_ticks(), wait_seconds(), time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    return seconds, wait_seconds() - waited < WAITING * seconds and steal_ticks() == steal


def summarize_samples(samples: list[tuple[float, bool]]) -> Timing:
    """Return the median of the undisturbed samples, in seconds, and how many were kept and dropped."""
    times = [seconds for seconds, undisturbed in samples if undisturbed]
    return Timing(median(times) if times else math.nan, len(times), len(samples) - len(times))


def warm_up(call: Callable[[], object], group: int = 1) -> RepeatedCall:
    """Call it a few times, and return samples of it that are long enough, each of whole groups of calls."""
    seconds = min(time_sample(RepeatedCall(call, group))[0] for _ in range(WARM))
    return RepeatedCall(call, group * max(1, math.ceil(SHORTEST / seconds)))


def time_in_turns(calls: Mapping[Key, RepeatedCall], count: int, seconds: float) -> dict[Key, Timing]:
    """Return the seconds of a call of each, sampled in turns until each has ``count`` that count or time is up."""
    samples: dict[Key, list[tuple[float, bool]]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while True:
        for name, call in calls.items():
            duration, undisturbed = time_sample(call)
            samples[name].append((duration / call.calls, undisturbed))
        if time.perf_counter() >= end or all(sum(ok for _, ok in own) >= count for own in samples.values()):
            return {name: summarize_samples(own) for name, own in samples.items()}


def processor_time_in_turns(calls: Mapping[Key, RepeatedCall], count: int) -> dict[Key, Timing]:
    """Return the seconds of a call of each that one thread computes, sampled in turns; every sample counts."""
    samples: dict[Key, list[tuple[float, bool]]] = {name: [] for name in calls}
    with num_threads(1):
        for call in calls.values():
            call.call()  # what is made for other threads is made anew
        for _ in range(count):
            for name, call in calls.items():
                began = time.thread_time()
                call()
                samples[name].append(((time.thread_time() - began) / call.calls, True))
    return {name: summarize_samples(own) for name, own in samples.items()}


def time_calls(calls: Mapping[Key, RepeatedCall], count: int, seconds: float) -> tuple[dict[Key, Timing], str]:
    """Return the seconds of a call of each, and their clock: the processor's where one was never undisturbed."""
    timings = time_in_turns(calls, count, seconds)
    if all(timing.kept for timing in timings.values()):
        return timings, WALL
    return processor_time_in_turns(calls, count), PROCESSOR


def machine() -> str:
    """Return the hardware and the versions that a figure belongs to, in one line."""
    return f"{cpu_model()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


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
    period: int = 1
    """After how many steps SWAT chooses anew."""
    unit: int = 1
    """How many output channels share the pattern of the mask."""
    roof_ms: float | None = None
    """What the sparse step would take at the roof of this machine: ``roof``."""
    share_of_roof: float | None = None
    cpu: str = ""
    clock: str = WALL
    """What tells the times: the wall clock, or on a busy machine the processor time of one thread."""
    peak_mb_sparse: float | None = None
    peak_mb_dense: float | None = None
    """Of dense training in fp32."""


def measure(time: Callable[..., dict[str, Any]], workload: Workload, effort: Effort, **peaks: Any) -> Measurement:
    """Return what ``time(workload, **effort)`` tells of a workload in fresh processes, with its ``peaks`` of memory."""
    rows = [run_fresh(time, workload, effort.threads, **asdict(effort)) for _ in range(effort.processes)]
    names = ("model", "batch", "sparsity", "rule", "storage", "unit", "period")
    about = {name: getattr(workload, name) for name in names} | {"cpu": cpu_model()}
    return Measurement(**about, **fastest(rows), **peaks)


def compare_times(calls: Mapping[tuple[str, ...], RepeatedCall], effort: Effort) -> dict[str, Any]:
    """Return the part of a row that tells times; the variants' keys begin with sparse, fp32 or bf16.

    Of several variants of a kind the fastest counts; how many samples, of the variant that kept fewest.
    """
    timings, clock = time_calls(calls, effort.samples, effort.seconds)
    by_kind = {
        kind: [timing.ms for key, timing in timings.items() if key[0] == kind] for kind in ("sparse", "fp32", "bf16")
    }
    poorest = min(timings.values(), key=lambda timing: timing.kept)
    return {
        **dict(zip(TIMES, map(least, by_kind.values()), strict=True)),
        "samples_kept": poorest.kept,
        "samples_dropped": poorest.dropped,
        "clock": clock,
    }


def fastest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row's times, with their ratios, from those of several processes: of each variant the fastest one's.

    A process keeps the memory that it was given, and where a hypervisor backs that by small pages, all that streams
    through memory takes up to three times as long, for this process's whole life.
    """
    rows = [one for one in rows if one.get("clock", WALL) == WALL] or rows
    row = rows[0] | {name: least([one[name] for one in rows]) for name in TIMES}
    row |= {name: sum(one[name] for one in rows) for name in ("samples_kept", "samples_dropped")}
    if "roof_ms" in row:
        row["roof_ms"] = least([one["roof_ms"] for one in rows])
        row["share_of_roof"] = ratio(row["roof_ms"], row["ms_sparse"])
    return row | {f"ratio_{kind}": ratio(row[f"ms_dense_{kind}"], row["ms_sparse"]) for kind in ("fp32", "bf16")}


def ratio(dense: float | None, sparse: float | None) -> float | None:
    """Return how many times less the sparse variant takes, None where either is not known."""
    return dense / sparse if dense is not None and sparse else None


def least(values: list[float | None]) -> float | None:
    """Return the least of the known values, None without one."""
    return min((value for value in values if value is not None), default=None)


def run_fresh(function: Callable[..., Result], workload: Workload, threads: int, /, **options: Any) -> Result:
    """Return ``function(workload, **options)``, computed by a new process with so many threads; plain JSON both ways.

    Raises InputError, with the last line of what that process had to say, if it fails.
    """
    request = json.dumps([function.__module__, function.__name__, asdict(workload), threads, options])
    command = [sys.executable, "-m", "fedsieve.cli.bench.measurement", request]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | SPINNING)
    if process.returncode:
        trouble = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise InputError(f"{workload.model}, batch {workload.batch}, could not be measured: {trouble}")
    result: Result = json.loads(process.stdout)
    return result


def _main() -> None:
    """Compute what the command line asks for, and print it as JSON."""
    module, name, workload, threads, options = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    try:
        result = getattr(importlib.import_module(module), name)(Workload(**workload), **options)
    except InputError as error:
        sys.exit(str(error))
    print(json.dumps(result))


if __name__ == "__main__":
    _main()
