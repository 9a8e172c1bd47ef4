"""Loggers: a run's numbers, round by round, in TensorBoard, Weights & Biases, MLflow or Trackio (``--log``).

What is logged is every number of a row: metrics, bytes, multiply-adds, density, seconds; and the settings, as
hyper-parameters. ``loggers.json`` in the run directory holds the ids by which a resumed run goes on with the same
logger's run. A round is logged once: those that are there are not logged again, and those that are missing are.
Of a round that is run again, after the run has gone back over it, TensorBoard keeps the last numbers alone; MLflow has
both, the last as the metric's value; Weights & Biases the last in its summary, the first in its charts; Trackio the
first.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from fedsieve.data.storage import read_json, write_json
from fedsieve.runs.callbacks import ObservedRun, RunLogger
from fedsieve.runs.record import LOGGERS, PUT_BACK, flatten_settings
from fedsieve.types import InputError

PROJECT = "fedsieve"
"""The project, or experiment, that runs are filed under where none is named."""
NEVER = -(2**31)
"""Before any round."""
FLUSH = "x_transaction_log_flush_interval"
"""W&B's setting of the seconds after which its log is written; what is later is lost to ``kill -9``, 15 s by itself."""
BATCH = 100
"""The parameters that MLflow takes at once."""


class _Tracker(RunLogger):
    """What all loggers share: which rounds are logged, and whether the package is there."""

    name: ClassVar[str]
    """By which ``--log`` knows it."""
    package: ClassVar[str]
    last: int = NEVER
    """The last round that is logged."""

    def check(self, folder: Path | None) -> None:
        """Raise InputError if its package is not installed."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:  # a folder of that name, as wandb makes one, is no package
            raise InputError(f"the logger {self.name} needs a package: pip install {self.package}")

    @contextmanager
    def open(self, run: ObservedRun) -> Iterator[None]:
        """Begin, or go on, and log the rows that are missing; the end tells whether an error has ended the run."""
        path = run.folder / LOGGERS if run.folder else None
        known = (read_json(path, PUT_BACK) or {}) if path else {}
        before = known.get(self.name)
        ids = self._begin(run, before if isinstance(before, dict) else {})
        if path:
            write_json(path, known | {self.name: ids})
        failed = False
        try:
            for row in run.rows:
                if row["round"] > self.last:
                    self.log_row(row)
            yield
        except Exception:
            failed = True
            raise
        finally:  # also of a run that is stopped, to go on later
            self._end(failed)
            if path:
                write_json(path, (read_json(path, PUT_BACK) or {}) | {self.name: ids | {"last": self.last}})

    def log_row(self, row: Mapping[str, Any]) -> None:
        """Log the row of a round."""
        t = int(row["round"])
        if t > self.last:
            self._log(t, numbers_of(row))
            self.last = t
        else:
            self._log_again(t, numbers_of(row))

    @abstractmethod
    def _begin(self, run: ObservedRun, ids: dict[str, Any]) -> dict[str, Any]:
        """Begin a run, or go on with the one that ``ids`` name; set ``last``, and return the ids.

        The ``last`` of ``ids`` is missing after a crash.
        """

    @abstractmethod
    def _log(self, t: int, numbers: dict[str, float]) -> None: ...

    @abstractmethod
    def _end(self, failed: bool) -> None: ...

    def _log_again(self, t: int, numbers: dict[str, float]) -> None:
        """Log a round that the run has gone back over, as far as the library can."""


class TensorBoard(_Tracker):
    """Event files in ``tensorboard/`` of the run directory, or in a folder of the run's name below ``folder``."""

    name, package = "tensorboard", "tensorboard"

    def __init__(self, folder: Path | str | None = None):
        self.folder = None if folder is None else Path(folder)

    def check(self, folder: Path | None) -> None:
        """Raise InputError if the package is not installed, or there is no place for the files."""
        super().check(folder)
        if folder is None and self.folder is None:
            raise InputError("the logger tensorboard writes into a run's directory: name out=, or TensorBoard(folder)")

    def _begin(self, run: ObservedRun, ids: dict[str, Any]) -> dict[str, Any]:
        name = logged_name(run, ids)
        self.path = self.folder / name if self.folder else Path(run.folder or "") / "tensorboard"
        there = any(self.path.glob("events.*"))
        self.last = run.rows[-1]["round"] - 1 if there and run.rows else NEVER  # the last one may be torn off
        self._write_from(self.last + 1 if there else None)
        if self.last == NEVER:
            summary = import_module("torch.utils.tensorboard.summary")
            settings = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in hyper_parameters(run).items()}
            for part in summary.hparams(settings, {"accuracy": 0.0, "bytes_up": 0.0}):
                self.writer._get_file_writer().add_summary(part)
        return {"name": name}

    def _write_from(self, purge: int | None) -> None:
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(str(self.path), purge_step=purge)

    def _log_again(self, t: int, numbers: dict[str, float]) -> None:
        self.writer.close()
        self._write_from(t)
        self._log(t, numbers)
        self.last = t

    def _log(self, t: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, t)
        self.writer.flush()

    def _end(self, failed: bool) -> None:
        self.writer.close()


