"""Every recipe instantiates; one of each dataset runs end to end."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsieve import Data, Dataset, Run, local, rounds
from fedsieve.client.models import MODELS
from fedsieve.client.vector_models import VECTOR_MODELS
from fedsieve.engine.federation import described
from fedsieve.engine.setup import open_run
from fedsieve.kernels import unavailable_reason
from fedsieve.methods import FLASH, ZeroFL
from fedsieve.recipes import load_recipe, recipes
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run

DATASETS = ("digits", "mnist", "cifar10_iid", "cifar10_niid", "femnist", "speech_iid", "speech_niid")
METHODS = (
    *("fedavg", "fedadam", "fedprox", "scaffold", "swat", "zerofl", "topk", "sparsefedpp", "nst", "pdst", "flash"),
    *("hetero_flash", "feddst"),
)


IMAGES = ("vit_tiny", "resnet50", "mobilenet_v2", "resnet18_groupnorm")


def warm_up(method: str) -> list[str]:
    """The settings of as short a first stage as there is."""
    return ["method.c_d=1", "method.E_d=2"] if "flash" in method else []


def test_every_method_has_a_recipe_for_every_dataset() -> None:
    assert {f"{m}.{d}" for m in METHODS for d in DATASETS} <= recipes().keys()


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_a_run_that_says_what_it_is(name: str) -> None:
    recipe = recipes()[name]
    run = recipe.run
    assert " on " in recipe.about
    assert described(run)["method"]["kind"]
    assert run.method.name == ("fedavg" if name.startswith("lora.") else name.split(".")[0])


def test_the_papers_settings() -> None:
    run = load_recipe("zerofl.cifar10_niid")
    assert (run.rounds, run.per_round, run.task.clients, run.lr, run.lr_end) == (700, 10, 100, 0.1, 0.01)
    assert (run.epochs, run.batch, run.momentum, run.weight_decay) == (1, 16, 0.0, 0.0)
    assert run.task.partition == "lda:1.0"
    assert load_recipe("zerofl.cifar10_iid").task.partition == "lda:1000"
    speech, femnist = load_recipe("zerofl.speech_iid"), load_recipe("zerofl.femnist")
    assert (speech.rounds, speech.lr, speech.lr_end) == (200, 0.01, 0.001)
    assert (femnist.rounds, femnist.per_round, femnist.lr, femnist.lr_end) == (1000, 35, 0.004, 0.001)
    assert all(r.task.validation == 0.1 and r.lr_offset == 0 for r in (run, speech, femnist))


def test_the_public_codes_settings() -> None:
    """Flower's baseline of NIID-Bench, and FedDST's authors: constant learning rates, momentum, ten local epochs."""
    niid, feddst = load_recipe("scaffold.niidbench_cifar10"), load_recipe("feddst.feddst_cifar10")
    assert (niid.rounds, niid.per_round, niid.task.clients, niid.batch, niid.weight_decay) == (50, 10, 10, 64, 1e-5)
    assert (feddst.rounds, feddst.per_round, feddst.task.clients, feddst.batch) == (400, 20, 400, 32)
    method = feddst.method
    assert (feddst.weight_decay, method.density, method.alpha, method.interval) == (1e-3, 0.2, 0.01, 15)
    for run in (niid, feddst):
        assert (run.epochs, run.lr, run.lr_end, run.momentum) == (10, 0.01, 0.01, 0.9)
    for run, size in ((niid, 62_006), (feddst, 782_006)):
        assert sum(w.numel() for w in MODELS[str(run.task.model)](3, 10).parameters()) == size


@pytest.mark.parametrize("method", METHODS)
def test_only_zerofl_holds_examples_out_and_counts_rounds_from_0(method: str) -> None:
    """FLASH and SparseFedPP train on all and decay from t = 1; SparseFedPP's experiments draw all weights alike."""
    for name, recipe in recipes().items():
        run = recipe.run
        other = run.task.dataset in ("shakespeare", "diabetes") or run.task.model in ("lenet5", "feddst_net", *IMAGES)
        if not name.startswith(f"{method}.") or "central" in name or other:
            continue
        flash, power = (run.rounds, run.lr_end) in ((400, 0.001), (600, 0.001), (1000, 0.001)), run.lr == 0.5
        ours = run.task.dataset == "digits"
        flash = flash and run.lr == 0.1
        assert run.lr_offset == int(flash or power), name
        assert run.task.validation == (0.0 if flash or power or ours else 0.1), name
        assert run.task.initialisation == ("truncated_normal" if power else "model"), name
        assert run.batch == (32 if run.task.dataset == "mnist" else 8 if method == "private" else 16), name


def test_a_regression_learns_by_its_recipe() -> None:
    *_, final = rounds(load_recipe("topk.diabetes", ["rounds=15"]), local())
    assert (final.scores["mse"] or 9) < 0.7  # of targets with variance 1
    assert final.density < 0.4


@pytest.mark.data
@pytest.mark.parametrize("name", ["fedavg.shakespeare", "topk.gpt"])
def test_a_language_model_learns_by_its_recipe(name: str, data_root: Path) -> None:
    short = ["rounds=2", "per_round=2", "task.test_limit=50", "evaluate_every=1", "batch=4"]
    first, second = rounds(load_recipe(name, short), local(), data=data_root)
    perplexities = [round_.scores["perplexity"] for round_ in (first, second)]
    assert second.accuracy is not None
    assert 65 > perplexities[0] > perplexities[1] > 1  # type: ignore[operator]


