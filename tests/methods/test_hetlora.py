"""HetLoRA: ranks by device class, against the paper's arithmetic by hand; and adapters under every method."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines import ENGINES
from fedsieve import Data, Dataset, Run, Task, local, methods, rounds
from fedsieve.client.lora import LoRA, LoRALinear, merge_adapters_
from fedsieve.engine.setup import open_run
from fedsieve.methods import hetlora
from fedsieve.recipes import apply_settings, load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.model import encode_model, open_model
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.types import InputError, Method, RoundContext, Sparse, Update

SETTINGS: dict[str, Any] = {"rounds": 2, "per_round": 3, "batch": 8, "lr": 0.05}


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def dataset() -> Dataset:
    torch.manual_seed(0)
    x, y = torch.randn(90, 16), torch.arange(90) % 4
    return Dataset("few", Data(x, y), Data(x[:20], y[:20]), tuple("abcd"))


def run_of(method: Method[Any], **task: Any) -> Run:
    adapters = task.pop("adapters", LoRA(rank=4, alpha=8.0))
    return Run(method, Task(net, dataset, 6, adapters=adapters, **task), **SETTINGS)


def adapted(rank: int = 4) -> nn.Module:
    return LoRA(rank, 8.0).attach_(net(), torch.Generator().manual_seed(0))


def test_an_adapted_layer_adds_its_product_and_merges_into_a_plain_one() -> None:
    model, x = adapted(), torch.randn(5, 16)
    assert torch.equal(model(x), net()(x))  # B is zero
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    assert trained == {f"{i}.lora_{m}.weight" for i in (0, 2, 4) for m in "AB"}
    with torch.no_grad():
        for i in (0, 2, 4):
            model[i].lora_B.weight.normal_()  # type: ignore[index, union-attr]
    y = x
    for i in (0, 2, 4):
        layer: Any = model[i]  # type: ignore[index]
        a, b = layer.lora_A.weight, layer.lora_B.weight
        y = y @ (layer.weight + 8.0 / 4 * b @ a).T + layer.bias
        y = F.relu(y) if i < 4 else y
    torch.testing.assert_close(model(x), y)
    before = model(x)
    plain = merge_adapters_(model)
    assert not any(isinstance(m, LoRALinear) for m in plain.modules())
    assert plain.state_dict().keys() == net().state_dict().keys()
    torch.testing.assert_close(plain(x), before)


def test_adapters_stand_where_patterns_say() -> None:
    model = LoRA(modules="0,2", trained="4").attach_(net())
    assert [isinstance(model[i], LoRALinear) for i in (0, 2, 4)] == [True, True, False]  # type: ignore[index]
    assert model[4].weight.requires_grad  # type: ignore[index, union-attr]
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    LoRA().attach_(encoder)
    assert isinstance(encoder.linear1, LoRALinear)
    assert not isinstance(encoder.self_attn.out_proj, LoRALinear)  # attention computes with its weight itself
    for settings, line in (({"modules": "conv*"}, "modules=conv\\* matches nothing"), ({"trained": "z"}, "trained=z")):
        with pytest.raises(InputError, match=line):
            LoRA(**settings).attach_(net())
    with pytest.raises(InputError, match="adapters of its own"):
        LoRA().attach_(adapted())
    for bad in ({"rank": 0}, {"alpha": 0.0}):
        with pytest.raises(InputError, match=r"task\.adapters"):
            LoRA(**bad)  # type: ignore[arg-type]


def test_settings_name_adapters() -> None:
    task = Task("digits_net", "digits", 4)
    changed = apply_settings(task, ["adapters=lora", "adapters.rank=2", "adapters.modules=fc*"])
    assert changed.adapters == LoRA(rank=2, modules="fc*")
    assert apply_settings(changed, ["adapters=none"]) == task
    with pytest.raises(InputError, match="those of a new model are noise: name trained ones"):
        open_run(Run(methods.FedAvg(), changed, 1, 1))


METHODS = {
    "fedavg": methods.FedAvg(),
    "scaffold": methods.SCAFFOLD(),
    "zerofl": methods.ZeroFL(0.5, 0.2),
    "swat": methods.Swat(0.5),
    "sparsefedpp": methods.SparseFedPP(0.5),
    "topk": methods.TopK(0.5),
    "topk, update": methods.TopK(0.5, of="update"),
    "nst": methods.NST(0.5),
    "pdst": methods.PDST(0.5),
    "flash": methods.FLASH(0.5, c_d=2, E_d=2),
    "hetero_flash": methods.HeteroFLASH((0.6, 0.4), c_d=2, E_d=2),
    "feddst": methods.FedDST(0.5, interval=1, end=1.0),
    "hetlora": methods.HetLoRA((4, 2)),
    "private": methods.Private(methods.PDST(0.5), noise=1e-3, cohort=3),
}


@pytest.mark.filterwarnings("ignore::fedsieve.sparse.masks.EmptyLayer")  # B starts at 0, where a cut of weights falls
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_adapters_and_leaves_the_base(name: str, tmp_path: Path) -> None:
    tiers = (0.5, 0.5) if METHODS[name].tiers else (1.0,)
    federation = open_run(run_of(METHODS[name], tiers=tiers, init=net()))
    before = {n: v.clone() for n, v in federation.model().state_dict().items()}
    results = [*record_run(tmp_path / "run", federation, local(), "x")]
    after = results[-1].model
    moved = {n for n, v in before.items() if not torch.equal(after[n], v)}
    adapters = {n for n in before if "lora_" in n}
    assert moved == adapters if name not in ("topk", "sparsefedpp") else {*()} < moved <= adapters
    sent = sum(4 * v.numel() for n, v in before.items() if "lora_" in n)
    copies = 1 + (name == "scaffold")
    assert all(r.bytes_up <= len(r.clients) * (copies * sent + 300) for r in results if r.t > 0)
    assert not any(r.refused for r in results)


def test_a_run_of_adapters_ships_a_plain_model(tmp_path: Path) -> None:
    loss = load_recipe("fedavg.diabetes").task.loss
    task = Task("mlp", "diabetes", 4, adapters=LoRA(2), init=_mlp(), loss=loss)
    run = Run(methods.TopK(0.5, of="update"), task, 2, 2)
    results = [*record_run(tmp_path / "run", open_run(run), local(), "x", Execution())]
    opened = open_model(tmp_path / "run")
    assert opened.weights().keys() == _mlp().state_dict().keys()
    ours = LoRA(2).attach_(_mlp())
    ours.load_state_dict(results[-1].model)
    x = torch.randn(5, 10)
    torch.testing.assert_close(opened.network(x), ours(x))
    file = tmp_path / "model.fsv"
    file.write_bytes(encode_model(opened.metadata, opened.weights()))
    torch.testing.assert_close(open_model(file).network(x), ours(x))
    again = [*record_run(tmp_path / "two", open_run(run), local(), "x", Execution(until=1))]
    assert len(again) == 1
    [*record_run(tmp_path / "two", open_run(run), local(), "x", Execution(resume=True))]
    assert [r["bytes_down"] for r in read_rows(tmp_path / "two")] == [r.bytes_down for r in results]


def _mlp() -> nn.Module:
    from fedsieve.client.vector_models import MLP

    torch.manual_seed(1)
    return MLP(10, 1)


def test_unequal_ranks_are_padded_and_count_by_the_norm_of_their_update() -> None:
    method, model = methods.HetLoRA((4, 2, 1)), adapted()
    state = method.init(model, torch.Generator())
    context = RoundContext(1, 1, 6, 0)
    cuts = [method.broadcast(state, replace(context, tier=tier))["params"] for tier in range(3)]
    assert [tuple(cut["0.lora_A.weight"].shape) for cut in cuts] == [(4, 16), (2, 16), (1, 16)]  # type: ignore[call-overload, union-attr]
    assert [tuple(cut["0.lora_B.weight"].shape) for cut in cuts] == [(12, 4), (12, 2), (12, 1)]  # type: ignore[call-overload, union-attr]
    torch.manual_seed(5)
    answers: list[dict[str, Tensor]] = []
    for tier in (0, 1, 1, 2):
        own = {n: torch.randn_like(v) if "lora_" in n else v for n, v in method._cut(state.params, tier).items()}
        answers.append(own)
    several = zip((0, 1, 1, 2), answers, strict=True)
    updates = [Update({"tier": float(tier), **own}, 10, {}) for tier, own in several]
    after = method.aggregate(state, iter(updates), context).params
    norms = [
        sum(float((a[f"{i}.lora_B.weight"] @ a[f"{i}.lora_A.weight"]).square().sum()) for i in (0, 2, 4)) ** 0.5
        for a in answers
    ]
    for layer in ("0", "2", "4"):
        expected = torch.zeros(4, state.params[f"{layer}.lora_A.weight"].shape[1])
        for own, norm in zip(answers, norms, strict=True):
            a = own[f"{layer}.lora_A.weight"]
            expected[: len(a)] += norm / sum(norms) * a
        torch.testing.assert_close(after[f"{layer}.lora_A.weight"], expected)
        expected = torch.zeros(state.params[f"{layer}.lora_B.weight"].shape[0], 4)
        for own, norm in zip(answers, norms, strict=True):
            b = own[f"{layer}.lora_B.weight"]
            expected[:, : b.shape[1]] += norm / sum(norms) * b
        torch.testing.assert_close(after[f"{layer}.lora_B.weight"], expected)
    assert torch.equal(after["0.weight"], state.params["0.weight"])


def test_a_client_of_a_lower_rank_trains_as_a_model_of_that_rank() -> None:
    """Rows of zeros and columns of zeros have no gradient: what is trained is the smaller adapters alone."""
    run = replace(run_of(methods.HetLoRA((4, 2)), tiers=(0.5, 0.5)), rounds=1, per_round=6)
    federation = open_run(run)
    method: Any = run.method
    state = method.init(federation.model(), torch.Generator())
    context = run.context(1, 1)
    device = federation.device(1, 5, federation.model(), "cpu", {})
    got = method.client(method.broadcast(state, context), device).tree
    small = LoRA(2, 4.0).attach_(net())  # the same factor, alpha / rank
    small.load_state_dict(method._cut(state.params, 1))
    reference = methods.FedAvg()
    device = federation.device(1, 5, small, "cpu", {})
    wanted = reference.client({n: v.clone() for n, v in small.state_dict().items()}, device).tree
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)


def test_hetlora_says_what_it_needs() -> None:
    with pytest.raises(InputError, match="must be at least 1, and fall"):
        methods.HetLoRA((2, 4))
    with pytest.raises(InputError, match=r"adapters of its first rank 8: the model has \{4\}"):
        open_run(run_of(methods.HetLoRA((8, 2)), tiers=(0.5, 0.5)))
    with pytest.raises(InputError, match="the model has none"):
        open_run(run_of(methods.HetLoRA((8, 2)), tiers=(0.5, 0.5), adapters=None))


def test_adapters_of_peft_train_under_every_kind_of_method() -> None:
    peft = pytest.importorskip("peft")

    def model() -> Any:
        return peft.get_peft_model(net(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))

    for method in (
        methods.FedAvg(),
        methods.TopK(0.5, of="update"),
        methods.FLASH(0.5, c_d=2, E_d=2),
        methods.HetLoRA((4, 2)),
    ):
        tiers = (0.5, 0.5) if method.tiers else (1.0,)
        run = Run(method, Task(model, dataset, 6, tiers=tiers), **SETTINGS)
        *_, final = rounds(run, local())
        base = {n: v for n, v in open_run(run).model().state_dict().items() if "lora_" not in n}
        assert base
        assert all(torch.equal(final.model[n], v) for n, v in base.items())
        assert any("lora_B" in n and v.any() for n, v in final.model.items())
        assert final.bytes_up < 3 * (4 * 4 * (16 + 12 + 12 + 8) + 400)


def test_top_k_of_the_update_sends_the_largest_changes_and_adds_their_mean() -> None:
    method = methods.TopK(0.75, of="update")
    run = run_of(method, adapters=None)
    federation = open_run(run)
    model = federation.model()
    state = method.init(model, torch.Generator())
    before, names = state.params, state.sparse
    updates = list[Update]()
    for client in (0, 1):
        device = federation.device(1, client, federation.model(), "cpu", {})
        dense = methods.FedAvg().client(before, device).tree
        changes: dict[str, Any] = {n: dense[n] - v for n, v in before.items()}  # type: ignore[operator]
        device = federation.device(1, client, federation.model(), "cpu", {})
        updates.append(method.client(before, device))
        ranked = torch.cat([changes[n].flatten() for n in names]).abs().sort(descending=True).values
        cut = ranked[-(-len(ranked) // 4) - 1]  # of n weights ceil(n / 4) are sent
        for n, value in updates[-1].tree.items():
            own: Any = value
            got = own.dense() if isinstance(own, Sparse) else own
            wanted = changes[n] * (changes[n].abs() >= cut) if n in names else changes[n]
            torch.testing.assert_close(got, wanted)
            changes[n] = wanted
        updates[-1] = replace(updates[-1], tree=changes)
    n = [update.n for update in updates]
    after = method.aggregate(state, iter(updates), run.context(1)).params
    for name, value in before.items():
        sent: list[Any] = [update.tree[name] for update in updates]
        torch.testing.assert_close(after[name], value + (n[0] * sent[0] + n[1] * sent[1]) / sum(n))
    assert method.target_density is None
    with pytest.raises(InputError, match="of=update sends changes"):
        methods.TopK(deployment="pruned", of="update")


@pytest.mark.parametrize("engine", [name for name in ENGINES if "pool" not in name])
@pytest.mark.parametrize("name", ["fedavg", "topk, update", "hetlora"])
def test_engines_give_the_same_adapters_though_interrupted(name: str, engine: str, tmp_path: Path) -> None:
    run = run_of(METHODS[name], tiers=(0.5, 0.5) if METHODS[name].tiers else (1.0,))
    *_, whole = rounds(run, local())
    for execution in (Execution(until=1), Execution(resume=True)):
        *_, final = record_run(tmp_path / "run", open_run(run), ENGINES[engine](), "x", execution)
    assert final.bytes_down == whole.bytes_down
    assert all(torch.equal(v, whole.model[n]) for n, v in final.model.items())


def test_adapters_of_convolutions_and_embeddings_have_ranks_too() -> None:
    """As peft names and shapes them: a convolution's B is 1 x 1, so that B A is a kernel of the whole size."""
    a, b = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    rows, columns = torch.randn(2, 7), torch.randn(4, 2)
    params = {
        "c.lora_A.default.weight": a,
        "c.lora_B.default.weight": b,
        "e.lora_embedding_A.default": rows,
        "e.lora_embedding_B.default": columns,
    }
    kernel = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    expected = (kernel.square().sum() + (columns @ rows).square().sum()).sqrt()
    assert hetlora._norm(params) == pytest.approx(float(expected), rel=1e-5)
    for (name, value), shape in zip(params.items(), [(4, 3, 3, 3), (5, 4, 1, 1), (4, 7), (4, 4)], strict=True):
        padded = hetlora._padded(name, value, 4)
        assert padded.shape == shape
        axis = hetlora._axis(name)
        assert axis is not None
        assert torch.equal(padded.narrow(axis, 0, 2), value)
        assert not padded.narrow(axis, 2, 2).any()