class WandB(_Tracker):
    """A run of Weights & Biases, under ``project``; ``options`` are those of ``wandb.init``."""

    name, package = "wandb", "wandb"

    def __init__(self, project: str = PROJECT, **options: Any):
        self.options = {"project": project, **options}

    def _begin(self, run: ObservedRun, ids: dict[str, Any]) -> dict[str, Any]:
        self.last = ids.get("last", run.rows[-1]["round"]) if ids and run.rows else -1
        ids = {"id": ids.get("id") or secrets.token_hex(4), "name": logged_name(run, ids)}
        place: dict[str, Any] = {"dir": str(run.folder)} if run.folder else {}
        wandb = import_module("wandb")
        if FLUSH in wandb.Settings.model_fields:
            place["settings"] = {FLUSH: 1.0}
        self.run = wandb.init(
            id=ids["id"],
            name=ids["name"],
            resume="allow",
            reinit="create_new",
            config=hyper_parameters(run),
            **{**place, **self.options},
        )
        if self.run.starting_step:  # of a run that goes on at the server, which knows what came through before a crash
            self.last = self.run.starting_step - 1
        return ids

    def _log(self, t: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=t)

    def _log_again(self, t: int, numbers: dict[str, float]) -> None:
        self.run.summary.update(numbers)

    def _end(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow(_Tracker):
    """A run of MLflow, under ``experiment``, at ``tracking_uri`` or where MLFLOW_TRACKING_URI says."""

    name, package = "mlflow", "mlflow"

    def __init__(self, experiment: str = PROJECT, tracking_uri: str | None = None):
        self.experiment, self.tracking_uri = experiment, tracking_uri

    def _begin(self, run: ObservedRun, ids: dict[str, Any]) -> dict[str, Any]:
        mlflow = import_module("mlflow")
        self.entities, self.client = mlflow.entities, mlflow.MlflowClient(self.tracking_uri)
        if ids:
            self.id = ids["run_id"]
            self.client.update_run(self.id, status="RUNNING")
            history = self.client.get_metric_history(self.id, "bytes_up")
            self.last = max((point.step for point in history), default=NEVER)
            return {"run_id": self.id}
        experiment = self.client.get_experiment_by_name(self.experiment)
        place = experiment.experiment_id if experiment else self.client.create_experiment(self.experiment)
        self.id, self.last = self.client.create_run(place, run_name=logged_name(run, ids)).info.run_id, NEVER
        params = [self.entities.Param(_plain(k), str(v)[:6000]) for k, v in hyper_parameters(run).items()]
        for start in range(0, len(params), BATCH):
            self.client.log_batch(self.id, params=params[start : start + BATCH])
        return {"run_id": self.id}

    def _log(self, t: int, numbers: dict[str, float]) -> None:
        now = time.time_ns() // 10**6
        metrics = [self.entities.Metric(_plain(name), value, now, t) for name, value in numbers.items()]
        self.client.log_batch(self.id, metrics=metrics)

    _log_again = _log

    def _end(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class Trackio(_Tracker):
    """A run of Trackio, under ``project``; ``options`` are those of ``trackio.init``."""

    name, package = "trackio", "trackio"

    def __init__(self, project: str = PROJECT, **options: Any):
        self.options = {"project": project, **options}

    def _begin(self, run: ObservedRun, ids: dict[str, Any]) -> dict[str, Any]:
        name = ids.get("name") or f"{logged_name(run, ids)}-{secrets.token_hex(3)}"
        trackio = import_module("trackio")
        self.run = trackio.init(name=name, resume="allow", config=hyper_parameters(run), **self.options)
        self.last = self.run._next_step - 1  # nothing public tells it of a run on a server
        return {"name": name}

    def _log(self, t: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=t)

    def _end(self, failed: bool) -> None:
        self.run.finish()


LOGGER_KINDS: dict[str, type[_Tracker]] = {kind.name: kind for kind in (TensorBoard, WandB, MLflow, Trackio)}


def named_loggers(names: tuple[str, ...]) -> list[RunLogger]:
    """Return the loggers that ``--log`` names, each with its package's own settings. Raises InputError."""
    for name in names:
        if name not in LOGGER_KINDS:
            raise InputError(f"unknown logger {name!r}; the loggers are {', '.join(LOGGER_KINDS)}")
    return [LOGGER_KINDS[name]() for name in dict.fromkeys(names)]


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row by their names, those of its parts by dotted ones; how many were refused."""
    values = flatten_settings({**row, "refused": len(row.get("refused") or ())})
    plain = {name: v for name, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: v for name, v in plain.items() if name != "round" and math.isfinite(v)}


def hyper_parameters(run: ObservedRun) -> dict[str, Any]:
    """Return the settings of a run, and how it is executed, by dotted names."""
    how = {name: run.manifest[name] for name in ("recipe", "engine", "device", "kernels", "version")}
    return how | flatten_settings(run.manifest["run"])


def logged_name(run: ObservedRun, ids: Mapping[str, Any]) -> str:
    """Return what a logger calls the run: its directory's name, or without one the method's and a random number."""
    if known := ids.get("name"):
        return str(known)
    return run.folder.resolve().name if run.folder else f"{run.manifest['method']}-{secrets.token_hex(3)}"


def _plain(name: str) -> str:
    """Return a name as MLflow takes it."""
    return re.sub(r"[^\w\-. :/]", "_", name)
