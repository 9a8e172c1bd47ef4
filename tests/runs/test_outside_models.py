"""Models of torchvision, timm and Hugging Face: they train sparse, resume, travel, export and start from weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import outside_models
from fedsieve import Round, rounds
from fedsieve.cli.export import export_to
from fedsieve.engine import local
from fedsieve.engine.setup import open_run
from fedsieve.flower.engine import inline
from fedsieve.runs.execution import Execution
from fedsieve.runs.export import export
from fedsieve.runs.hub import write_hub_folder
from fedsieve.runs.model import open_model
from fedsieve.runs.prediction import choose_forward, open_examples, predict
from fedsieve.runs.recorder import record_run
from fedsieve.sparse.policy import select_weights
from fedsieve.types import apply_model, leaves, logits_of
from outside_models import MODELS, run_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:the global cut at density")]
FOLDERS: dict[str, tuple[Path, list[Round]]] = {}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    each: str = request.param
    return each


@pytest.fixture
def trained(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Round]]:
    """A run under FLASH, stopped after its first round and resumed; and its rounds. One serves all tests of a model."""
    if name not in FOLDERS:
        folder, done = tmp_path_factory.mktemp(name), list[Round]()
        for execution in (Execution(until=1), Execution(resume=True)):
            done += record_run(folder, open_run(run_of(name)), local(), recipe(name), execution)
        FOLDERS[name] = folder, done
    return FOLDERS[name]


def recipe(name: str) -> str:
    return f"{outside_models.__file__}:{name}_run"


def density(final: Round) -> float:
    names = final.state.sparse
    return sum(int(final.model[n].count_nonzero()) for n in names) / sum(final.model[n].numel() for n in names)


def test_interrupted_or_over_flower_the_bits_are_the_same(name: str, trained: tuple[Path, list[Round]]) -> None:
    folder, done = trained
    *_, final = rounds(run_of(name), inline())
    assert [one.t for one in done if one.t > 0] == [1, 2]
    assert not final.refused
    shipped = load_file(folder / "model.safetensors")
    assert all(torch.equal(v, shipped[n]) for n, v in final.model.items())
    start = open_run(run_of(name)).model().state_dict()
    assert any(not torch.equal(v != 0, start[n] != 0) for n, v in final.model.items())


@pytest.mark.parametrize("method", outside_models.METHODS)
def test_the_density_is_the_one_asked_for_of_all_weights_that_the_policy_names(
    method: str, name: str, trained: tuple[Path, list[Round]]
) -> None:
    *_, final = trained[1] if method == "flash" else rounds(run_of(name, method), local())
    plain = MODELS[name][0]()
    assert final.state.sparse == select_weights("all", plain)
    matrices = sum(w.numel() for n, w in plain.named_parameters() if w.dim() > 1 and not is_table(n))
    assert sum(final.model[n].numel() for n in final.state.sparse) == matrices
    assert density(final) == pytest.approx(0.2, abs=0.001)
    assert not final.refused


def is_table(name: str) -> bool:
    """Tell positions, a class token and layer scale in more than one dimension from weights."""
    parts = ("class_token", "cls_token", "pos_embed", "relative_position_bias_table", "layer_scale")
    return any(part in name for part in parts)


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    """Return what a model makes of three examples."""
    return logits_of(apply_model(model, MODELS[name][1]().test.batch(slice(0, 3))[0]))


def test_files_and_folders_compute_what_was_trained(
    name: str, trained: tuple[Path, list[Round]], tmp_path: Path
) -> None:
    model = open_model(trained[0], recipe(name))
    expected, plain = logits(model.network, name), MODELS[name][0]()
    assert model.density() == pytest.approx(trained[1][-1].density)  # a shared weight counts once
    assert re.search(r"density 2\d", export(model, tmp_path / "m.fsv"))
    assert torch.equal(logits(open_model(tmp_path / "m.fsv", recipe(name)).network, name), expected)
    assert "model.safetensors" in write_hub_folder(model, tmp_path / "hub")
    plain.load_state_dict(load_file(tmp_path / "hub" / "model.safetensors"))
    assert torch.allclose(logits(plain.eval(), name), expected, atol=1e-5)
    if MODELS[name][1] is outside_models.images:
        examples, (forward, _) = open_examples("test:0-2", model.metadata, recipe(name)), choose_forward(model, 8)
        labels = [json.loads(one.json())["label"] for one in predict(model, examples, forward, 8)]
        assert labels == ["abcd"[i] for i in expected.argmax(1)]

    starts = [tmp_path / "hub" / "model.safetensors"]
    if hasattr(plain, "save_pretrained"):
        plain.save_pretrained(tmp_path / "pretrained")  # without the second name of shared weights
        starts.append(tmp_path / "pretrained")
    for start in starts:
        run = run_of(name)
        begun = open_run(replace(run, task=replace(run.task, init=str(start)))).model().state_dict()
        assert all(torch.equal(v, begun[n]) for n, v in model.weights().items())


@pytest.mark.parametrize("name", ["convnext", "bert", "gpt2"], indirect=True)
def test_onnx_computes_what_was_trained(name: str, trained: tuple[Path, list[Round]], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, raw = open_model(trained[0], recipe(name)), MODELS[name][1]().test.subset(torch.arange(3)).x
    export_to(tmp_path / "m.onnx", trained[0], "file", "float32", recipe(name), None)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    names = [*raw] if isinstance(raw, dict) else ["input"]
    (found,) = session.run(None, dict(zip(names, (one.numpy() for one in leaves(raw)), strict=True)))
    assert torch.allclose(torch.from_numpy(found), logits(model.network, name), atol=1e-4)


def test_tied_and_transposed_weights_of_gpt2_are_reached_once() -> None:
    names = select_weights("all", MODELS["gpt2"][0]())
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"} <= {*names}
    assert "lm_head.weight" not in names
