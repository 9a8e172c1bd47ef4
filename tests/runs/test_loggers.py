"""Loggers, by what the real libraries read back of them: every round once, whatever a run has been through."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

import fedsieve
from command_line import CommandLine
from fedsieve import InputError, MLflow, Round, TensorBoard, Trackio, WandB
from fedsieve.methods import FedAvg
from fedsieve.runs.callbacks import CallbackFailed, ObservedRun, RunLogger
from fedsieve.runs.loggers import LOGGER_KINDS, hyper_parameters, numbers_of
from run_directories import flat

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

Points = dict[str, list[tuple[int, float]]]
Read = Callable[[Path], Points]
RUN = flat(FedAvg(), 4)


def read_tensorboard(out: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def read_mlflow(out: Path) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fedsieve").experiment_id])  # and no other
    assert json.loads((out / "loggers.json").read_text())["mlflow"]["run_id"] == run.info.run_id
    assert run.data.params["lr"] == "0.1"
    assert run.info.run_name == out.name
    assert run.info.status == "FINISHED"
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: [(p.step, p.value) for p in history] for name, history in histories.items()}


def pieces(log: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB writes it, after 7 bytes of W&B's: blocks of 32 KiB, with headers of 7 bytes."""
    at, content = 7, b""
    while at + 7 <= len(log):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        size, kind = struct.unpack_from("<HB", log, at + 4)
        content += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield content
            content = b""


def read_wandb(out: Path) -> Points:
    from wandb.proto.wandb_internal_pb2 import Record

    points: Points = {}
    folders = sorted((out / "wandb").glob("offline-run-*"), key=lambda folder: (folder.stat().st_ctime_ns, folder))
    for file in [file for folder in folders for file in folder.glob("*.wandb")]:
        for content in pieces(file.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                assert record.run.run_id == json.loads((out / "loggers.json").read_text())["wandb"]["id"]
                assert json.loads({item.key: item.value_json for item in record.run.config.update}["lr"]) == 0.1
            items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    points.setdefault(name, []).append((int(items["_step"]), json.loads(value)))
    return points


def read_trackio(out: Path) -> Points:
    """In a process of its own: the library knows one folder."""
    name = json.loads((out / "loggers.json").read_text())["trackio"]["name"]
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S;"
        "print(json.dumps([S.get_logs('fedsieve', sys.argv[1]), S.get_run_config('fedsieve', sys.argv[1])]))"
    )
    said = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True).stdout
    rows, config = json.loads(said.splitlines()[-1])
    assert config["lr"] == 0.1
    points: Points = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "timestamp"):
                points.setdefault(key, []).append((row["step"], value))
    return points


