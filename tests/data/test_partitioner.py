"""Partitioners of flwr-datasets: the indices of what they cut are what they say."""

import pickle
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsieve import Data, Dataset, InputError, Run, Task, local, open_run, pool, rounds
from fedsieve.data.partition import counts, partition
from fedsieve.data.partitioner import FlowerPartitioner
from fedsieve.engine.federation import described
from fedsieve.methods import FedAvg
from tiny import TinyNet, alike, blobs, last

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    partitioners = pytest.importorskip("flwr_datasets.partitioner")
    hf = pytest.importorskip("datasets")

N = 240
Y = torch.randperm(N, generator=torch.Generator().manual_seed(0)) % 6
OWNER = torch.randperm(N, generator=torch.Generator().manual_seed(1)) % 5


def toy() -> Dataset:
    data = Data(torch.arange(N)[:, None].float(), Y)
    return Dataset("toy", data, data, 6, OWNER, columns={"age": torch.arange(N) % 90})


def rows() -> Any:
    """The same examples as Flower's users give them, with a column that no partitioner of ours adds."""
    return hf.Dataset.from_dict(
        {"label": Y.tolist(), "group": OWNER.tolist(), "age": [i % 90 for i in range(N)], "number": [*range(N)]}
    )


CASES: list[tuple[str, dict[str, Any]]] = [
    ("IidPartitioner", {"num_partitions": 7}),
    ("DirichletPartitioner", {"num_partitions": 5, "partition_by": "label", "alpha": 0.7, "seed": 3}),
    ("InnerDirichletPartitioner", {"partition_sizes": [40, 60, 90], "partition_by": "label", "alpha": 0.5}),
    (
        "ShardPartitioner",
        {"num_partitions": 6, "partition_by": "label", "num_shards_per_partition": 2, "shard_size": 20},
    ),
    ("PathologicalPartitioner", {"num_partitions": 6, "partition_by": "label", "num_classes_per_partition": 2}),
    ("NaturalIdPartitioner", {"partition_by": "group"}),
    ("GroupedNaturalIdPartitioner", {"partition_by": "age", "group_size": 30, "mode": "strict"}),
    ("SizePartitioner", {"partition_sizes": [100, 90, 50]}),
    ("LinearPartitioner", {"num_partitions": 4}),
    ("SquarePartitioner", {"num_partitions": 4}),
    ("ExponentialPartitioner", {"num_partitions": 3}),
    ("ContinuousPartitioner", {"num_partitions": 4, "partition_by": "age", "strictness": 0.5}),
    (
        "DistributionPartitioner",
        {
            "distribution_array": np.full((6, 2), 10.0),
            "num_partitions": 6,
            "num_unique_labels_per_partition": 2,
            "partition_by": "label",
            "preassigned_num_samples_per_label": 2,
        },
    ),
]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=[kind for kind, _ in CASES])
@pytest.mark.filterwarnings("ignore")
def test_the_indices_are_flowers(kind: str, settings: dict[str, Any]) -> None:
    alone = getattr(partitioners, kind)(**settings)
    alone.dataset = rows()
    expected = [sorted(alone.load_partition(k)["number"]) for k in range(alone.num_partitions)]
    spec = FlowerPartitioner.of(getattr(partitioners, kind)(**settings))
    for _ in range(2):  # a second time the same: what was given is not used up
        assert [part.tolist() for part in partition(spec, toy(), len(expected), 0)] == expected
    assert expected
    assert len({example for part in expected for example in part}) == sum(map(len, expected))


def task(partitioner: Any, clients: int = 6) -> Task:
    return Task(TinyNet, blobs, clients, partitioner)


def tiny(partitioner: Any) -> Run:
    return Run(FedAvg(), task(partitioner), rounds=2, per_round=3, batch=8)


def test_a_run_takes_one_and_says_which() -> None:
    run_ = tiny(partitioners.PathologicalPartitioner(6, "label", 1))
    federation = open_run(run_)
    table = counts(list(federation.shards), federation.dataset.train.y, 3)
    assert (table > 0).sum(1).tolist() == [1] * 6
    text = described(run_)["task"]["partition"]
    assert text == (
        "PathologicalPartitioner(num_partitions=6, partition_by='label', num_classes_per_partition=1, "
        "class_assignment_mode='random', shuffle=True, seed=42)"
    )
    assert len([*rounds(run_, local())]) == 2


@pytest.mark.system
def test_a_pool_trains_the_same_on_one_that_cannot_be_pickled() -> None:
    run_ = tiny(partitioners.LinearPartitioner(6))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(partitioners.LinearPartitioner(6))
    assert alike(last(run_, local()), last(run_, pool(2)))


def used() -> Any:
    partitioner = partitioners.IidPartitioner(6)
    partitioner.dataset = rows()
    return partitioner


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: partitioners.IidPartitioner(7), "IidPartitioner: it makes 7 clients: set task.clients=7, not 6"),
        (
            lambda: partitioners.NaturalIdPartitioner("hospital"),
            r"no column 'hospital' \(they are label, group\): name one",
        ),
        (lambda: partitioners.NaturalIdPartitioner("group"), "it makes 12 clients"),
        (
            lambda: partitioners.VerticalEvenPartitioner(num_partitions=2),
            "it divides columns, not examples: take one that divides examples",
        ),
        (
            lambda: partitioners.SizePartitioner([400] * 6),
            r"SizePartitioner: The sum of partition sizes .* is greater than the size of the dataset 240",
        ),
        (used, "IidPartitioner: it has cut another dataset already: give a new one"),
    ],
)
def test_what_does_not_fit_is_one_line(make: Any, message: str) -> None:
    def opened() -> None:
        data = blobs()
        bare = Dataset("d", data.train, data.test, data.classes, torch.arange(240) % 12)
        partitioner = make()
        clients = 2 if "Vertical" in type(partitioner).__name__ else 6
        open_run(replace(tiny("iid"), task=Task(TinyNet, bare, clients, partitioner), per_round=2))

    with pytest.raises(InputError, match=message) as caught:
        opened()
    assert "\n" not in str(caught.value)


class Emptied:
    """Works like one of Flower's, and leaves a client without an example."""

    num_partitions = 2

    def __init__(self) -> None:
        self.dataset: Any = None

    def load_partition(self, k: int) -> Any:
        return self.dataset.select(range(0 if k else 240))


def test_a_client_without_an_example_is_one_line() -> None:
    with pytest.raises(InputError, match="client 1 has no example: give it one, or lower"):
        open_run(Run(FedAvg(), task(Emptied(), 2), rounds=1, per_round=1))
