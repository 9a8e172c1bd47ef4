"""Examples in files: rows are read when they are used, and train as those in memory do."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsieve import Data, Dataset, InputError, Run, Task, local, pool
from fedsieve.data import mapped
from fedsieve.data.mapped import FileTensor, chunks
from fedsieve.methods import ZeroFL
from tiny import alike, last

X = np.random.default_rng(0).normal(size=(90, 6)).astype(np.float32)
Y = np.arange(90) % 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    return tmp_path / "x.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    for i, (start, end) in enumerate(((0, 40), (40, 41), (41, 90))):
        np.save(tmp_path / f"parts/{i}.npy", X[start:end])
    return tmp_path / "parts"


@pytest.fixture
def no_reading_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    read = FileTensor.read

    def counted(self: FileTensor, rows: Any = None) -> torch.Tensor:
        assert rows is not None, "read as a whole"
        return read(self, rows)

    monkeypatch.setattr(FileTensor, "read", counted)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_rows_are_those_of_the_array(form: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(form)
    x, z = FileTensor.open(sorted(path.glob("*.npy")) if form == "folder" else [path]), torch.from_numpy(X)
    assert (x.shape, x.dtype, len(x), x.dim(), x.nbytes) == (z.shape, z.dtype, 90, 2, z.nbytes)
    index = torch.randperm(90)[:50]
    for a, b in (
        (x[index], z[index]),
        (x[5:70], z[5:70]),
        (x[-1], z[-1]),
        (x.index_select(0, index).read(), z[index]),  # type: ignore[attr-defined]
        (x.index_select(0, index)[7:9], z[index][7:9]),
        (x.index_select(0, index).index_select(0, torch.tensor([3, 1]))[torch.tensor([1])], z[index][[1]]),
        (x + 1, z + 1),
        (x[z[:, 0] > 0], z[z[:, 0] > 0]),
        (torch.cat([x, z]), torch.cat([z, z])),
        (x[::2], z[::2]),
        (x[:, 2], z[:, 2]),
        (torch.cat([*chunks(x)]), z),
    ):
        assert type(a) is torch.Tensor
        assert torch.equal(a, b)
    assert isinstance(x.detach(), FileTensor)
    assert isinstance(x.to("cpu"), FileTensor)


def test_only_rows_are_read(file: Path, no_reading_it_all: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "CHUNK", 100)
    data = _mapped(file)
    assert isinstance(data.train.x, FileTensor)
    assert isinstance(data.train.subset(torch.arange(9)).x, FileTensor)
    assert isinstance(data.train.to("cpu").x, FileTensor)
    assert isinstance(data.empty().train.x, FileTensor)
    x, y = data.train.batch(torch.tensor([3, 5]))
    assert type(x) is type(y) is torch.Tensor
    assert len(data.digest) == 64
    last(_run(data))


def test_targets_of_several_numbers_stay_in_their_file(
    file: Path, no_reading_it_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "CHUNK", 100)
    masks = np.random.default_rng(1).integers(0, 3, (90, 4, 4), np.uint8)
    np.save(file.with_name("masks.npy"), masks)
    data = Dataset.from_numpy(file, file.with_name("masks.npy"), 0.1)
    assert isinstance(data.train.y, FileTensor)
    assert (data.classes, data.train.y.dtype, data.labels) == (("0", "1", "2"), torch.int64, None)
    _, y = data.train.subset(torch.tensor([4, 2, 7])).batch(torch.tensor([2, 0]))
    assert isinstance(y, torch.Tensor)
    assert y.dtype == torch.int64
    assert data.train.y.rows is not None
    assert y.tolist() == masks[data.train.y.rows[[7, 4]].numpy()].tolist()


def _mapped(file: Path) -> Dataset:
    return Dataset.from_numpy(np.load(file, mmap_mode="r"), Y, 0.1)


def _run(data: Dataset, clients: int = 4) -> Run:
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    torch.manual_seed(0)
    for w in model.parameters():
        nn.init.normal_(w, std=0.2)
    task = Task(model, data, clients, "lda:1.0", validation=0.2)
    return Run(ZeroFL(sparsity=0.5), task, rounds=2, per_round=2, batch=4)


@pytest.mark.filterwarnings("ignore")
def test_they_train_as_in_memory_do(file: Path, folder: Path) -> None:
    memory = Dataset.from_numpy(X, Y, 0.1, name="a")
    expected = last(_run(memory))
    for x in (file, str(folder), np.load(file, mmap_mode="r")):
        data = Dataset.from_numpy(x, file.with_name("y.npy"), 0.1, name="a")
        assert data.digest == memory.digest
        assert alike(last(_run(data)), expected)


@pytest.mark.system
@pytest.mark.filterwarnings("ignore")
def test_a_pool_reads_the_files_itself(file: Path) -> None:
    data = _mapped(file)
    assert len(pickle.dumps(data.train.x)) < 2000  # 81 rows' places, and a path
    assert alike(last(_run(data), pool(2)), last(_run(data), local()))


def test_a_part_of_a_mapped_array_is_found_in_its_file(file: Path, tmp_path: Path) -> None:
    whole = np.load(file, mmap_mode="r")
    part = FileTensor.of(whole[20:50])
    assert part is not None
    assert torch.equal(part.read(), torch.from_numpy(X[20:50]))
    for odd in (whole[:, 1:3], whole[::2], whole.T):
        assert FileTensor.of(odd) is None
        assert type(Dataset.from_numpy(odd[:6], Y[:6]).train.x) is torch.Tensor
    assert torch.equal(copy.deepcopy(part).read(), part.read())
    assert torch.equal(pickle.loads(pickle.dumps(part)).read(), part.read())
    assert repr(part).startswith("FileTensor([30, 6], torch.float32, ")
    raw = np.memmap(tmp_path / "raw.bin", np.float32, "w+", shape=(12, 3))
    raw[:] = np.arange(36).reshape(12, 3)
    raw.flush()
    assert torch.equal(FileTensor.of(raw[4:]).read(), torch.from_numpy(np.array(raw[4:])))  # type: ignore[union-attr]


def test_files_that_do_not_fit_are_one_line(tmp_path: Path, file: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            Dataset.from_numpy(path, Y)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none.npy", "none.npy cannot be mapped .*: name a .npy file of numbers")
    (tmp_path / "bad.npy").write_bytes(file.read_bytes()[:-40])
    refused(tmp_path / "bad.npy", "bad.npy cannot be mapped")
    (tmp_path / "text.npy").write_text("x")
    refused(tmp_path / "text.npy", "text.npy cannot be mapped")
    np.save(tmp_path / "names.npy", np.array(["a", "b"]))
    refused(tmp_path / "names.npy", "names.npy holds no rows of numbers")
    np.save(tmp_path / "f.npy", np.asfortranarray(X))
    refused(tmp_path / "f.npy", "f.npy is in Fortran's order")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no .npy file")
    (tmp_path / "two").mkdir()
    np.save(tmp_path / "two/0.npy", X)
    np.save(tmp_path / "two/1.npy", X[:, :2])
    refused(tmp_path / "two", "arrays of one folder must be alike")


LIMITED = """
import resource, sys
import numpy as np, torch
from torch import nn
from fedsieve import Dataset, Run, Task, local, rounds
from fedsieve.methods import FedAvg

