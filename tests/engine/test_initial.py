"""What a run starts from: weights of a file, a folder, a module or a dictionary, and what every misfit says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines import ENGINES
from fedsieve import InputError, Run, open_run, rounds
from fedsieve.client.lora import LoRA
from fedsieve.engine.engines import local
from fedsieve.engine.federation import described
from fedsieve.methods import FedAvg, SparseFedPP, TopK
from fedsieve.recipes import apply_settings
from fedsieve.runs.execution import Execution
from fedsieve.runs.recorder import record_run
from methods_under_test import METHODS
from tiny import TinyNet, net, tiny_run


def start(seed: int = 7, kind: type[TinyNet] = TinyNet) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: value.clone() for name, value in kind().state_dict().items()}


def run_from(init: Any, method: Any = None, **changes: Any) -> Run:
    run = tiny_run(method or TopK(0.5, policy="all"), rounds=1)
    task = replace(run.task, model=net(run.method), init=init, **changes)
    return replace(run, task=task)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[name]) for name, v in a.items())


def test_every_source_gives_the_same_weights(tmp_path: Path) -> None:
    weights = start()
    save_file(weights, tmp_path / "w.safetensors")
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(weights, hub / "model.safetensors")
    (hub / "config.json").write_text("{}")
    parts = tmp_path / "parts"
    parts.mkdir()
    names = [*weights]
    for i, some in enumerate((names[:3], names[3:])):
        save_file({name: weights[name] for name in some}, parts / f"{i}.safetensors")
    placed = {name: f"{int(i >= 3)}.safetensors" for i, name in enumerate(names)}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    module = TinyNet()
    module.load_state_dict(weights)
    hashes = set()
    for source in (tmp_path / "w.safetensors", str(hub), parts, module, weights):
        federation = open_run(run_from(source))
        assert equal(federation.model().state_dict(), weights), source
        hashes.add(described(federation.run)["task"]["init"])
        assert federation.remarks == open_run(run_from("")).remarks
    assert len(hashes) == 1
    by_name = apply_settings(tiny_run(TopK(0.5, policy="all")), [f"task.init={hub}"])
    assert open_run(by_name).model().state_dict()["fc1.weight"].equal(weights["fc1.weight"])
    assert "init" not in described(tiny_run(TopK(0.5, policy="all")))["task"]


def test_a_run_directory_is_a_beginning(tmp_path: Path) -> None:
    list(record_run(tmp_path / "run", open_run(run_from("")), local(), "mine.py:recipe"))
    deployed = load_file(tmp_path / "run/model.safetensors")
    again = open_run(run_from(tmp_path / "run")).model().state_dict()
    assert equal(again, deployed)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_starts_from_them(method: Any) -> None:
    weights = start(kind=net(method))
    federation = open_run(run_from(weights, method))
    state = method.init(federation.model(), torch.Generator().manual_seed(0))
    dense = [name for name in weights if name not in state.sparse and name in state.params]
    assert dense
    assert all(torch.equal(state.params[name], weights[name]) for name in dense)
    for name in state.sparse:
        shown = state.params[name]
        if isinstance(method, SparseFedPP):
            shown = shown * shown.abs() ** (method.a - 1)
        on = shown != 0
        assert on.any()
        assert torch.allclose(shown[on], weights[name][on], rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_starts_from_them(engine: str) -> None:
    run = run_from(start(), METHODS["flash"])
    (expected,), (found,) = ([r.model for r in rounds(run, one) if r.t == 1] for one in (local(), ENGINES[engine]()))
    assert equal(found, expected)
    (other,) = (r.model for r in rounds(run_from("", METHODS["flash"]), local()) if r.t == 1)
    assert not equal(other, expected)


def test_a_run_of_adapters_is_a_beginning_with_these_merged(tmp_path: Path) -> None:
    """Of another run of adapters, too, which begins where the first ended."""
    adapters = LoRA(rank=2, alpha=6, modules="fc1")
    task = replace(tiny_run(FedAvg()).task, model=TinyNet, init=start(), adapters=adapters)
    first = replace(tiny_run(FedAvg(), rounds=2), task=task)
    list(record_run(tmp_path / "run", open_run(first), local(), "x"))
    own = load_file(tmp_path / "run/model.safetensors")
    assert own["fc1.lora_B.weight"].abs().max() > 0
    again = open_run(replace(first, task=replace(task, init=str(tmp_path / "run"))))
    model = again.model()
    expected = own["fc1.weight"] + 3 * own["fc1.lora_B.weight"] @ own["fc1.lora_A.weight"]
    assert torch.allclose(model.get_parameter("fc1.weight"), expected, atol=1e-6)
    assert not model.get_parameter("fc1.lora_B.weight").any()
    assert torch.equal(model.get_parameter("conv1.weight"), own["conv1.weight"])


def test_half_precision_is_widened_and_batchnorms_counter_may_be_missing() -> None:
    weights = {n: v.half() if v.is_floating_point() else v for n, v in start().items() if "tracked" not in n}
    model = open_run(run_from(weights)).model()
    assert all(torch.equal(model.state_dict()[name], value.float()) for name, value in weights.items())


class Tied(TinyNet):
    """Two names of one weight, of which Hugging Face's files have one."""

    def __init__(self) -> None:
        super().__init__()
        self.same = self.fc2


