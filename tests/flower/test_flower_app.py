"""The Flower app: what is written, what it is told, and a SuperNode's own examples."""

import io
import json
import re
import shlex
import tomllib
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.cli.constant import DEFAULT_FLOWER_CONFIG_TOML
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from fedsieve import cli
from fedsieve.engine.messages import Messages
from fedsieve.flower.app import simulation as simulation
from fedsieve.flower.app import superlink
from fedsieve.flower.app.client import InputSpec, load_local_data, worker_for
from fedsieve.flower.app.project import AppConfig, message_key, read_config, write_app
from fedsieve.flower.app.server import run_name, server_federation
from fedsieve.flower.app.superlink import unproxied
from fedsieve.flower.engine import NodeContext
from fedsieve.runs.recorder import inputs_of
from fedsieve.types import InputError
from fedsieve.wire import WireError

DEPLOY = (Path(__file__).parents[2] / "docs/how-to/deploy.md").read_text()
DIGITS = InputSpec(tuple("0123456789"), (1, 8, 8), (0.0,), (1.0,))


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # Flower's
def test_a_written_app_is_one_of_flowers(tmp_path: Path) -> None:
    config = AppConfig(recipe="zerofl.digits", settings="rounds=3", out=str(tmp_path / "run"), min_clients=2)
    write_app(tmp_path / "app", config)
    project, warnings = load_and_validate(tmp_path / "app/pyproject.toml")
    assert not warnings
    assert read_config(project["tool"]["flwr"]["app"]["config"]) == config
    fab = build_fab_from_disk(tmp_path / "app")
    names = zipfile.ZipFile(io.BytesIO(fab)).namelist()
    assert {"pyproject.toml", "LICENSE", "fedsieve_app/server_app.py", "fedsieve_app/client_app.py"} <= {*names}
    assert all(len(p.read_text().splitlines()) < 10 for p in (tmp_path / "app/fedsieve_app").glob("*.py"))


