"""A run from its beginning, or from where it stands, to its end: for Python (``fedsieve.run``) and ``fedsieve run``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import nn

from fedsieve.engine import Engine, Federation, Run
from fedsieve.engine.loop import rounds, warn_of_dense
from fedsieve.engine.worker import kernels_for
from fedsieve.recipes import apply_settings, load_recipe
from fedsieve.runs.callbacks import Callback, Callbacks, ObservedRun
from fedsieve.runs.engines import OWN_ENGINES, EngineKind, choose_engine, find_engine
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import MODEL, read_manifest, read_rows, read_summary
from fedsieve.runs.recorder import manifest_of, record_run, row_of, summary_of
from fedsieve.types import InputError, Params


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    path: Path | None
    """The run directory; None where there is none."""
    summary: dict[str, Any]
    """``summary.json``: accuracy, density, bytes, multiply-adds, seconds; where and why it ended early."""
    rows: list[dict[str, Any]] = field(repr=False)
    """A row a round, as in ``rounds.jsonl``, those before a resume included."""
    model: nn.Module = field(repr=False)
    """The deployed model, in eval mode."""


class ReadyRun(NamedTuple):
    """A run with its data and its engine; without one where Flower's processes run it, ``number`` of them (0: any)."""

    federation: Federation
    engine: Engine | None
    number: int
    execution: Execution
    """As it was asked for, with the engine that was chosen."""


def run(
    run: Run | str,
    out: Path | str | None = None,
    *,
    settings: Sequence[str] = (),
    resume: bool = False,
    until: str | int = "",
    callbacks: Sequence[Callback] = (),
    on_error: str = "stop",
    engine: str | Engine = "local",
    device: str = "cpu",
    precision: str = "fp32",
    kernels: str | None = None,
    measure: str = "",
    data: Path | str = "",
    accept_changes: bool = False,
) -> RunResult:
    """Run an experiment to its end, in a directory as ``fedsieve run`` does, and return what it came to.

    ``run`` is a ``Run`` or the name of a recipe, ``settings`` change it (``["method.sparsity=0.95"]``). ``out`` is the
    run directory, where ``resume`` goes on after the last checkpoint, if there is one; without ``out`` nothing is
    written. Every round goes to the ``callbacks``, functions of the ``Round`` or loggers, after it is recorded; where
    one raises, the run stops, to be resumed, or warns (``on_error="warn"``). ``until`` ends it after a round, or the
    first test that meets a condition (``"accuracy_validation>=.9"``). ``engine`` is a name (``local``, ``pool:2``,
    ``cohort:8``; ``auto`` may start processes, so that a script needs ``if __name__ == "__main__"``) or one that is
    made, which has its own device and kernels. The rest is as of the command. Warns (MostlyDense) where a sparse method
    leaves weights dense. Raises InputError before anything is written.
    """
    if out is not None and not isinstance(out, str | Path):
        raise InputError("out must be a folder; for a loop over the rounds there is fedsieve.rounds(run, engine)")
    if out is None and resume:
        raise InputError("resume goes on with what a directory holds: name it, out=...")
    execution = Execution(
        engine=engine if isinstance(engine, str) else _name_of(engine),
        device=device,
        precision=precision,
        kernels=kernels or "auto",
        measure=measure,
        data=str(data),
        resume=resume,
        accept_changes=accept_changes,
        until=str(until),
        on_error=on_error,
    )
    recipe = run if isinstance(run, str) else ""
    one = load_recipe(run, settings) if isinstance(run, str) else apply_settings(run, settings)
    own = None if isinstance(engine, str) else engine
    if out is None:
        return _in_memory(one, recipe, execution, own, callbacks)
    folder = Path(out)
    if kernels is None:
        execution = as_begun(folder, execution)
    federation, engine, execution = _ready(one, execution, own)
    for _ in record_run(folder, federation, engine, recipe, execution, callbacks):
        pass
    model = _deployed(federation, load_file(folder / MODEL))
    return RunResult(folder, read_summary(folder) or {}, read_rows(folder), model)


def as_begun(folder: Path, execution: Execution) -> Execution:
    """Return how a run goes on in ``folder``: with the kernels and the precision that it was begun with."""
    if (manifest := read_manifest(folder)) is None:
        return execution
    return replace(execution, kernels=manifest["kernels"], precision=manifest.get("precision", "fp32"))


def open_ready(run: Run, execution: Execution, kinds: Mapping[str, EngineKind] = OWN_ENGINES) -> ReadyRun:
    """Return a run with its data and the engine, of ``kinds``, that ``execution`` names. Raises InputError."""
    for logger in execution.loggers:
        logger.check(Path(execution.out))
    kind, number = find_engine(execution, kinds)
    engine = kind.make(execution, number) if kind.make else None
    federation = execution.open(run)
    kernels_for(federation, execution.kernels, execution.device)
    if execution.engine == "auto":
        execution = choose_engine(execution, federation)
        kind, number = find_engine(execution, kinds)
        engine = kind.make(execution, number) if kind.make else None
    return ReadyRun(federation, engine, number, execution)


def _ready(run: Run, execution: Execution, own: Engine | None) -> tuple[Federation, Engine, Execution]:
    if own:
        federation = execution.open(run)
    else:
        federation, own, _, execution = open_ready(run, execution)
        assert own
    warn_of_dense(federation)
    return federation, own, execution


def _in_memory(
    run: Run, recipe: str, execution: Execution, own: Engine | None, callbacks: Sequence[Callback]
) -> RunResult:
    """Run without a directory."""
    if "kernels" in execution.measures:
        raise InputError("measure=kernels is measured from a checkpoint: name a directory, out=...")
    stop, observers = execution.stop_rule, Callbacks(callbacks, execution.on_error)
    federation, engine, execution = _ready(run, execution, own)
    stop.check(federation)
    by_round, round = dict[int, dict[str, Any]](), None
    with (
        observers.opened(ObservedRun(None, manifest_of(federation, recipe, execution, {}), [])),
        closing(rounds(federation, engine, execution.device, last=stop.round, kernels=execution.kernels)) as stream,
    ):
        for round in stream:
            by_round[round.t] = row = row_of(round)
            observers(round, row)
            if stop.reason(row, federation.metrics):
                break
    assert round is not None
    rows = [by_round[t] for t in sorted(by_round)]
    return RunResult(None, summary_of(rows, federation, stop), rows, _deployed(federation, round.model))


def _deployed(federation: Federation, deployed: Params) -> nn.Module:
    model = federation.model()
    model.load_state_dict(model.state_dict() | deployed)
    return model.eval()


def _name_of(engine: Engine) -> str:
    """Return what run.json calls an engine that is made: the function that made it."""
    return getattr(engine, "__qualname__", type(engine).__name__).partition(".")[0]
