"""The deployed model in a file: the sparse one bit for bit, ONNX against PyTorch, and what every mistake says."""

import hashlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deployed_models import command, make
from fedsieve import InputError, Sparse
from fedsieve.runs.export import check_export_path, export
from fedsieve.runs.model import TrainedModel, encode_model, open_model, read_model
from fedsieve.runs.prediction import open_examples, predict
from fedsieve.wire import encode

SUBNORMAL = 1e-45


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def test_the_sparse_file_is_exact_but_for_the_sign_of_dropped_zeros(tmp_path: Path) -> None:
    model = make()
    state = model.weights()
    special = torch.tensor([-0.0, 0.0, SUBNORMAL, -SUBNORMAL, 1.0, -3.4e38, 2.0, 3.0])
    state["conv1.bias"][:8] = special  # biases and dense weights keep their zeros' signs
    state["fc2.weight"][:] = torch.randn(10, 128)
    state["fc2.weight"][0, :8] = special
    state["fc1.weight"][0, :8] = special
    assert "wrote" in export(model, tmp_path / "m.fsv")
    again = open_model(tmp_path / "m.fsv")
    assert again.metadata == model.metadata
    assert not again.network.training
    found = again.weights()
    assert found.keys() == state.keys()
    for name, value in state.items():
        expected = value.clone()
        if name in ("conv1.weight", "conv2.weight", "fc1.weight"):  # sparse
            expected[expected == 0] = 0.0
        assert torch.equal(bits(found[name]), bits(expected)), name
    assert bits(state["fc1.weight"])[0, 0] != bits(found["fc1.weight"])[0, 0]  # the one bit that is not kept


@pytest.mark.parametrize("density", [0.0, 0.1, 0.96, 0.98, 1.0])
def test_the_sparse_file_is_never_much_larger_than_the_dense_tensors(density: float, tmp_path: Path) -> None:
    model = make()
    for weight in (w for w in model.network.parameters() if w.dim() > 1):
        weight.copy_(torch.randn(weight.shape) * (torch.rand(weight.shape) < density))
    said = export(model, tmp_path / "m.fsv")
    size = (tmp_path / "m.fsv").stat().st_size
    assert size < model.dense_bytes() * min(1.0, 1.1 * density + 0.1) + 2000
    assert f"{size / model.dense_bytes():.1%} of the dense tensors' 287.0 kB" in said
    assert all(torch.equal(v, model.weights()[name]) for name, v in open_model(tmp_path / "m.fsv").weights().items())


def test_other_types_and_batchnorms_counters_are_kept(tmp_path: Path) -> None:
    model = make("resnet18", (3, 8, 8), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    model.weights()["bn1.num_batches_tracked"].fill_(7)
    export(model, tmp_path / "m.fsv")
    again = open_model(tmp_path / "m.fsv")
    assert again.weights()["bn1.num_batches_tracked"] == 7
    assert again.metadata.std == (1.0, 2.0, 3.0)
    half = replace(model, network=nn.ParameterDict({"w": nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))}))
    with pytest.raises(InputError, match=r"does not fit into a \.fsv .* export it as \.safetensors"):
        export(half, tmp_path / "n.fsv")
    assert not (tmp_path / "n.fsv").exists()


def test_the_sparse_file_predicts_what_the_run_does(run: Path, tmp_path: Path) -> None:
    there, file = open_model(run), tmp_path / "m.fsv"
    export(there, file)
    assert file.stat().st_size < 0.2 * there.dense_bytes()
    here = open_model(file)
    for source in ("test", "test:5"):
        found = [list(predict(m, open_examples(source, m.metadata), m.network, 32, top=10)) for m in (there, here)]
        for one, other in zip(*found, strict=True):
            assert (one.name, one.truth, one.top[0][0]) == (other.name, other.truth, other.top[0][0])
            assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-6)


