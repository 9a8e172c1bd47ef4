"""Flower's own processes: Ray, and SuperLinks with SuperNodes; the same bits as ``local``, whatever is killed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import equal

import faulty_recipe
from fedsieve import local
from fedsieve.engine.engines import Engine, Exchange
from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import rounds
from fedsieve.engine.rollback import Memory
from fedsieve.engine.round import Failure
from fedsieve.engine.setup import open_run
from fedsieve.flower.app.guard import alive, descendants
from fedsieve.flower.app.superlink import script
from fedsieve.recipes import load_recipe
from fedsieve.types import flatten
from supernodes import Machines, deployment, rows, three_machines

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
RECIPE = f"{faulty_recipe.__file__}:recipe"


def app(folder: Path, recipe: str, *options: str) -> Path:
    """Write an app, and return its folder."""
    made = folder / "app"
    subprocess.run(
        [script("fedsieve"), "flower", "app", recipe, str(made), "--out", str(folder / "run"), *options], check=True
    )
    return made


def without(lost: Mapping[tuple[int, int], str]) -> Engine:
    """Return ``local``, but for the answers that were lost: those clients may have trained, which nobody heard."""

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        with local()(federation, memory) as exchange:

            def some(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes | Failure]]:
                sent = {client: messages[client] for client in messages if (t, client) not in lost}
                answers = dict(exchange(t, sent))
                return [(client, answers.get(client) or Failure(lost[t, client])) for client in messages]

            yield some

    return engine


def assert_same_run(federation: Federation, out: Path) -> None:
    """Hold a run directory against ``local`` without those clients that its rows name: rows, state, memories."""
    told = rows(out)
    lost = {(row["round"], one["client"]): one["reason"] for row in told for one in row["refused"]}
    done = [*rounds(federation, without(lost))]
    assert [row["round"] for row in told] == [r.t for r in done]
    for row, round in zip(told, done, strict=True):
        for name in ("accuracy", "density", "bytes_up", "bytes_down", "multiply_adds", "loss", "steps"):
            assert row[name] == (round.metrics[name] if name == "loss" else getattr(round, name)), (row["round"], name)
    states = load_file(out / "checkpoints" / f"{done[-1].t:06d}.safetensors")
    for name, value in flatten(done[-1].state).items():
        assert equal(states[f"state/{name}"], value), name
    model = load_file(out / "model.safetensors")
    assert all(equal(model[name], value) for name, value in done[-1].model.items())


def faults(folder: Path, federation: Federation, *wanted: tuple[int, int, str]) -> dict[str, str]:
    """Prepare faults (round, client, how); return the environment that makes clients meet them."""
    (folder / "faults").mkdir()
    marks = faulty_recipe.marks(federation)
    for t, client, how in wanted:
        (folder / "faults" / f"{t}-{marks[client]}").write_text(how)
    return {"FEDSIEVE_FAULTS": str(folder / "faults")}


def test_a_run_on_ray_is_locals_though_its_clients_fail_and_it_is_killed(tmp_path: Path) -> None:
    federation, out = open_run(faulty_recipe.recipe()), tmp_path / "run"
    environment = os.environ | faults(tmp_path, federation, *((2, client, "raise") for client in range(3)))
    command = [script("fedsieve"), "run", RECIPE, "--engine", "flower:2", "--out", str(out)]

    failed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith(
        "fedsieve: round 2: 0 of 3 clients answered in 3 attempts, 2 are needed (client 0: OSError: the disk is gone)"
    )
    assert [row["round"] for row in rows(out)] == [1]

    for fault in (tmp_path / "faults").iterdir():
        fault.unlink()
    (tmp_path / "faults" / f"2-{faulty_recipe.marks(federation)[0]}").write_text("die")
    killed = subprocess.Popen([*command, "--resume"], env=environment)
    while len(rows(out)) < 3:
        assert killed.poll() is None
        time.sleep(0.05)
    below = descendants(killed.pid)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    end = time.monotonic() + 30
    while any(map(alive, below)):
        assert time.monotonic() < end, "processes outlive the run"
        time.sleep(0.2)

    subprocess.run([*command, "--resume"], env=environment, check=True)
    lost = [(row["round"], one["client"]) for row in rows(out) for one in row["refused"]]
    assert lost == [(2, 0)], "a worker that died is started anew: nobody else is lost"
    assert_same_run(federation, out)
    assert any(name.startswith("memory/") for name in load_file(out / "checkpoints/000005.safetensors"))


def test_clients_that_fail_are_lost_and_a_killed_server_goes_on(tmp_path: Path) -> None:
    federation, out = open_run(faulty_recipe.recipe()), tmp_path / "run"
    made = app(tmp_path, RECIPE, "--min-clients", "1")
    met = faults(tmp_path, federation, (1, 1, "raise"), (2, 1, "die"), (2, 2, "sleep"))
    with deployment(tmp_path / "flower", **met) as it:
        for client in range(3):
            it.supernode(f"node {client}", f"partition-id={client}")
        it.run(made)
        it.wait(lambda: len([*(tmp_path / "faults").glob("2-*.met")]) == 2, "both faults", 120)
        it.kill("node 2")
        it.wait(lambda: len(rows(out)) >= 3, "round 3", 150)
        it.kill("superlink")
        for name in ("node 0", "node 1"):
            it.kill(name)
        assert len(rows(out)) < 5

        it.superlink()
        for client in range(3):
            it.supernode(f"node {client}", f"partition-id={client}")
        it.finished(it.run(made, resume=True), out, 150)
    told = {(row["round"], one["client"]): one["reason"] for row in rows(out) for one in row["refused"]}
    assert told[1, 1] == "OSError: the disk is gone"
    assert "stopped responding" in told[2, 1]
    assert "failed to report a heartbeat" in told[2, 2]
    assert told[3, 2] == "its SuperNode is not connected"
    assert {client for t, client in told if t >= 4} <= {2}
    assert_same_run(federation, out)


@pytest.fixture(params=["namespaces", "loopback"])
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    """Three machines; processes of one, which shares its network, only where namespaces cannot be made."""
    with three_machines() as found:
        if (found is None) == (request.param == "namespaces"):
            pytest.skip("no network namespaces can be made here" if found is None else "namespaces can be made here")
        yield found or Machines("127.0.0.1", ([], [], []))


def keys(folder: Path, host: str) -> Path:
    """Make a CA, certificates and keys."""
    script = Path(__file__).parents[2] / "scripts/keys"
    subprocess.run([script, folder, host, "3"], check=True, capture_output=True)
    return folder


def trust(ca: Path, key: Path | None = None) -> list[str]:
    """Return the options of a SuperNode that trusts a CA and has a key."""
    return ["--root-certificates", f"{ca}/ca.crt", *(["--auth-supernode-private-key", str(key)] if key else [])]


@pytest.mark.skipif(not (which("openssl") and which("ssh-keygen")), reason="needs openssl and ssh-keygen")
def test_with_tls_only_registered_nodes_get_a_model_and_all_keep_their_data(tmp_path: Path, machines: Machines) -> None:
    """Nodes 0 and 1 train on files of their own; nobody else gets anything; Flower counts the bytes that we count."""
    settings = ["task.clients=2", "per_round=2", "rounds=3"]
    federation, out = open_run(load_recipe("fedavg.digits", settings)), tmp_path / "run"
    options = [part for setting in settings for part in ("-s", setting)]
    folder = app(tmp_path, "fedavg.digits", *options, "--own-data")
    ours, foreign = (keys(tmp_path / name, machines.server) for name in ("keys", "foreign"))
    with deployment(tmp_path / "flower", ours, machines) as it:
        for client in range(2):
            assert it.flwr("supernode", "register", str(ours / f"node_{client}.pub"), "here")["success"]
        strangers = {
            "no key": trust(ours),
            "unregistered key": trust(ours, ours / "node_2"),
            "foreign CA": trust(foreign, ours / "node_0"),
            "no TLS": ["--insecure"],
        }
        for name, secure in strangers.items():
            it.supernode(name, 'partition-id=0 data="/nothing"', *secure)
        run = it.run(folder)
        for name in ("no key", "unregistered key", "foreign CA"):
            it.wait(lambda name=name: it.processes[name].poll() is not None, f"the end of {name}", 60)  # type: ignore[misc]
            assert "Exit Code: 305" in it.log(name)
        it.wait(lambda: "Connection attempt failed" in it.log("no TLS"), "the refusal", 30)
        assert rows(out) == []
        for client in range(2):
            data = federation.dataset.train.subset(federation.shards[client])
            np.savez(tmp_path / f"own {client}.npz", x=data.x.numpy(), y=data.y.numpy())
            it.supernode(
                f"node {client}",
                f'partition-id={client} data="{tmp_path}/own {client}.npz"',
                *trust(ours, ours / f"node_{client}"),
                machine=1 + client,
            )
        told = it.finished(run, out, 150)
        assert told["status"] == "finished:completed"
        assert not any("Receiving" in it.log(name) for name in strangers)
    assert_same_run(federation, out)
    assert sum(map(sum, json.loads((out / "partition.json").read_text())["counts"])) == 0
    near(told["network-traffic"]["inbound-bytes"], sum(row["bytes_up"] for row in rows(out)))
    near(told["network-traffic"]["outbound-bytes"], sum(row["bytes_down"] for row in rows(out)))


def near(flowers: int, ours: int) -> None:
    """Hold what Flower counts on the wire against what we count: no less, and at most 3 % more."""
    assert ours <= flowers <= 1.03 * ours, (flowers, ours, flowers / ours)
