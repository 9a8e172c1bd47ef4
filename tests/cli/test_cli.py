"""The command line as a person meets it: what runs, what is printed, and what every mistake says."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import CommandLine
from fedsieve import __version__
from fedsieve.engine import Quorum
from fedsieve.kernels import unavailable_reason
from fedsieve.runs.execution import Execution

MINE = """
from fedsieve import Run, Task
from fedsieve.methods import FedAvg
from tiny import TinyNet, blobs

def recipe():
    return Run(FedAvg(), Task(TinyNet, blobs, 6), rounds=2, per_round=2, batch=8)

def wrong():
    return Run(FedAvg(), Task(TinyNet, blobs, 6), rounds=0, per_round=2)

class Branching(TinyNet):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

def branching():
    return Run(FedAvg(), Task(Branching, blobs, 6), rounds=2, per_round=2, batch=8)

not_a_function = 3
"""


def process(*words: str, cwd: Path) -> str:
    """Return what a command printed that ran as a process of its own."""
    command = [Path(sys.executable).parent / "fedsieve", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


@pytest.mark.system
def test_a_run_from_start_to_report(tmp_path: Path) -> None:
    short = ("-s", "rounds=2", "-s", "evaluate_every=2")
    said = process("run", "zerofl.digits", *short, cwd=tmp_path)
    assert "round 1/2  accuracy      -  up" in said
    assert "round 2/2  accuracy" in said
    assert "by the paper's formula" in said
    process("run", "zerofl.digits", *short, "--until", "1", cwd=tmp_path)
    process("run", "zerofl.digits", *short, "--resume", "--engine", "pool:2", cwd=tmp_path)
    one, two = tmp_path / "runs/zerofl.digits-1", tmp_path / "runs/zerofl.digits-2"
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    rows = (two / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(row)["round"] for row in rows] == [1, 2]
    process("report", str(one), str(two), "-o", "page.html", cwd=tmp_path)
    assert "zerofl.digits" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_a_recipe_of_ones_own_stops_and_goes_on(tmp_path: Path, fedsieve: CommandLine) -> None:
    (tmp_path / "mine.py").write_text(f"import sys; sys.path.append({str(Path(__file__).parents[1])!r})\n{MINE}")
    fedsieve("run", "mine.py:recipe", "--until", "1")
    said = fedsieve("run", "mine.py:recipe", "--resume").stdout
    assert "round 1/2" not in said
    assert "round 2/2" in said
    rows = (tmp_path / "runs/mine.recipe-1/rounds.jsonl").read_text().splitlines()
    assert [json.loads(row)["round"] for row in rows] == [1, 2]


@pytest.mark.slow
def test_kernels_from_the_command_line(tmp_path: Path, fedsieve: CommandLine) -> None:
    short = ("pdst.digits", "-s", "rounds=2", "--out", "out")
    way = "dense" if unavailable_reason() else "sparse"
    said = fedsieve("run", *short, "--kernels", way, "--until", "1").stdout
    assert re.search(rf"kernels +{way} +[\d.]+ ms a step", said)
    said = fedsieve("run", *short, "--resume", "--kernels", "auto", code=2).stderr
    assert said == f"fedsieve: out was begun with --kernels {way}, not auto: go on so, or choose another --out\n"
    fedsieve("run", *short, "--resume")
    rows = [json.loads(row) for row in (tmp_path / "out/rounds.jsonl").read_text().splitlines()]
    assert [row["kernels"] for row in rows] == [{way: 5}, {way: 5}]
    said = fedsieve("run", "sparsefedpp.digits", "-s", "rounds=2", "-s", "method.a=1").stdout
    assert said.count("kernels: dense, because ") == 1
    assert "because" not in fedsieve("run", "fedavg.digits", "-s", "rounds=1", "--kernels", "dense").stdout
    if not unavailable_reason():
        said = fedsieve("run", "swat.digits", "-s", "rounds=1", "--measure", "kernels").stdout
        for way in ("sparse", "dense"):
            assert re.search(rf"{way} +[\d.]+ ms a step, peak memory \d+ MB", said)


@pytest.mark.system
def test_kernels_of_a_sweep(tmp_path: Path, fedsieve: CommandLine) -> None:
    sweep = ("sweep", "pdst.digits", "-s", "rounds=1", "--seeds", "1", "--out", "s")
    fedsieve(*sweep, "--kernels", "dense")
    said = fedsieve(*sweep, code=2).stderr
    assert said == "fedsieve: s holds another sweep (kernels dense there, auto here): choose another --out\n"
    (summary,) = tmp_path.glob("s/runs/*/summary.json")
    assert json.loads(summary.read_text())["kernels"] == {"dense": 5}


def test_the_lists(tmp_path: Path, fedsieve: CommandLine) -> None:
    said = fedsieve("list", "--data", str(tmp_path)).stdout
    for word in ("fedavg", "fedadam", "swat", "zerofl", "topk", "zerofl.digits", "speech_commands", "pool:N"):
        assert word in said
    assert "Qiu et al. 2022" in fedsieve("list", "methods").stdout
    assert "zerofl.digits" not in fedsieve("list", "engines").stdout


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_pytorch_is_not_loaded_for_help(word: str) -> None:
    code = f"""