def test_the_command_writes_an_app_with_a_recipe_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path(__file__).parents[1] / "faulty_recipe.py"
    options = ["-s", "rounds=2", "-s", "method.policy=conv?, fc1", "--own-data", "--round-timeout", "60"]
    done = CliRunner().invoke(cli.app, ["flower", "app", f"{recipe}:recipe", str(tmp_path / "app"), *options])
    assert done.exit_code == 0, done.output
    config = tomllib.loads((tmp_path / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config = read_config(config)
    assert config.recipe == "faulty_recipe.py:recipe"
    assert (config.own_data, config.round_timeout, config.out) == (True, 60.0, str(tmp_path / "app/run"))
    assert (tmp_path / "app/fedsieve_app/faulty_recipe.py").read_text() == recipe.read_text()
    run = replace(config, recipe=f"{recipe}:recipe").run(tmp_path)
    assert (run.rounds, run.method.policy) == (2, "conv?, fc1")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["zerofl.digitz"], "unknown recipe"),
        (["zerofl.digits", "-s", "round=3"], "unknown field 'round'"),
        (["zerofl.digits", "--round-timeout", "0"], "round_timeout must be"),
        (["zerofl.digits", "--min-clients", "6"], "min_clients is 6 but a round has 5 clients: lower it"),
        (["zerofl.digits", "--kernels", "fast"], "fast"),
        (["zerofl.digits", "--measure", "all"], "all"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(arguments: list[str], line: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["flower", "app", arguments[0], str(tmp_path / "app"), *arguments[1:]])
    assert isinstance(done.exception, InputError)
    assert line in str(done.exception)
    assert not (tmp_path / "app").exists()


def test_an_app_does_not_go_where_something_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match="is there already: name a new folder"):
        write_app(tmp_path, AppConfig(recipe="zerofl.digits"))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({}, "-c recipe must be text"),
        ({"recipe": "a", "min-clients": "3"}, "-c min-clients must be a whole number, got '3'"),
        ({"recipe": "a", "min-clients": True}, "-c min-clients must be a whole number"),
        ({"recipe": "a", "until": True}, "-c until must be text, got True"),
        ({"recipe": "a", "resume": 1}, "-c resume must be true or false"),
        ({"recipe": "a", "round-timeout": "long"}, "-c round-timeout must be a number"),
        ({"recipe": "a", "until": -1}, "until must be a round, or COLUMN>=NUMBER .*, got -1"),
    ],
)
def test_settings_of_a_wrong_kind_are_named(config: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        read_config(config)


def test_messages_are_sealed_with_the_environments_key_but_in_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDSIEVE_KEY", "FEDSIEVE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert message_key(b"s" * 32) == b"s" * 32
    with pytest.raises(InputError, match="no key: set FEDSIEVE_KEY"):
        message_key(None)
    monkeypatch.setenv("FEDSIEVE_KEY", "ab" * 32)
    assert message_key(None) == bytes.fromhex("ab" * 32)
    assert message_key(b"s" * 32) == b"s" * 32


def test_own_examples_are_read_from_every_form(tmp_path: Path) -> None:
    x, y = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.tensor([3, 1, 3, 0])
    np.savez(tmp_path / "own.npz", x=x.numpy(), y=y.numpy().astype(np.int32))
    save_file({"x": x, "y": y}, tmp_path / "own.safetensors")
    for name in ("own.npz", "own.safetensors"):
        data = load_local_data(tmp_path / name, DIGITS)
        assert torch.equal(data.x, x)
        assert torch.equal(data.y, y)
    for i in (3, 0, 1):
        folder = tmp_path / "pictures" / str(y[i].item())
        folder.mkdir(parents=True)
        Image.fromarray(x[i, 0].numpy()).save(folder / f"{i}.png")
    data = load_local_data(tmp_path / "pictures", DIGITS)
    assert data.y.tolist() == [0, 1, 3]
    torch.testing.assert_close(data.x, x[[3, 1, 0]].float() / 255)


@pytest.mark.parametrize(
    ("x", "y", "line"),
    [
        (np.zeros((3, 8, 8), np.uint8), np.zeros(3, int), "x must be uint8 or float32 of shape"),
        (np.zeros((3, 1, 8, 8)), np.zeros(3, int), "x must be uint8 or float32 of shape"),
        (np.zeros((3, 1, 8, 8), np.uint8), np.zeros(2, int), "y must hold a whole number for each of the 3"),
        (np.full((3, 1, 8, 8), np.nan, np.float32), np.zeros(3, int), "x holds NaN or infinity"),
        (np.full((3, 1, 8, 8), np.inf, np.float32), np.zeros(3, int), "x holds NaN or infinity"),
        *(
            (np.zeros((3, 1, 8, 8), np.uint8), np.zeros(3, kind), f"y must hold whole numbers, .* not torch.{kind}")
            for kind in ("float64", "complex64", "uint16", "bool")
        ),
        (np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, int), "at least one"),
        (np.zeros((3, 1, 8, 8), np.uint8), np.full(3, 10), "y must be from 0 to 9, it is 10 to 10"),
        (np.zeros((3, 1, 8, 8), np.uint8), np.array(["a"] * 3), "cannot be read"),
    ],
)
def test_own_examples_that_do_not_fit_are_named(x: Any, y: Any, line: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=x, y=y)
    with pytest.raises(InputError, match=line):
        load_local_data(tmp_path / "own.npz", DIGITS)


def test_places_without_examples_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is nothing; name a"):
        load_local_data(tmp_path / "x.npz", DIGITS)
    (tmp_path / "x.txt").write_text("1")
    with pytest.raises(InputError, match="is of no known form"):
        load_local_data(tmp_path / "x.txt", DIGITS)
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        load_local_data(tmp_path / "x.npz", DIGITS)
    (tmp_path / "pictures/3").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no picture"):
        load_local_data(tmp_path / "pictures", DIGITS)
    (tmp_path / "pictures/cat").mkdir()
    with pytest.raises(InputError, match="cat is no class"):
        load_local_data(tmp_path / "pictures", DIGITS)


