"""The real data sets, where FEDSIEVE_DATA has them: sizes, checks and splits as published."""

import csv
from collections.abc import Iterator

import pytest
import torch

from fedsieve.data import NAMES, Dataset, dataset_status, load_dataset, partition, root_from
from fedsieve.data.femnist import unseen_writers
from fedsieve.data.speech_commands import which_set

ROOT = root_from(None)
pytestmark = pytest.mark.data


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIEVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def real(name: str) -> Dataset:
    if ROOT is None or dataset_status(name, ROOT).startswith("not found"):
        pytest.skip(f"no {name} under FEDSIEVE_DATA")
    return load_dataset(name, ROOT)


@pytest.mark.parametrize(
    ("name", "train", "test"), [("mnist", 60_000, 10_000), ("cifar10", 50_000, 10_000), ("digits", 1_442, 355)]
)
def test_sizes(name: str, train: int, test: int) -> None:
    found = real(name)
    assert (len(found.train), len(found.test)) == (train, test)
    again = load_dataset(name, ROOT)
    assert torch.equal(again.train.x, found.train.x)


def test_mnist_is_normalised_by_its_own_moments() -> None:
    x = real("mnist").train.x.float() / 255
    assert (x.mean().item(), x.std().item()) == (pytest.approx(0.1307, abs=1e-4), pytest.approx(0.3081, abs=1e-4))


def test_cifar10_is_balanced() -> None:
    found = real("cifar10")
    assert found.train.y.bincount().tolist() == [5000] * 10
    assert found.test.y.bincount().tolist() == [1000] * 10


def test_cifar10_hundred_clients() -> None:
    shards = partition.partition("lda:1.0", real("cifar10"), 100, 0)
    assert [len(shard) for shard in shards] == [500] * 100
    assert len(torch.cat(shards).unique()) == 50_000


def test_femnist_subset() -> None:
    found = real("femnist")
    if len(found.train) != 41_257:
        pytest.skip("another selection of LEAF's writers")
    assert (len(found.test), len(found.groups), len(unseen_writers(ROOT))) == (4_701, 300, 7_086)
    assert found.train.x[:, 0, 0, 0].float().mean() > 250  # paper is white
    assert [len(s) for s in partition.partition("group", found, 300, 0)] == found.group.bincount().tolist()


@pytest.mark.system
def test_speech_commands_features_and_speakers() -> None:
    found = real("speech_commands")
    x, _ = found.train.batch(slice(None))
    assert x.shape[1:] == (1, 32, 32)
    assert (x.mean().item(), x.std().item()) == (pytest.approx(0, abs=1e-2), pytest.approx(1, abs=1e-2))
    assert found.train.y.bincount(minlength=12).min() > 0
    assert found.test.y.bincount(minlength=12).min() > 0
    silent = found.group[found.train.y == 10].bincount(minlength=len(found.groups))
    assert silent.max() - silent.min() <= 1


def test_which_set_agrees_with_the_official_lists() -> None:
    if ROOT is None or not (index := ROOT / "speech_commands" / "index.csv").is_file():
        pytest.skip("no speech_commands/index.csv under FEDSIEVE_DATA")
    rows = [row for row in csv.DictReader(index.read_text().splitlines()) if row["speaker"]]
    assert [which_set(row["clip"]) for row in rows] == [row["official_partition"] for row in rows]


def test_all_names_have_a_line() -> None:
    assert all("\n" not in dataset_status(name, ROOT) for name in NAMES)