import sys, time
sys.argv = ["fedsieve", {word!r}]
from fedsieve.cli import main
try: main()
except SystemExit as ended: print(ended.code, "torch" in sys.modules, time.process_time())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    exit_code, loaded, seconds = done.stdout.splitlines()[-1].split()
    assert (exit_code, loaded) == ("0", "False")
    assert float(seconds) < 0.5  # of a processor


@pytest.mark.slow
def test_the_version_and_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fedsieve", "--version"], capture_output=True, text=True)
    assert done.stdout == f"fedsieve {__version__}\n"


def test_how_long_a_round_waits_is_said_once() -> None:
    assert Execution().quorum == Quorum()


def test_help_names_the_commands(fedsieve: CommandLine) -> None:
    said = fedsieve("--help").stdout
    assert all(word in said for word in ("run", "list", "report"))


DIGITS = ("run", "zerofl.digits")
MISTAKES = {
    "an unknown command": (("frob",), "No such command 'frob'"),
    "a missing recipe": (("run",), "fedsieve run [OPTIONS] RECIPE"),
    "an unknown recipe": (("run", "zerofl.digit"), "unknown recipe 'zerofl.digit'"),
    "no such file": (("run", "nowhere.py:recipe"), "there is no file nowhere.py"),
    "no such function": (("run", "mine.py:other"), "mine.py has no function 'other'"),
    "not a function": (("run", "mine.py:not_a_function"), "mine.py has no function 'not_a_function'"),
    "a wrong recipe": (("run", "mine.py:wrong"), "rounds must be at least 1"),
    "not a recipe": (("run", "other.py:number"), "other.py:number returns no Run"),
    "a recipe that fails": (
        ("run", "other.py:wrong"),
        "other.py:wrong: wrong fails (TypeError: Run.__init__() got an unexpected keyword argument 'lrr', other.py l",
    ),
    "a file that fails": (
        ("run", "failing.py:recipe"),
        "failing.py cannot be loaded: ZeroDivisionError in line 2: d",
    ),
    "a recipe with arguments": (("run", "other.py:needs"), "cannot be called without arguments"),
    "a name of another module": (("run", "random.py:recipe"), "random.py has the name of another module"),
    "a name that is no module's": (("run", "my.net.py:recipe"), "my.net.py cannot be imported: rename it"),
    "a missing package": (("run", "missing.py:recipe"), "missing.py cannot be loaded: No module named 'nowhere'"),
    "a broken file": (("run", "broken.py:recipe"), "broken.py cannot be loaded: SyntaxError"),
    "an unknown field": ((*DIGITS, "-s", "round=3"), "unknown field 'round'"),
    "an impossible value": ((*DIGITS, "-s", "method.sparsity=1.2"), "sparsity must lie in [0, 1), got 1.2"),
    "too many a round": ((*DIGITS, "-s", "per_round=21"), "per_round is 21 but there are only 20 clients"),
    "empty shards": ((*DIGITS, "-s", "task.clients=5000"), "5000 clients cannot share 1442 examples"),
    "an unknown engine": ((*DIGITS, "--engine", "ray"), "unknown engine 'ray'"),
    "an empty pool": ((*DIGITS, "--engine", "pool:0"), "at least 1 process"),
    "unknown kernels": ((*DIGITS, "--kernels", "fast"), "unknown kernels 'fast'; they are auto, sparse, dense"),
    "kernels that cannot be": (("run", "mine.py:branching", "--kernels", "sparse"), "the model cannot be traced"),
    "kernels in a sweep": (("sweep", "mine.py:branching", "--kernels", "sparse"), "mine.branching: --kernels sparse"),
    "a sweep on the clock": (("sweep", "zerofl.digits", "--measure", "kernels"), "is for fedsieve run"),
    "an unknown device": ((*DIGITS, "--device", "tpu"), "unknown device 'tpu'"),
    "an unknown dataset": ((*DIGITS, "-s", "task.dataset=digit"), "'digit'"),
    "missing data": (("run", "zerofl.mnist", "--data", "."), "mnist"),
    "data nowhere": (("run", "zerofl.mnist", "--data", ""), "mnist"),
    "an unfit model": ((*DIGITS, "-s", "task.model=leaf_cnn"), "model leaf_cnn does not fit digits"),
    "an unfit policy": ((*DIGITS, "-s", "method.policy=x"), "policy 'x' matches no layer; the layers are conv1"),
    "nothing to resume": ((*DIGITS, "--resume"), "there is no run of zerofl.digits"),
    "a foreign directory": ((*DIGITS, "--out", "."), "is not empty and holds no run"),
    "an unknown list": (("list", "models"), "there is no list of 'models'"),
    "a report of nothing": (("report", "nowhere", "-o", "x.html"), "nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(
    name: str, tmp_path: Path, fedsieve: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(f"import sys; sys.path.append({str(Path(__file__).parents[1])!r})\n{MINE}")
    wrong = "def wrong():\n    from fedsieve import Run\n    return Run(lrr=1)\n"
    (tmp_path / "other.py").write_text(f"def number():\n    return 3\n\ndef needs(x):\n    return x\n\n{wrong}")
    (tmp_path / "failing.py").write_text("def recipe(): ...\n1 / 0\n")
    (tmp_path / "missing.py").write_text("import nowhere\n")
    for file in ("random.py", "my.net.py"):
        (tmp_path / file).write_text("def recipe(): ...\n")
    (tmp_path / "broken.py").write_text("def recipe(:\n")
    before = sorted(tmp_path.iterdir())
    words, line = MISTAKES[name]
    monkeypatch.delenv("FEDSIEVE_DATA", raising=False)
    said = fedsieve(*words, code=2).stderr
    assert said.count("\n") == 1
    assert said.startswith("fedsieve: ")
    assert line in said
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == before


def slow(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """Start a run and wait for its first round."""
    command = [str(Path(sys.executable).parent / "fedsieve"), "run", "zerofl.digits", *words]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    next(line for line in process.stdout if line.startswith("round 1/"))
    return process


@pytest.mark.parametrize("engine", ["local", "pool:2"])
@pytest.mark.system
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, engine: str) -> None:
    with slow("--engine", engine, cwd=tmp_path) as stopped:
        stopped.send_signal(signal.SIGINT)
        _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "stopped; every finished round is on disk: --resume goes on" in said
    process("run", "zerofl.digits", "--resume", "--until", "12", cwd=tmp_path)


def runs(pid: str) -> bool:
    """Tell a process from one that has ended, waited for or not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.system
def test_a_killed_server_takes_its_workers_with_it(tmp_path: Path) -> None:
    with slow("--engine", "pool:2", cwd=tmp_path) as process:
        mine = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(mine) >= 2
        process.kill()
        process.communicate(timeout=60)  # ends only once nobody holds the pipe any more
    time.sleep(0.5)
    assert not [pid for pid in mine if runs(pid)]


@pytest.mark.system
def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    with slow("-s", "rounds=20", cwd=tmp_path) as process:
        assert process.stdout
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


@pytest.mark.slow
def test_resume_takes_the_last_run_that_was_begun(tmp_path: Path, fedsieve: CommandLine) -> None:
    fedsieve("run", "zerofl.digits", "-s", "rounds=3", "--until", "1")
    (tmp_path / "runs/zerofl.digits-2").mkdir()
    said = fedsieve("run", "zerofl.digits", "-s", "rounds=3", "--resume").stdout
    assert "runs/zerofl.digits-1" in said
    said = fedsieve("run", "zerofl.digits", "-s", "rounds=1", "--resume", "--out", "new").stderr
    assert "new holds no run yet: starting at round 1" in said


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_one_line(fedsieve: CommandLine) -> None:
    said = fedsieve("run", "zerofl.digits", "--out", "/dev/null/x", code=2).stderr
    assert said.count("\n") == 1
    fedsieve("run", "zerofl.digits", "-s", "rounds=1", "--out", "a[/]b")
