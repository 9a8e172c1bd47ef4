"""How a sample is timed, which ones count, and in which order variants take turns."""

import math
from pathlib import Path

import pytest

from fedsieve.cli.bench import measurement
from fedsieve.cli.bench.measurement import RepeatedCall


@pytest.mark.parametrize(
    ("waiting", "steal", "quiet"), [(0.0, 0, True), (1e-4, 0, True), (0.01, 0, False), (0.0, 1, False)]
)
def test_a_sample_counts_only_if_nobody_disturbed_it(
    monkeypatch: pytest.MonkeyPatch, waiting: float, steal: int, quiet: bool
) -> None:
    waits, ticks, times = iter([5.0, 5.0 + waiting]), iter([7, 7 + steal]), iter([1.0, 1.02])
    monkeypatch.setattr(measurement, "wait_seconds", lambda: next(waits))
    monkeypatch.setattr(measurement, "steal_ticks", lambda: next(ticks))
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: next(times))
    seconds, counts = measurement.time_sample(lambda: None)
    assert (round(seconds, 9), counts) == (0.02, quiet)


def test_a_summary_is_the_median_of_what_counts() -> None:
    assert measurement.summarize_samples([(1.0, True), (9.0, False), (3.0, True), (2.0, True)]) == (2.0, 3, 1)
    nothing = measurement.summarize_samples([(1.0, False)])
    assert math.isnan(nothing.seconds)
    assert nothing.ms is None
    assert nothing[1:] == (0, 1)


def test_variants_take_turns_until_each_has_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    order, quiet = [], iter([True, False, True, True])
    works = {name: RepeatedCall(lambda name=name: order.append(name), 2) for name in "ab"}  # type: ignore[misc]

    def sample(work: RepeatedCall) -> tuple[float, bool]:
        work()
        return 6.0, next(quiet)

    monkeypatch.setattr(measurement, "time_sample", sample)
    found = measurement.time_in_turns(works, 1, 60.0)
    assert "".join(order) == "aabbaabb"
    assert found == {"a": (3.0, 2, 0), "b": (3.0, 1, 1)}  # of one call


def test_variants_stop_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "time_sample", lambda work: (1.0, False))
    assert measurement.time_in_turns({"a": RepeatedCall(lambda: None)}, 5, 0.0)["a"][1:] == (0, 1)


def test_a_sample_is_long_enough_and_of_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter((0.009, 0.003, 0.004))  # of a group of three calls, warm at its fastest
    monkeypatch.setattr(measurement, "time_sample", lambda call: (next(durations), True))
    assert measurement.warm_up(lambda: None, group=3).calls == 3 * 7
    monkeypatch.setattr(measurement, "time_sample", lambda call: (1.0, True))
    assert measurement.warm_up(lambda: None).calls == 1


def test_the_system_tells_how_long_threads_wait() -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc")
    assert measurement.wait_seconds() >= 0
    assert measurement.steal_ticks() >= 0
    assert "torch" in measurement.machine()
