"""What every engine must do: give the bits of every other, whole or interrupted, also where clients remember."""

from pathlib import Path

import pytest

from engines import ENGINES
from fedsieve.engine.setup import open_run
from fedsieve.methods import TopK
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from tiny import TIMES, tiny_run

RUN = tiny_run(TopK(0.7), rounds=2, values="int8")


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[dict[str, object]]]:
    out = tmp_path_factory.mktemp("local") / "run"
    rounds = [*record_run(out, open_run(RUN), ENGINES["local"](), "tests.tiny")]
    assert all(round.memory for round in rounds)
    return result(out)


def result(out: Path) -> tuple[bytes, list[dict[str, object]]]:
    return (out / "model.safetensors").read_bytes(), [row | TIMES for row in read_rows(out)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.system] if "pool" in name else []) for name in ENGINES]
)
def test_an_engine_gives_the_bits_of_every_other_though_interrupted(
    name: str, wanted: tuple[bytes, list[dict[str, object]]], tmp_path: Path
) -> None:
    for execution in (Execution(until=1), Execution(resume=True)):
        assert len([*record_run(tmp_path, open_run(RUN), ENGINES[name](), "tests.tiny", execution)]) == 1
    assert result(tmp_path) == wanted