def test_a_supernode_and_the_run_must_agree_on_whose_data_it_is(tmp_path: Path) -> None:
    config = AppConfig(recipe="fedavg.digits", settings="task.clients=2 per_round=2")
    mine, its = replace(config, own_data=True).run_config(), config.run_config()
    cases: list[tuple[dict[str, Any], dict[str, Any], bytes | None, str]] = [
        (mine, {"partition-id": 0}, None, "the run is on the SuperNodes' own data"),
        (its, {"partition-id": 0, "data": "/x"}, None, "has data of its own, which the run is not on"),
        (mine, {"data": "/x"}, None, "needs a partition-id= as well"),
        (mine, {}, b"k" * 32, "a simulation has no data but the recipe's"),
    ]
    for config, node, key, line in cases:
        with pytest.raises(InputError, match=line):
            worker_for(tmp_path, NodeContext(config, node, {}, key))


def test_a_server_of_nodes_with_data_of_their_own_holds_none(tmp_path: Path) -> None:
    federation = server_federation(AppConfig(recipe="fedavg.digits", own_data=True), tmp_path)
    assert [federation.examples(c) for c in range(20)] == [0] * 20
    with pytest.raises(InputError, match="leave it out"):
        server_federation(AppConfig(recipe="fedavg.digits", own_data=True, measure="kernels"), tmp_path)


def test_server_and_supernodes_bind_messages_to_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each computes the fingerprint of its own settings; the name is the server's, and with data of their own too."""
    monkeypatch.setenv("FEDSIEVE_KEY", "ab" * 32)
    np.savez(tmp_path / "own.npz", x=np.zeros((3, 1, 8, 8), np.float32), y=np.arange(3))
    for own in (False, True):
        config = AppConfig(recipe="fedavg.digits", settings="task.clients=2 per_round=2", own_data=own)
        node = {"partition-id": 1} | ({"data": str(tmp_path / "own.npz")} if own else {})
        federation = replace(server_federation(config, tmp_path), key=bytes.fromhex("ab" * 32), name=run_name(tmp_path))
        about = {"run": federation.name, "inputs": json.dumps(inputs_of(federation.dataset))}
        node = NodeContext(config.run_config(), node, about, None)
        params = federation.run.method.init(federation.model(), torch.Generator()).params
        outgoing = Messages(federation).broadcast(1, {1: 0}, {0: params})
        worker = worker_for(tmp_path, node)
        assert worker.decode(1, 1, outgoing[1]).keys() == params.keys()
        assert worker.federation.examples(1) == (3 if own else len(federation.shards[1]))
        assert len(worker.federation.shards[1]) == worker.federation.examples(1)
        for other in (
            replace(node, about={**about, "run": "cd" * 16}),
            replace(node, config=replace(config, settings=f"{config.settings} lr=0.5").run_config()),
        ):
            with pytest.raises(WireError, match="the seal does not fit"):
                worker_for(tmp_path, other).decode(1, 1, outgoing[1])


def test_a_run_keeps_its_name(tmp_path: Path) -> None:
    first = run_name(tmp_path)
    assert first != run_name(tmp_path)
    damaged = {"{": "is not a JSON object", '{"run": "../x"}': "is damaged"}
    for there, line in ((json.dumps({"run": first}), None), *damaged.items()):
        (tmp_path / "flower.json").write_text(there)
        if line is None:
            assert run_name(tmp_path) == first
        else:
            with pytest.raises(InputError, match=line):
                run_name(tmp_path)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--engine", "flower:0"], "unknown engine 'flower:0'"),
        (["--engine", "flower:x"], "unknown engine 'flower:x'"),
        (["--engine", "flower", "--device", "cuda"], "computes on the CPU"),
        (["--engine", "flower", "--round-timeout", "-1"], "round_timeout must be"),
        (["--engine", "flower", "--round-timeout", "inf"], "round_timeout must be"),
        (["--min-clients", "2"], "are for --engine flower"),
        (["--engine", "flower", "--min-clients", "6"], "min_clients is 6 but a round has 5 clients: lower it"),
        (["--engine", "pool:2", "--round-timeout", "9"], "are for --engine flower"),
    ],
)
def test_engines_that_are_none_are_named(options: list[str], line: str) -> None:
    done = CliRunner().invoke(cli.app, ["run", "fedavg.digits", *options])
    assert isinstance(done.exception, InputError)
    assert line in str(done.exception)


