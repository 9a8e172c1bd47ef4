import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsieve.server.aggregate import Adam, Average, mean
from fedsieve.types import InputError, Sparse, Update


def test_the_mean_is_weighted_by_the_examples_of_those_sampled() -> None:
    updates = [Update({"w": torch.tensor([1.0, 2.0])}, 1), Update({"w": torch.tensor([4.0, 8.0])}, 3)]
    assert mean(updates)["w"].tolist() == [(1 + 3 * 4) / 4, (2 + 3 * 8) / 4]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.lists(st.floats(-9, 9, width=32), min_size=6, max_size=6)), min_size=1)
)
def test_zeros_off_a_support_count(answers: list[tuple[int, list[float]]]) -> None:
    sparse, total = [], sum(n for n, _ in answers)
    for n, values in answers:
        x = torch.tensor(values).view(2, 3)
        sparse.append(Update({"w": Sparse.of(x, x > 1)}, n))
    got = mean(sparse)["w"].flatten().tolist()
    wanted = [math.fsum(n * (v[i] if v[i] > 1 else 0) for n, v in answers) / total for i in range(6)]
    assert got == pytest.approx(wanted, rel=1e-6)


def test_the_mean_reads_its_answers_as_a_stream() -> None:
    alive = []

    def stream() -> Iterator[Update]:
        for i in range(5):
            alive.append(i)
            yield Update({"w": torch.full((2,), float(i))}, 1)

    assert mean(stream())["w"].tolist() == [2.0, 2.0]
    assert alive == [0, 1, 2, 3, 4]


def test_no_answer_is_an_error() -> None:
    with pytest.raises(InputError, match="no client sent"):
        mean([])


def test_average_takes_the_mean_itself() -> None:
    target = {"w": torch.ones(2)}
    assert Average().step({"w": torch.zeros(2)}, target, {}) == (target, {})


def test_adam_follows_reddi_et_al_and_spares_running_statistics() -> None:
    adam = Adam(eta=0.5, b1=0.8, b2=0.9, tau=0.01)
    old = {"w": torch.tensor([1.0]), "bn.running_mean": torch.tensor([3.0])}
    moments = adam.init(old)
    w, m, v = 1.0, 0.0, 0.0
    for target in (2.0, 1.5):
        old, moments = adam.step(old, {"w": torch.tensor([target]), "bn.running_mean": torch.tensor([7.0])}, moments)
        d = target - w
        m, v = 0.8 * m + 0.2 * d, 0.9 * v + 0.1 * d * d
        w += 0.5 * m / (math.sqrt(v) + 0.01)
        assert old["w"].item() == pytest.approx(w, rel=1e-6)
        assert old["bn.running_mean"].item() == 7.0


@pytest.mark.parametrize("wrong", [{"eta": 0.0}, {"tau": 0.0}, {"b1": 1.0}, {"b2": -0.1}])
def test_adam_refuses_impossible_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="FedAdam needs"):
        Adam(**wrong)