def test_one_of_tied_names_is_enough() -> None:
    weights = start()
    run = run_from(weights)
    tied = replace(run, task=replace(run.task, model=Tied))
    assert torch.equal(open_run(tied).model().state_dict()["same.weight"], weights["fc2.weight"])
    both = weights | {"same.weight": torch.zeros(3, 24), "same.bias": weights["fc2.bias"]}
    with pytest.raises(InputError, match=r"ties fc2\.weight to same\.weight, which differ in the state_dict"):
        open_run(replace(tied, task=replace(tied.task, init=both)))


def test_what_fits_is_a_beginning_where_that_is_asked_for() -> None:
    weights = {n: v for n, v in start().items() if not n.startswith("fc2")} | {"head.weight": torch.zeros(2, 2)}
    federation = open_run(run_from(weights, init_partial=True))
    model, drawn = federation.model().state_dict(), open_run(run_from("")).model().state_dict()
    assert torch.equal(model["fc1.weight"], weights["fc1.weight"])
    assert torch.equal(model["fc2.weight"], drawn["fc2.weight"])
    line = "task.init leaves as drawn: fc2.weight, fc2.bias; not used: the model has no head.weight"
    assert line in federation.remarks


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in start().items() if name not in names}


@pytest.mark.parametrize(
    ("init", "line"),
    [
        (lambda: without("fc2.weight"), r"the state_dict does not fit the model \(it has no fc2\.weight\)"),
        (lambda: {f"m.{n}": v for n, v in start().items()}, r"the model has no m\.conv1\.weight, .* and \d+ more\)"),
        (
            lambda: without() | {"fc2.bias": torch.zeros(4)},
            r"\(fc2\.bias is \[4\], the model's \[3\]\): .* -s task\.init_partial=true",
        ),
        (lambda: without() | {"fc2.bias": torch.full((3,), float("nan"))}, r"fc2\.bias of .* holds NaN or infinity"),
        (lambda: without() | {"fc2.bias": torch.zeros(3, dtype=torch.int8)}, r"of int8 \(quantised\?\)"),
        (lambda: without() | {"fc2.bias": torch.zeros(3).to(torch.float8_e5m2)}, r"of float8_e5m2 \(quantised\?\)"),
        (lambda: without() | {"fc2.bias": torch.zeros(3, dtype=torch.complex64)}, r"of complex64"),
        (lambda: without() | {"fc2.bias": None}, "no plain tensor"),
        (lambda: nn.Linear(2, 2, device="meta"), "no plain tensor"),
        (dict, "holds no weights"),
        (lambda: 3, "must be a path, a module or a state_dict, got int"),
        (lambda: "nowhere", "there is no nowhere: name a .safetensors"),
    ],
)
def test_what_does_not_fit_is_one_line(init: Callable[[], Any], line: str) -> None:
    with pytest.raises(InputError, match=line) as said:
        open_run(run_from(init()))
    assert "\n" not in str(said.value)


def test_files_that_are_no_weights_are_one_line(tmp_path: Path) -> None:
    for name, content in {"a.bin": b"\x80", "b.safetensors": b"garbage", "c.fsv": b"FSV3"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/pytorch_model.bin").write_bytes(b"PK")
    (tmp_path / "up").mkdir()
    index = {"weight_map": {"a": "../b.safetensors"}}
    (tmp_path / "up/model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "empty").mkdir()
    convert = r"a pickle, which can run code, .* save it by safetensors\.torch\.save_file"
    for name, line in {
        "a.bin": convert,
        "hf": convert,
        "b.safetensors": "cannot be read as safetensors",
        "c.fsv": "is damaged or cut short",
        "up": "names no parts of the weights",
        "empty": r"has no model\.safetensors: finish the run",
    }.items():
        with pytest.raises(InputError, match=line) as said:
            run_from(tmp_path / name)
        assert "\n" not in str(said.value)
    with pytest.raises(InputError, match="two beginnings"):
        run_from(start(), initialisation="truncated_normal")
    with pytest.raises(InputError, match=r"task\.init_partial says"):
        run_from("", init_partial=True)
    with pytest.raises(InputError, match="has no weight that fits"):
        open_run(run_from({"x": torch.zeros(1)}, init_partial=True))


def test_a_changed_file_is_another_run(tmp_path: Path) -> None:
    path, out = tmp_path / "w.safetensors", tmp_path / "run"
    save_file(start(), path)
    two = replace(run_from(path), rounds=2)
    list(record_run(out, open_run(two), local(), "", Execution(until="1")))
    list(record_run(out, open_run(replace(run_from(path), rounds=2)), local(), "", Execution(resume=True)))
    save_file(start(8), path)
    changed = open_run(replace(run_from(path), rounds=2))
    with pytest.raises(InputError, match=r"holds another run \(task\.init weights \w+ there, weights \w+ here\)"):
        list(record_run(out, changed, local(), "", Execution(resume=True)))