torch.set_num_threads(1)
form, budget = sys.argv[1], int(sys.argv[2])
x = "x.npy" if form == "mapped" else None
y = np.arange(4 * budget // 1024) % 2
model = nn.Sequential(nn.Linear(256, 4), nn.ReLU(), nn.Linear(4, 2))
warm = Dataset.from_numpy(np.zeros((40, 256), np.float32), np.arange(40) % 2)
train = lambda data: [r.accuracy for r in rounds(
    Run(FedAvg(), Task(model, data, clients=1), rounds=1, per_round=1, batch=64, lr=1e-3, lr_end=1e-3), local())]
train(warm)
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + budget, used + budget))
data = Dataset.from_numpy(x or np.load("x.npy"), y)
print(len(data.digest), train(data))
"""


@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_it_trains_on_four_times_the_memory_that_it_may_use(tmp_path: Path) -> None:
    budget = 16 << 20
    rows = 4 * budget // 1024
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (rows, 256))
    x[:, 0] = np.arange(rows) % 2
    x.flush()
    del x

    def limited(form: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, form, str(budget)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    done = limited("mapped")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("64 [")
    failed = limited("memory")
    assert failed.returncode != 0
    assert "MemoryError" in failed.stderr or "not enough memory" in failed.stderr


def test_a_tensor_in_memory_is_cut_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "CHUNK", 50)
    assert [len(rows) for rows in chunks(torch.from_numpy(X))] == [2] * 45
    assert [len(rows) for rows in chunks(torch.zeros(3, 0))] == [3]
    one = Dataset("a", Data(X, Y), Data(X, Y), 3).digest
    monkeypatch.undo()
    assert Dataset("a", Data(X, Y), Data(X, Y), 3).digest == one