def test_a_damaged_sparse_file_is_one_line(tmp_path: Path) -> None:
    export(make(), tmp_path / "m.fsv")
    whole = (tmp_path / "m.fsv").read_bytes()
    chance = random.Random(0)
    cuts = [whole[:n] for n in (0, 1, 4, 31, 32, 36, len(whole) // 2, len(whole) - 1)]
    flips = [
        whole[:i] + bytes([whole[i] ^ 1 << chance.randrange(8)]) + whole[i + 1 :] for i in range(0, len(whole), 997)
    ]
    for content in (*cuts, *flips, whole + b"\0", b"garbage", chance.randbytes(1000)):
        (tmp_path / "d.fsv").write_bytes(content)
        with pytest.raises(InputError, match=r"d\.fsv is (no \.fsv file|damaged or cut short)") as said:
            open_model(tmp_path / "d.fsv")
        assert "\n" not in str(said.value)


def forged(path: Path, tree: Any) -> Path:
    """Write a message with a right checksum."""
    message = encode(tree)
    path.write_bytes(message + hashlib.sha256(message).digest())
    return path


def text(content: str) -> Tensor:
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


def test_a_forged_sparse_file_is_one_line(tmp_path: Path) -> None:
    model = make()
    metadata, weights = json.loads(model.metadata.json()), model.weights()
    huge = Sparse(torch.zeros(0), torch.zeros(0, dtype=torch.int64), (2**31, 2**31))

    def changed(**changes: Any) -> dict[str, Any]:
        return {"metadata": text(json.dumps(metadata | changes)), "weights": weights}

    own_model = {"task": metadata["run"]["task"] | {"model": "os:getcwd"}}
    known = text(json.dumps(metadata))
    trees: dict[str, Any] = {
        "nothing": {},
        "a number": {"metadata": 1.0, "weights": {}},
        "no JSON": {"metadata": text("{"), "weights": {}},
        "deep JSON": {"metadata": text("[" * 100_000), "weights": {}},
        "a list": {"metadata": text("[1]"), "weights": {}},
        "no weights": {"metadata": known, "weights": {}},
        "a tree of weights": {"metadata": known, "weights": weights | {"fc2.bias": {"a": 1.0}}},
        "another shape": {"metadata": known, "weights": weights | {"fc2.bias": torch.zeros(11)}},
        "another type": {"metadata": known, "weights": weights | {"fc2.bias": torch.zeros(10).double()}},
        "a huge weight": {"metadata": known, "weights": weights | {"fc1.weight": huge}},
        "another model": changed(run={"task": metadata["run"]["task"] | {"model": "resnet18"}}),
        "code": changed(run=own_model),
        "no run": changed(run=None),
        "no task": changed(run={}),
        "no shape": changed(shape=[]),
        "a negative shape": changed(shape=[1, -8, 8]),
        "a huge shape": changed(shape=[2**40, 8, 8]),
        "no classes": changed(classes=[]),
        "more classes": changed(classes=["a"] * 1000),
        "an infinite mean": changed(mean=[1e400]),
        "no spread": changed(std=[0.0]),
        "too many means": changed(mean=[0.0, 0.0]),
    }
    for name, tree in trees.items():
        with pytest.raises(InputError) as said:
            open_model(forged(tmp_path / "f.fsv", tree))
        assert str(said.value).count("\n") == 0, name
    assert forged(tmp_path / "f.fsv", changed())
    assert open_model(tmp_path / "f.fsv").metadata == model.metadata


def test_a_network_of_ones_own_is_named_not_stored(own: Path, mine: Path) -> None:
    there = open_model(own, "mine.py:recipe")
    export(there, mine / "m.fsv")
    sys.modules.pop("mine")
    with pytest.raises(InputError, match=r"tiny:TinyNet is code of your own: .* --recipe mine\.py:recipe"):
        open_model(mine / "m.fsv")
    assert "mine" not in sys.modules
    here = open_model(mine / "m.fsv", "mine.py:recipe")
    found = [list(predict(m, open_examples("test", m.metadata, "mine.py:recipe"), m.network, 9)) for m in (there, here)]
    assert found[0] == found[1]


def test_safetensors_are_the_runs_own(run: Path, tmp_path: Path) -> None:
    model = open_model(run)
    export(model, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    export(model, tmp_path / "m.fsv")
    export(open_model(tmp_path / "m.fsv"), tmp_path / "again.safetensors")
    expected = load_file(run / "model.safetensors")
    assert all(torch.equal(v, expected[name]) for name, v in load_file(tmp_path / "again.safetensors").items())


NORMALISED: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        make(),
        make("mnist_net", (1, 28, 28), mean=(0.1307,), std=(0.3081,)),
        make("leaf_cnn", (1, 28, 28)),
        make("resnet18", (3, 32, 32), **NORMALISED),
    ],
    ids=lambda m: type(m.network).__name__,
)
def test_onnx_answers_like_pytorch(model: TrainedModel, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    out = tmp_path / "m.onnx"
    said = export(model, out)
    assert said.startswith(f"wrote {out}: ")
    graph = onnx.load(out)
    onnx.checker.check_model(graph, full_check=True)
    session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape) == ("input", ["batch", *model.metadata.shape])
    assert (given.name, given.shape) == ("logits", ["batch", 10])
    for n in (1, 2, 7):
        raw = torch.rand(n, *model.metadata.shape)
        (found,) = session.run(None, {"input": raw.numpy()})
        assert np.abs(found - model.network(model.normalize(raw)).numpy()).max() < 1e-4

    told = {entry.key: entry.value for entry in graph.metadata_props}
    assert told["recipe"] == "a.b"
    assert float(told["density"]) == pytest.approx(model.density(), rel=1e-5)
    assert tuple(json.loads(told["classes"])) == model.metadata.classes
    assert json.loads(told["metadata"]) == json.loads(model.metadata.json())
    assert str(Path(__file__).parents[2]).encode() not in out.read_bytes()
    assert b"torch.onnx" not in out.read_bytes()
    export(model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()


class Branch(nn.Module):
    """What depends on the numbers has no graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10] if float(x.sum()) > 0 else -x.flatten(1)[:, :10]


class Fixed(nn.Module):
    """What counts its batch by len() is traced for that batch only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10] * torch.ones(len(x), 1)


@pytest.mark.slow
def test_a_graph_of_one_batch_size_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match="takes one size of batch only"):
        export(replace(make(), network=Fixed()), tmp_path / "m.onnx")