READ: dict[str, Read] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
    "trackio": read_trackio,
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take it seconds to make."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(params=[*READ])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A logger that is installed, offline, with a place of its own for what it keeps."""
    pytest.importorskip(LOGGER_KINDS[request.param].package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    if request.param == "mlflow":
        shutil.copy(request.getfixturevalue("database"), tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if module := sys.modules.get("trackio"):
        for part in ("utils", "sqlite_storage"):
            monkeypatch.setattr(getattr(module, part), "TRACKIO_DIR", tmp_path / "trackio")
    return request.param


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def assert_logged(points: Points, rows: list[dict[str, Any]]) -> None:
    """Every number of every row is there once, and nothing else."""
    wanted: Points = {}
    for row in rows:
        for key, value in numbers_of(row).items():
            wanted.setdefault(key, []).append((row["round"], value))
    assert points.keys() == wanted.keys()
    for key, values in wanted.items():
        assert [t for t, _ in points[key]] == [t for t, _ in values], key
        assert [v for _, v in points[key]] == pytest.approx([v for _, v in values], rel=1e-6), key


def trip(round: Round) -> None:
    if round.t == 2:
        raise ValueError("no")


@pytest.mark.slow
def test_a_run_that_is_stopped_and_goes_on_is_logged_as_one(name: str, tmp_path: Path) -> None:
    out, kind = tmp_path / "run", LOGGER_KINDS[name]
    with pytest.raises(InputError, match="callback trip failed in round 2"):
        fedsieve.run(RUN, out, callbacks=[trip, kind()])  # the second round is on disk, and not logged
    fedsieve.run(RUN, out, resume=True, until=3, callbacks=[kind()])
    fedsieve.run(RUN, out, resume=True, callbacks=[kind()])
    fedsieve.run(RUN, out, resume=True, callbacks=[kind()])  # with nothing more to do
    points = READ[name](out)
    assert {"accuracy", "loss", "bytes_up", "multiply_adds", "density", "seconds"} <= {*points}
    assert {"kernels.dense", "kernels.sparse"} & {*points}  # whichever way a client trained
    assert_logged(points, rows_of(out))


@pytest.mark.slow
def test_a_logger_that_comes_later_gets_the_rounds_before(name: str, tmp_path: Path) -> None:
    fedsieve.run(RUN, tmp_path / "run", until=2)
    fedsieve.run(RUN, tmp_path / "run", resume=True, callbacks=[LOGGER_KINDS[name]()])
    assert_logged(READ[name](tmp_path / "run"), rows_of(tmp_path / "run"))


@pytest.mark.slow
def test_of_a_round_that_is_run_again_the_last_numbers_are_there_as_far_as_can_be(name: str, tmp_path: Path) -> None:
    logger, out = LOGGER_KINDS[name](), tmp_path / "run"
    out.mkdir()
    with logger.open(observed(out)):
        for t, accuracy in ((-1, 0.01), (0, 0.05), (1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35)):
            logger.log_row({"round": t, "accuracy": accuracy, "bytes_up": t})
        if name == "wandb":
            assert logger.run.summary["accuracy"] == 0.35  # type: ignore[attr-defined]
    first, second = [(2, 0.2), (3, 0.3)], [(2, 0.25), (3, 0.35)]
    points = {"tensorboard": second, "mlflow": [*first, *second]}.get(name, first)
    before = [(0, 0.05), (1, 0.1)] if name in ("wandb", "trackio") else [(-1, 0.01), (0, 0.05), (1, 0.1)]
    assert READ[name](out)["accuracy"] == [(t, pytest.approx(value)) for t, value in [*before, *points]]
    if name == "mlflow":
        from mlflow import MlflowClient

        assert MlflowClient().get_run(logger.id).data.metrics["accuracy"] == 0.35  # type: ignore[attr-defined]


def observed(out: Path) -> ObservedRun:
    how = dict.fromkeys(("recipe", "engine", "device", "kernels", "version"), "x")
    return ObservedRun(out, {**how, "method": "fedavg", "run": {"lr": 0.1, "task": {"tiers": [1.0]}}}, [])


def test_the_settings_are_hyper_parameters(tmp_path: Path) -> None:
    assert hyper_parameters(observed(tmp_path))["task.tiers"] == [1.0]
    pytest.importorskip("tensorboard")
    with TensorBoard().open(observed(tmp_path)):
        pass
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    params = HParamsPluginData.FromString(content).session_start_info.hparams
    assert params["lr"].number_value == 0.1


def test_numbers_are_finite_and_parts_have_dotted_names() -> None:
    row = {"round": 3, "accuracy": None, "loss": float("nan"), "kernels": {"sparse": 2}, "clients": [1], "ok": True}
    assert numbers_of(row | {"refused": [{"client": 1}], "why": "text"}) == {"kernels.sparse": 2, "refused": 1}


def test_from_the_command_line(tmp_path: Path, fedsieve: CommandLine) -> None:
    pytest.importorskip("tensorboard")
    words = ("-s", "rounds=2", "-s", "task.test_limit=20", "--log", "tensorboard", "--out", "out")
    fedsieve("run", "fedavg.digits", *words, "--until", "1")
    fedsieve("run", "fedavg.digits", *words, "--resume")
    assert_logged(read_tensorboard(tmp_path / "out"), rows_of(tmp_path / "out"))
    said = fedsieve("run", "fedavg.digits", "--log", "tensorboard", "--log", "aim", "--out", "other", code=2).stderr
    assert said == "fedsieve: unknown logger 'aim'; the loggers are tensorboard, wandb, mlflow, trackio\n"
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", LOGGER_KINDS.values(), ids=[*LOGGER_KINDS])
@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)], ids=["nothing", "a folder"])
def test_what_is_not_installed_is_one_line_before_any_work(
    kind: type[RunLogger], spec: ModuleSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsieve.runs.loggers.find_spec", lambda name: spec)
    name = kind.package  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=f"^the logger {name} needs a package: pip install {name}$"):
        fedsieve.run(RUN, tmp_path / "run", callbacks=[kind()])
    assert not (tmp_path / "run").exists()


def test_tensorboard_without_a_directory_needs_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(InputError, match=r"name out=, or TensorBoard\(folder\)"):
        fedsieve.run(RUN, callbacks=[TensorBoard()])
    fedsieve.run(RUN, until=1, callbacks=[TensorBoard(tmp_path)])
    assert [path.name[:7] for path in tmp_path.iterdir()] == ["fedavg-"]


class Closed(RunLogger):
    def check(self, folder: Path | None) -> None:
        pass

    def open(self, run: ObservedRun) -> Any:
        raise ConnectionError("no network")

    def log_row(self, row: Any) -> None:
        raise AssertionError


def test_a_logger_that_does_not_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"logger Closed does not start \(ConnectionError: no network\): leave it out"):
        fedsieve.run(RUN, tmp_path / "a", callbacks=[Closed()])
    with pytest.warns(CallbackFailed, match="logger Closed does not start .*; the run goes on without it"):
        assert len(fedsieve.run(RUN, tmp_path / "b", callbacks=[Closed()], on_error="warn").rows) == 4


def test_all_loggers_can_be_given_options() -> None:
    assert WandB("mine", group="a").options == {"project": "mine", "group": "a"}
    assert Trackio("mine").options["project"] == "mine"
    assert MLflow("mine", "sqlite:///x.db").experiment == "mine"