class Deaf:
    """A SuperLink at work that answers the questions of the numbers given, counted from 1."""

    def __init__(self, log: Path, *answers: int, status: str = "running"):
        self.log, self.answers, self.status, self.asked, self.process = log, answers, status, 0, self
        log.write_text("busy\n")

    def poll(self) -> None:
        """It is alive."""

    def flwr(self, *arguments: str, seconds: float) -> dict[str, Any]:
        self.asked += 1
        if self.asked not in self.answers:
            raise InputError("no answer")
        return {"runs": [{"run-id": 7, "status": self.status}]}


def test_a_superlink_may_be_silent_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "ASK", 0.0)
    monkeypatch.setattr(simulation, "LOOK", 0.0)
    link: Any = Deaf(tmp_path / "log", simulation.SILENT)
    with pytest.raises(InputError, match=f"has not answered {simulation.SILENT} times in a row: busy"):
        [*simulation._followed(tmp_path, link, "7", tmp_path / "ended", -1)]
    assert link.asked == 2 * simulation.SILENT
    link = Deaf(tmp_path / "log", 2, status="finished:failed")
    with pytest.raises(InputError, match=re.escape("ended (finished:failed) without a word: busy")):
        [*simulation._followed(tmp_path, link, "7", tmp_path / "ended", -1)]
    assert link.asked == 2


def test_a_question_to_flower_has_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps = tmp_path / "flwr"
    sleeps.write_text("#!/bin/sh\nsleep 60\n")
    sleeps.chmod(0o755)
    (tmp_path / "superlink.log").write_text("at work\n")
    monkeypatch.setattr(superlink, "script", lambda name: str(tmp_path / name))
    link = superlink.SuperLink(tmp_path, {}, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"flwr list gave no answer in 0\.2 s: at work"):
        link.flwr("list", seconds=0.2)


def test_the_pages_next_run_keeps_the_settings_of_its_first() -> None:
    first = re.search(r"^fedsieve flower app (?:.*\\\n)*.*$", DEPLOY, re.M)
    again = re.search(r"""flwr run myapp here -c '.*settings="([^"]*)""", DEPLOY)
    assert first
    assert again
    words = shlex.split(first[0])
    given = [after for option, after in pairwise(words) if option == "-s"]
    assert [one.partition("=")[0] for one in given] == [one.partition("=")[0] for one in again[1].split()]


@pytest.mark.parametrize("own", ["", DEFAULT_FLOWER_CONFIG_TOML])
def test_the_pages_connection_leaves_the_readers_own_as_they_are(own: str) -> None:
    added = re.search(r"cat >> ~/.flwr/config.toml <<EOF\n(.*?)^EOF$", DEPLOY, re.M | re.S)
    assert added
    before, after = tomllib.loads(own), tomllib.loads(own + added[1])
    assert after["superlink"].pop("here")["address"] == "localhost:8000"
    assert after["superlink"] == before.get("superlink", {})


def test_flowers_processes_reach_loopback_without_a_proxy() -> None:
    loopback = "127.0.0.1,localhost"
    assert unproxied({"NO_PROXY": "example.org"}) == {"NO_PROXY": f"example.org,{loopback}", "no_proxy": loopback}


def test_a_recipe_that_bundles_leave_out_leaves_no_half_written_app(tmp_path: Path) -> None:
    for name in ("test_mine.py", "mine_test.py", "server_app.py"):
        with pytest.raises(InputError, match=f"need the name {name} or leave it out"):
            write_app(tmp_path / "app", AppConfig(recipe=f"{tmp_path}/{name}:recipe"))
        assert not (tmp_path / "app").exists()


@pytest.mark.parametrize(("address", "used"), [("", "local"), ("head:6379", "head:6379")])
def test_a_simulation_joins_a_cluster_only_if_it_is_named(
    address: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray by itself joins any cluster whose address lies about on the machine, be it gone or not."""
    given: list[Any] = []

    def started(home: Path, environment: Any) -> Any:
        given.append(environment["RAY_ADDRESS"])
        raise InputError("that is all")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(simulation, "superlink", started)
    with pytest.raises(InputError, match="that is all"):
        next(simulation.simulate(AppConfig(recipe="fedavg.digits", out=str(tmp_path / "run")), 2, 2))
    assert given == [used]