@pytest.mark.slow
def test_what_onnx_cannot_express_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match=r"ONNX cannot express this model .* export it as \.fsv") as said:
        export(replace(make(), network=Branch()), tmp_path / "m.onnx")
    assert "\n" not in str(said.value)
    assert not list(tmp_path.iterdir())


def test_without_the_packages_it_is_said_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, there in (("onnxscript", SimpleNamespace()), ("onnx", None)):
        monkeypatch.setitem(sys.modules, "onnx", there)  # type: ignore[arg-type]
        monkeypatch.setitem(sys.modules, "onnxscript", None)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=rf"the package {name} is not installed: pip install '\.\[onnx\]'"):
            export(make(), tmp_path / "m.onnx")


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m.fsv").write_text("mine")
    for out in (tmp_path / "m.fsv", tmp_path, tmp_path / "no/m.fsv", tmp_path / "m.pt", tmp_path / "m"):
        with pytest.raises(InputError):
            check_export_path(out)
        with pytest.raises(InputError):
            export(make(), out)
    assert (tmp_path / "m.fsv").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["m.fsv"]


def test_the_command_says_what_was_written(run: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("m.fsv", "m.safetensors"):
        code, out, err = command(capsys, "export", run, "-o", name)
        assert (code, err) == (0, "")
        assert out.startswith(f"wrote {name}: ")
        assert out.count("\n") == 1
        assert "%, 10.0% of those that the policy names" in out.replace(")", "")
    code, out, _ = command(capsys, "predict", "m.fsv", "test", "--top", 1)
    assert code == 0
    assert out.splitlines()[-1].endswith("of 100 examples")
    for words, line in {
        (run, "-o", "m.pt"): "m.pt: a model is exported as .onnx, .fsv (compact, sparse) or .safetensors",
        (run, "-o", "m.fsv"): "m.fsv is there already: remove it, or choose another name",
        (run, "-o", "nowhere/m.fsv"): "nowhere is not a folder",
        (run,): "-o",
        ("nowhere", "-o", "x.fsv"): "nowhere cannot be read",
    }.items():
        code, out, err = command(capsys, "export", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert line in err


def test_the_format_is_what_its_description_says(tmp_path: Path) -> None:
    model = make()
    content = encode_model(model.metadata, model.weights())
    assert content[:4] == b"FSV3"
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()
    assert content[13:20] == bytes([2, 2, 0, 8]) + b"met"  # docs/reference/wire.md: two entries, first metadata
    earlier = tmp_path / "earlier.fsv"
    earlier.write_bytes(b"FSV1" + content[4:])
    with pytest.raises(InputError, match="written by an earlier FedSieve"):
        read_model(earlier)
