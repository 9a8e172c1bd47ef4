"""Every module of torch.nn that has weights: policies reach them, and the shipped model computes what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engines import pickled
from fedsieve import Federation, Round, Run, Task, methods
from fedsieve.client.training import load_, params_of
from fedsieve.engine import local, rounds
from fedsieve.engine.setup import open_run
from fedsieve.runs.execution import Execution
from fedsieve.runs.recorder import record_run
from fedsieve.sparse.masks import topk_count
from fedsieve.sparse.policy import select_weights, weights_of
from fedsieve.types import InputError, Method
from weighted_modules import MODULES, Make, dataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:the global cut at density"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

METHODS: dict[str, Method[Any]] = {
    "pdst": methods.PDST(density=0.3, policy="all"),
    "flash": methods.FLASH(density=0.3, c_d=2, E_d=2, policy="all"),
    "nst": methods.NST(density=0.3, deployment="pruned", policy="all"),
    "topk": methods.TopK(sparsity=0.7, deployment="pruned", policy="all"),
    "feddst": methods.FedDST(density=0.3, interval=1, end=1.0, policy="all"),
    "zerofl": methods.ZeroFL(0.7, policy="all", period=2, activations="where_possible"),
    "sparsefedpp": methods.SparseFedPP(0.7, deployment="pruned", activations="where_possible"),
}


FURTHER: dict[str, Method[Any]] = {
    "hetero_flash": methods.HeteroFLASH(densities=(0.5, 0.3), c_d=2, E_d=2, policy="all"),
    "dnr": methods.DNR(density=0.3),
    "swat": methods.Swat(0.7, policy="all", budget="erk", activations="where_possible"),
    "private": methods.Private(methods.PDST(density=0.3, policy="all"), noise=1e-3, cohort=2),
}
"""Methods that are tried on a dozen kinds of module alone: what they send, or how masks move, is another method's."""
KINDS = (
    *("Conv1d, depthwise", "Conv2d, circular", "Conv3d", "ConvTranspose2d", "Bilinear", "Embedding", "LSTM, projected"),
    *("GRU, both ways", "MultiheadAttention, other keys", "TransformerEncoderLayer", "bare parameters", "tied"),
)


def run_of(name: str, method: Method[Any], **settings: Any) -> Run:
    tiers = method.tiers or 1
    task = Task(model=Make(name), dataset=dataset, clients=3, partition="iid", tiers=(1 / tiers,) * tiers)
    return Run(
        task=task, method=method, **{"rounds": 2, "per_round": 2, "epochs": 2, "batch": 8, "lr": 0.1, **settings}
    )


def test_every_module_that_has_weights_is_here() -> None:
    def has_weights(kind: Any) -> bool:
        return isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__.startswith("torch.nn.modules")

    names = {name for name in dir(nn) if has_weights(getattr(nn, name)) and not name.startswith(("Lazy", "_"))}
    families = ("Conv", "Linear", "Bilinear", "Embedding", "RNN", "LSTM", "GRU", "MultiheadAttention", "Transformer")
    others = {name for name in names if not any(one in name for one in families)}
    for name in sorted(others):  # what is left has no weights, or is a norm, or activations' slopes
        try:
            module = getattr(nn, name)(*{"PReLU": (4,)}.get(name, ()))
        except TypeError:
            continue
        assert not weights_of(nn.ModuleDict({"inner": module})), name


@pytest.mark.parametrize("name", MODULES)
def test_a_policy_reaches_the_weights_and_nothing_else(name: str) -> None:
    model, (*_, wanted) = Make(name)(), MODULES[name]
    assert select_weights("all", model) == (*(f"inner.{one}" for one in wanted), "head.weight")
    assert select_weights("inner*", model) == select_weights("flash", model) == tuple(f"inner.{one}" for one in wanted)
    assert select_weights(f"inner.{wanted[-1]}", model) == (f"inner.{wanted[-1]}",)
    with pytest.raises(InputError, match=r"policy 'other' matches no layer; the layers are inner"):
        select_weights("other", model)


def final_round(federation: Federation, folder: Path) -> Round:
    """Return the last round of a run, in which no client is refused, and whose model has the bits of one that was
    stopped after a round, and went on by another engine."""
    *_, final = rounds(federation, local())
    for engine, execution in ((local(), Execution(until=1)), (pickled(), Execution(resume=True))):
        assert [*record_run(folder, federation, engine, "tests.engine", execution)][-1].refused == ()
    other = load_file(folder / "model.safetensors")
    assert all(torch.equal(v, other[n]) for n, v in final.model.items())
    return final


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", FURTHER)
def test_whole_or_interrupted_the_bits_are_the_same(method: str, name: str, tmp_path: Path) -> None:
    federation = open_run(run_of(name, FURTHER[method]))
    final = final_round(federation, tmp_path)
    assert final.state.sparse == select_weights(FURTHER[method].policy, Make(name)())
    assert final.density_of_policy is not None
    assert final.density_of_policy <= 0.55


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("method", METHODS)
def test_trained_on_masks_it_reaches_the_density_and_ships_what_it_trained(
    method: str, name: str, tmp_path: Path
) -> None:
    federation = open_run(run_of(name, METHODS[method]))
    final = final_round(federation, tmp_path)
    names = final.state.sparse
    assert names == select_weights("all", Make(name)())
    kept, total = (sum(int(f(final.model[n])) for n in names) for f in (torch.count_nonzero, torch.numel))
    exact = (total,) if method in ("topk", "sparsefedpp") else [final.model[n].numel() for n in names]
    assert 0.2 * total < kept <= sum(topk_count(0.3, n) for n in exact) + (2 if method == "feddst" else 1) * len(names)
    moved = params_of(federation.model())
    assert any(not torch.equal(v, moved[n]) for n, v in final.model.items())


@pytest.mark.parametrize("name", MODULES)
def test_masked_in_training_and_in_eval_it_computes_the_same(name: str) -> None:
    """The weights that a client trains are the model's own: fused paths read them as well."""
    *_, final = rounds(run_of(name, METHODS["pdst"], rounds=1), local())
    model = load_(Make(name)(), final.model)
    x = dataset().test.x
    with torch.no_grad():
        logits = [mode(model)(x) for mode in (nn.Module.train, nn.Module.eval)]
    assert torch.allclose(*logits, atol=1e-5)
    zeroed = {n: float((v == 0).float().mean()) for n, v in model.named_parameters() if n in final.state.sparse}
    assert min(zeroed.values()) > 0.5


def test_swat_and_powerpropagation_take_products_alone_and_say_what_is_left() -> None:
    for method in (methods.ZeroFL(0.5, policy="all"), methods.SparseFedPP(0.5), methods.Swat(0.5, policy="all")):
        run = run_of("LSTM, projected", method)
        federation = open_run(run)
        assert federation.run.method.init(federation.model(), torch.Generator()).sparse == ("head.weight",)
        (line,) = (line for line in federation.remarks if "inner.weight_ih_l0" in line)
        assert line.endswith("; -s method.activations=where_possible reaches every weight")
        assert not open_run(run_of("Conv2d, circular", methods.TopK())).remarks[0].endswith("every weight")
    with pytest.raises(InputError, match="inner"):
        open_run(replace(run_of("RNN", methods.ZeroFL(0.5)), method=methods.ZeroFL(0.5, policy="inner*")))
