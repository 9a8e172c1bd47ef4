"""Every attack of attacks/ ends as its page says: refused, with WireError."""

import importlib
from pathlib import Path

import pytest

ATTACKS = Path(__file__).parent.parent / "attacks"
NAMES = sorted(path.stem for path in ATTACKS.glob("*.py") if path.stem != "common")


@pytest.mark.parametrize("name", NAMES)
def test_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ATTACKS)
    outcomes = importlib.import_module(name).attack()
    assert len(outcomes) >= 2
    assert {outcome.idea: outcome.refused is not None for outcome in outcomes} == {o.idea: True for o in outcomes}


def test_every_attack_stands_on_the_page() -> None:
    page = (ATTACKS / "README.md").read_text()
    assert len(NAMES) >= 6
    assert all(f"`{name}.py`" in page for name in NAMES)
