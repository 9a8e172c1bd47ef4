"""How a run is executed: one dataclass, from which every way to start a run takes its options.

A new option touches three files at most: its field here, the code that it concerns, and a test. The commands' options
(``cli/commands.py``), a Flower app's run config (``flower/app/project.py``), the processes of a sweep and the page of
all settings are derived from the fields. PyTorch is imported when an execution is made, not for a page of help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from fedsieve.engine import Federation, Quorum, Run
    from fedsieve.runs.callbacks import RunLogger
    from fedsieve.runs.stopping import StopRule

Face: TypeAlias = Literal["run", "sweep", "flower"]
"""Who has an option: ``fedsieve run``, ``fedsieve sweep``; ``fedsieve flower app`` and the run config of its app."""
ALL: tuple[Face, ...] = ("run", "sweep", "flower")


def _option(default: Any, help: str, *faces: Face, command: Any = None) -> Any:
    """Return a field with the default that Python has, and the one of the ``command`` where it has another."""
    own = default if command is None else command
    return field(default=default, metadata={"help": help, "faces": faces, "default": own})


@dataclass(frozen=True)
class Execution:
    """How a run is executed. Its settings stay the same; ``kernels``, ``device`` and ``precision`` change its rounding.

    Every field is a text, a number or a flag, so that a command line, Flower's run config and JSON can hold it.
    """

    engine: str = _option(
        "local",
        "auto: a process for each core where a run lasts; local; pool:N, N processes; cohort:N, N clients at once "
        "on a GPU; flower:N, over Flower and Ray.",
        "run",
        command="auto",
    )
    device: str = _option("cpu", "cpu, cuda, cuda:N or, of several GPUs, cuda:0,1.", "run")
    precision: str = _option("fp32", "What PyTorch multiplies in on a GPU: fp32, tf32 or bf16.", "run")
    kernels: str = _option(
        "auto", "How clients train: auto, sparse or dense. `fedsieve run` goes on as a run was begun.", *ALL
    )
    measure: str = _option(
        "", "Further columns of the rows, by commas: clients, masks, pruned; of one run kernels.", *ALL
    )
    data: str = _option("", "Folder of the datasets, or hub. Default: FEDSIEVE_DATA.", *ALL)
    out: str = _option(
        "",
        "The directory of the run, on the server's machine, or of the sweep. Default: runs/RECIPE-NUMBER, "
        "sweeps/RECIPES-NUMBER; of an app DIR/run.",
        *ALL,
    )
    own_data: bool = _option(False, "Every SuperNode names data of its own, which the server does not see.", "flower")
    resume: bool = _option(False, "Go on after the last checkpoint.", "run", "flower")
    accept_changes: bool = _option(False, "Go on though the recipe's file, or what it imports, has changed.", *ALL)
    until: str = _option(
        "",
        "Stop after this round, or the first test with accuracy_validation>=.9 or the like; or either, by a comma.",
        *ALL,
    )
    log: str = _option("", "Log to tensorboard, wandb, mlflow or trackio; several by commas, or again.", *ALL)
    on_error: str = _option("stop", "What a run does when a callback or logger fails: stop, or warn.", *ALL)
    min_clients: int = _option(0, "Over Flower: answers that a round needs (0: half of its clients).", "run", "flower")
    round_timeout: float = _option(
        3600.0, "Over Flower: seconds after which a client is lost to its round.", "run", "flower"
    )

    def __post_init__(self) -> None:
        from fedsieve.engine.measures import check_measures
        from fedsieve.kernels.dispatch import check_choice
        from fedsieve.runs.callbacks import check_on_error

        check_choice(self.kernels)
        check_measures(self.measures)
        check_on_error(self.on_error)
        assert self.loggers is not None
        assert self.quorum
        assert self.stop_rule

    @property
    def measures(self) -> tuple[str, ...]:
        """The names that ``measure`` lists."""
        return _names(self.measure)

    @property
    def loggers(self) -> list[RunLogger]:
        """The loggers that ``log`` lists, new ones. Raises InputError."""
        from fedsieve.runs.loggers import named_loggers

        return named_loggers(_names(self.log))

    @property
    def quorum(self) -> Quorum:
        """How long a server waits for clients that may be lost. Raises InputError."""
        from fedsieve.engine import Quorum

        return Quorum(self.min_clients, self.round_timeout)

    @property
    def stop_rule(self) -> StopRule:
        """When the run ends before its last round: what ``until`` says. Raises InputError."""
        from fedsieve.runs.stopping import parse_stop_rule

        return parse_stop_rule(str(self.until))

    @property
    def root(self) -> Path | None:
        """The data folder; None where none is named. Raises InputError."""
        from fedsieve.data import root_from

        return root_from(self.data or None)

    def open(self, run: Run) -> Federation:
        """Return a run with its data. Raises InputError."""
        from fedsieve.engine import open_run

        return open_run(run, self.root, self.measures)

    def stopped(self, summary: Mapping[str, Any]) -> bool:
        """Tell whether a run with this summary has ended by a condition, and nothing else is asked for now."""
        why = summary.get("stopped_because")
        return bool(why) and (not self.until or why in {one.text for one in self.stop_rule.conditions})

    def last_round(self, run: Run) -> int:
        """Return the round that a run stops after at the latest."""
        return min(self.stop_rule.round or run.rounds, run.rounds)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def execution_options(face: Face) -> list[Field[Any]]:
    """Return the fields of ``Execution`` that ``face`` has as options; the type of each is its default's."""
    return [option for option in fields(Execution) if face in option.metadata["faces"]]
