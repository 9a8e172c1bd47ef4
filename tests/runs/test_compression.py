"""Models pruned after their training: exact counts, ties, what is refused, and what then takes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fedsieve
from deployed_models import command, make
from fedsieve import InputError
from fedsieve.runs.compression import CompressedModel, compress
from fedsieve.runs.export import export
from fedsieve.runs.model import open_model
from tiny import TinyNet

LAYERS = ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight")


def trained() -> TinyNet:
    torch.manual_seed(3)
    return TinyNet()


def counts(model: CompressedModel) -> dict[str, int]:
    return {name: int(model.weights()[name].count_nonzero()) for name in LAYERS}


def test_one_cut_keeps_exactly_the_largest() -> None:
    model = trained()
    small = compress(model, 0.1, shape=(2, 6, 6))
    flat = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in LAYERS])
    total = flat.numel()
    assert sum(counts(small).values()) == -(-total // 10)
    cut = flat.sort(descending=True).values[-(-total // 10) - 1]
    for name in LAYERS:
        own = model.get_parameter(name).detach()
        assert torch.equal(small.weights()[name], torch.where(own.abs() >= cut, own, 0.0))
    assert torch.equal(small.weights()["fc1.bias"], model.fc1.bias)
    assert not bool((model.fc1.weight == 0).any())  # a copy is pruned
    assert small.metadata.classes == ("0", "1", "2")
    share = sum(counts(small).values()) / total
    assert small.line() == f"density {share:.2%} of the 4 weight tensors that the policy names, {share:.2%} of all"


def test_layers_have_their_own_densities() -> None:
    model = trained()
    sizes = {name: model.get_parameter(name).numel() for name in LAYERS}
    assert counts(compress(model, 0.25, "uniform")) == {name: -(-n // 4) for name, n in sizes.items()}
    erk = counts(compress(model, 0.25, "erk"))
    assert sum(sizes.values()) * 0.25 <= sum(erk.values()) <= sum(sizes.values()) * 0.25 + len(LAYERS)
    assert erk["conv1.weight"] / sizes["conv1.weight"] > erk["fc1.weight"] / sizes["fc1.weight"]
    some = counts(compress(model, 0.25, policy="fc*"))
    assert some["conv1.weight"] == sizes["conv1.weight"]


def test_channels_may_share_their_pattern(tmp_path: Path) -> None:
    """By one cut and by layer; the file of such a model tells positions once for eight channels."""
    model, sizes = trained(), dict[int, int]()
    for method in ("global", "uniform"):
        small = compress(model, 0.25, method, policy="conv2,fc1", unit=8, shape=(2, 6, 6))  # type: ignore[arg-type]
        kept = {name: small.weights()[name] != 0 for name in ("conv2.weight", "fc1.weight")}
        units = {name: own.reshape(-1, 8, own[0].numel()) for name, own in kept.items()}
        assert all(torch.equal(own.any(1), own.all(1)) for own in units.values())
        each = {name: int(own[:, 0].sum()) for name, own in units.items()}
        total = {name: own[:, 0].numel() for name, own in units.items()}
        if method == "uniform":
            assert each == {name: -(-n // 4) for name, n in total.items()}
        assert sum(each.values()) == -(-sum(total.values()) // 4)
        assert small.metadata.run["compress"]["unit"] == 8
    for unit in (1, 8):
        export(compress(model, 0.25, "uniform", unit=unit, shape=(2, 6, 6)), tmp_path / f"{unit}.fsv")
        sizes[unit] = (tmp_path / f"{unit}.fsv").stat().st_size
    assert sizes[8] < sizes[1]  # though units keep small weights, too, whose values take more


@pytest.mark.filterwarnings("ignore::fedsieve.sparse.masks.EmptyLayer")
def test_ties_go_to_the_first_and_frozen_weights_are_pruned() -> None:
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False)).requires_grad_(False)
    for w in net.parameters():
        w.fill_(-1.0)
    small = compress(net, 0.5).weights()
    assert small["0.weight"].flatten().tolist() == [-1.0] * 6 + [0.0] * 2
    assert not small["1.weight"].any()


@pytest.mark.filterwarnings("ignore::fedsieve.sparse.masks.EmptyLayer")
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"density": 0.0}, "density must lie in"),
        ({"density": 1.5}, "density must lie in"),
        ({"unit": 0}, "unit must be 1 or more output channels"),
        ({"method": "random"}, "method must be one of global, uniform, erk"),
        ({"policy": "head"}, "policy 'head' matches no layer"),
        ({"model": nn.Sequential(nn.ReLU())}, "matches no layer"),
        ({"model": "resnet18"}, r"needs a torch\.nn\.Module or a model of open_model, got str"),
        ({"shape": (2, 9, 9)}, r"shape: given examples of \[2, 9, 9\] the model fails"),
        ({"shape": (2, 6, 6), "classes": ("a",)}, "1 names for a model that tells 3 apart"),
        ({"model": trained().half()}, r"float32 is trained: give model\.float\(\)"),
    ],
)
def test_what_cannot_be_pruned_is_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line) as said:
        compress(**({"model": trained()} | changes))
    assert "\n" not in str(said.value)


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = trained()
    with torch.no_grad():
        model.fc1.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"fc1\.weight holds NaN"):
        fedsieve.compress(model)


def test_a_deployed_model_keeps_what_it_says_of_itself(tmp_path: Path) -> None:
    whole = make()
    small = compress(whole, 0.05)
    assert (small.metadata.classes, small.metadata.shape) == (whole.metadata.classes, whole.metadata.shape)
    assert replace(small.metadata, run=whole.metadata.run) == whole.metadata
    export(small, tmp_path / "m.fsv")
    assert open_model(tmp_path / "m.fsv").density() == small.density()


def test_the_command_prunes_and_predict_takes_it(mine: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained()
    save_file(model.state_dict(), mine / "w.safetensors")
    words = ("w.safetensors", "--model", "mine.py:TinyNet", "--density", 0.1, "--shape", "2,6,6", "-o", "s.fsv")
    code, out, err = command(capsys, "compress", *words)
    assert (code, err) == (0, "")
    assert out.startswith(compress(model, 0.1).line() + "\nwrote s.fsv: ")
    x = torch.randn(4, 2, 6, 6)
    expected = compress(model, 0.1).network(x)
    assert torch.equal(open_model(mine / "s.fsv", "mine.py:TinyNet").network(x), expected)
    (mine / "x.npy").write_bytes(b"")
    code, _, err = command(capsys, "predict", "s.fsv", "x.npy")
    assert (code, "--recipe FILE.py:FUNCTION" in err) == (2, True)
    code, out, _ = command(capsys, "compress", run, "--density", 0.1, "-o", "r.fsv")
    assert code == 0
    code, _, err = command(capsys, "compress", "w.safetensors", "-o", "t.fsv")
    assert (code, "does not say of which model it is" in err) == (2, True)