def noise(run: Run, clients: int = 4) -> Run:
    """The same run on few images of noise, or on few roles' random characters."""
    torch.manual_seed(0)
    n, text = 8 * clients, run.task.dataset == "shakespeare"
    x = torch.randint(65, (n, 81)) if text else torch.randn(n, 3, 32, 32)
    y = x[:, 1:] if text else torch.arange(n) % 10
    data = Data(x[:, :80] if text else x, y)
    classes, group = tuple(map(str, range(65 if text else 10))), torch.arange(n) // 4 if text else None
    dataset = Dataset("noise", data, data.subset(torch.arange(8)), classes, group)
    partition = "group" if text else "iid"
    model = (MODELS | VECTOR_MODELS)[str(run.task.model)](x.shape[1] if not text else 80, len(classes))
    init = model if run.task.adapters else ""
    clients = min(clients, run.task.clients)
    task = replace(run.task, dataset=dataset, clients=clients, partition=partition, init=init, augment="none")
    few = len(run.task.tiers) if len(run.task.tiers) > 1 else min(2, clients)
    method = replace(run.method, c_d=1, E_d=2) if isinstance(run.method, FLASH) else run.method
    return replace(run, method=method, task=task, rounds=1, per_round=few, batch=4, epochs=1)


@pytest.mark.filterwarnings("ignore::fedsieve.sparse.masks.EmptyLayer")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("flash.vit", "hetlora.lora_gpt", "zerofl.gpt")
        else pytest.param(name, marks=pytest.mark.system)
        for name, recipe in recipes().items()
        if recipe.run.task.model in (*IMAGES, "char_gpt") or recipe.run.task.part
    ],
)  # fmt: skip
def test_recipes_of_our_own_models_run_in_small(name: str) -> None:
    run = noise(load_recipe(name))
    transformer = run.task.model in ("vit_tiny", "char_gpt") and not run.task.adapters and not unavailable_reason()
    *_, final = rounds(run, local(kernels="sparse" if transformer else "auto"))
    assert not final.refused
    assert not transformer or [*final.kernels] == ["sparse"]
    assert final.accuracy is not None
    if run.target_density and not run.task.adapters and not name.startswith("zerofl"):
        assert final.density < run.target_density + 0.35
    if run.task.adapters:
        base = {n: v for n, v in open_run(run).model().state_dict().items() if "lora_" not in n}
        assert all(torch.equal(final.model[n], v) for n, v in base.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", ["mnist", "femnist"])
@pytest.mark.data
def test_every_method_runs_on_the_smaller_datasets(method: str, dataset: str, tmp_path: Path, data_root: Path) -> None:
    short = ["rounds=2", "per_round=3", "task.test_limit=200", *warm_up(method)]
    run = load_recipe(f"{method}.{dataset}", short)
    final = [*record_run(tmp_path / "run", open_run(run, data_root), local(), "x")][-1]
    assert final.accuracy is not None
    assert [row["round"] for row in read_rows(tmp_path / "run")] == list(range(run.first, 3))


@pytest.mark.system
@pytest.mark.data
@pytest.mark.parametrize(
    ("method", "dataset"),
    [
        ("fedavg", "cifar10_niid"),
        ("hetero_flash", "cifar10_niid"),
        ("zerofl", "cifar10_niid"),
        ("zerofl", "speech_niid"),
    ],
)
def test_methods_of_three_kinds_run_on_resnet(method: str, dataset: str, tmp_path: Path, data_root: Path) -> None:
    few = 1000 if dataset == "cifar10_niid" else 500
    short = ["rounds=1", "per_round=3", "task.test_limit=100", f"task.clients={few}", "task.validation=0"]
    federation = open_run(load_recipe(f"{method}.{dataset}", [*short, *warm_up(method)]), data_root)
    final = [*record_run(tmp_path / "run", federation, local(), "x")][-1]
    assert final.accuracy is not None
    paper = federation.run.method.paper_bytes(federation.model())
    if isinstance(federation.run.method, ZeroFL):  # one upload, measured, stays below the paper's CSR
        assert paper is not None
        assert final.bytes_up / 3 < paper


@pytest.mark.system
@pytest.mark.data
def test_a_recipe_runs_from_end_to_end_in_small(tmp_path: Path, data_root: Path) -> None:
    run = load_recipe("zerofl.femnist", ["rounds=2", "per_round=2", "task.test_limit=200"])
    final = [*record_run(tmp_path / "run", open_run(run, data_root), local(), "x")][-1]
    assert final.accuracy is not None
    assert final.bytes_up < final.bytes_dense_up / 2


@pytest.mark.system
def test_sparsefedpp_agrees_on_what_to_drop(tmp_path: Path) -> None:
    """Its aggregate, a union of five clients' supports, is hardly denser than one of them."""
    run = replace(load_recipe("sparsefedpp.digits"), evaluate_every=1000)
    rows = [r.density for r in record_run(tmp_path / "run", open_run(run), local(), "x", Execution(until=40))]
    assert all(0.05 <= density < 0.08 for density in rows[20:])


@pytest.mark.system
@pytest.mark.parametrize(
    ("recipe", "floor"),
    [("zerofl.digits", 0.90), ("fedavg.digits", 0.95), ("flash.digits", 0.90), ("hetero_flash.digits", 0.90)],
)
def test_the_digits_are_learnt(recipe: str, floor: float, tmp_path: Path) -> None:
    run = replace(load_recipe(recipe), evaluate_every=1000)
    final = [*record_run(tmp_path / "run", open_run(run), local(), recipe)][-1]
    assert final.accuracy is not None
    assert final.accuracy >= floor
