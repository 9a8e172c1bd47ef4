"""What the benchmarks measure: which samples count, what is compared, and what the JSON says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedsieve import kernels
from fedsieve.cli.bench import inference, measurement, step, workload
from fedsieve.cli.bench.measurement import Effort, RepeatedCall, compare_times, fastest, run_fresh
from fedsieve.cli.bench.wire import tensor_entropy
from fedsieve.cli.bench.workload import NETWORKS, SHAPES, Workload
from fedsieve.runs.compression import compress
from fedsieve.runs.hub import write_hub_folder
from fedsieve.runs.model import encode_model
from fedsieve.types import InputError, Sparse
from fedsieve.wire.known import NOTHING

ROOT = Path(__file__).parents[2]
SMALL = Workload("digits_net", 8, 0.9)
KEYS = [
    "model",
    "batch",
    "sparsity",
    "rule",
    "storage",
    "density_per_multiply_add",
    "ms_sparse",
    "ms_dense_fp32",
    "ms_dense_bf16",
    "ratio_fp32",
    "ratio_bf16",
    "samples_kept",
    "samples_dropped",
    "period",
    "unit",
    "roof_ms",
    "share_of_roof",
    "cpu",
    "clock",
    "peak_mb_sparse",
    "peak_mb_dense",
]
"""The keys that ``fedsieve bench step --json`` and ``infer --json`` promise."""


def needs_kernels() -> None:
    if why := kernels.unavailable_reason():
        pytest.skip(why)


def bench(*words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "fedsieve", "bench", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process."""

    def near(function: Any, case: Workload, threads: int, /, **options: Any) -> Any:
        return json.loads(json.dumps(function(case, **options)))

    monkeypatch.setattr(measurement, "run_fresh", near)
    monkeypatch.setattr(step, "sparse_peak", lambda case, threads: None if step.unavailable_reason() else 1.5)
    monkeypatch.setattr(step, "dense_peak", lambda *_: 6.0)


# what is compared


def test_the_fastest_variant_of_a_kind_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {("sparse",): (0.01, 5), ("fp32", "a"): (0.06, 4), ("fp32", "b"): (0.05, 9), ("bf16",): (0.02, 6)}
    timings = {key: measurement.Timing(seconds, kept, 10 - kept) for key, (seconds, kept) in took.items()}
    monkeypatch.setattr(measurement, "time_in_turns", lambda *_: timings)
    found = fastest([compare_times({}, Effort(1))])
    assert found["ms_dense_fp32"] == pytest.approx(50)
    assert (found["ratio_fp32"], found["ratio_bf16"]) == pytest.approx((5, 2))
    assert (found["samples_kept"], found["samples_dropped"]) == (4, 6)


def test_where_all_samples_are_disturbed_the_processor_time_of_one_thread_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For all variants alike, and the row says so; of several processes those that the wall clock timed count."""
    monkeypatch.setattr(measurement, "time_sample", lambda call: (9.0, "sparse" not in str(call.call)))
    threads, clock = list[int](), iter(range(100))
    monkeypatch.setattr(measurement.time, "thread_time", lambda: next(clock) * 0.01)

    class Named:
        def __init__(self, name: str):
            self.name = name

        def __repr__(self) -> str:
            return self.name

        def __call__(self) -> None:
            threads.append(torch.get_num_threads())

    calls = {(kind,): RepeatedCall(Named(kind), 2) for kind in ("sparse", "fp32", "bf16")}
    row = compare_times(calls, Effort(1, samples=3, seconds=0.0))
    assert [row[name] for name in measurement.TIMES] == pytest.approx([5.0] * 3)
    assert (row["clock"], row["samples_kept"]) == ("processor, 1 thread", 3)
    assert set(threads) == {1}
    quiet = row | {"clock": "wall", "ms_sparse": 7.0}
    assert fastest([row, quiet])["ms_sparse"] == 7.0
    assert fastest([row])["ratio_fp32"] == pytest.approx(1)


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_has_its_examples_and_its_sparse_layers(model: str) -> None:
    case = Workload(model, 2, 0.75)
    network, mask = case.pruned_network()
    x, y = case.examples()
    length, classes = workload.TEXTS.get(model) or (None, SHAPES[model][2])
    assert network(x).shape == ((2, length, classes) if length else (2, classes))
    assert int(y.max()) < classes
    for name, own in mask.items():
        assert float(own.float().mean()) == pytest.approx(0.25, abs=0.01)
        assert not network.get_parameter(name)[~own].any()


def test_resnets_first_convolution_and_classifier_stay_dense() -> None:
    case = Workload()
    network = case.network()
    assert network.get_submodule("layer2.0.shortcut.0").weight is not None
    every = {name for name, v in network.named_parameters() if v.dim() > 1}
    assert every - set(case.densities(network)) == {"conv1.weight", "fc.weight"}
    shortcuts = {f"layer{i}.0.shortcut.0.weight" for i in (2, 3, 4)}
    assert set(case.densities(network)) - set(replace(case, rule="swat").densities(network)) == shortcuts


def test_erdos_renyi_kernel_has_as_many_weights_but_more_work() -> None:
    found = []
    for budget in ("uniform", "erk"):
        case = Workload(batch=1, sparsity=0.9, budget=budget)  # type: ignore[arg-type]
        network, mask = case.pruned_network()
        found.append(
            (sum(int(m.sum()) for m in mask.values()), inference.forward_density(network.eval(), case.examples()[0]))
        )
    (few, work), (same, more) = found
    assert same == pytest.approx(few, rel=1e-4)
    assert more > 1.5 * work


@pytest.mark.parametrize("layout", workload.LAYOUTS)
@pytest.mark.slow
def test_the_dense_step_is_masked_training(layout: str) -> None:
    model, mask = SMALL.pruned_network()
    x, y = SMALL.examples()
    velocity = {name: torch.zeros_like(w) for name, w in model.named_parameters()}
    one = workload.dense_step(SMALL, "fp32", layout, frozen=True)
    for _ in range(4):
        loss = F.cross_entropy(model(x), y)
        assert float(one()) == pytest.approx(float(loss.detach()), rel=1e-5)  # type: ignore[arg-type]
        found = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, w), g in zip(model.named_parameters(), found, strict=True):
                velocity[name].mul_(workload.MOMENTUM).add_(g)
                w.sub_(workload.LR * velocity[name])
                w.mul_(mask.get(name, torch.tensor(1)))


def test_the_density_of_inference_is_that_of_its_products() -> None:
    network, mask = SMALL.pruned_network()
    sizes = {"conv1": 16 * 9 * 64, "conv2": 32 * 16 * 9 * 64, "fc1": 512 * 128, "fc2": 128 * 10}
    real = sum(n * float(mask[f"{k}.weight"].float().mean()) if f"{k}.weight" in mask else n for k, n in sizes.items())
    assert inference.forward_density(network, SMALL.examples()[0]) == pytest.approx(real / sum(sizes.values()))


@pytest.mark.slow
def test_memory_grows_with_the_batch() -> None:
    if not (step.ITSELF / "clear_refs").exists():
        pytest.skip("the system does not tell a peak of one's own choice")
    few, many = (
        run_fresh(step.memory_growth, Workload("digits_net", n), 1, kind="fp32", layout="contiguous") for n in (8, 4096)
    )
    assert few is not None
    assert many is not None
    activations = 4096 * (2 * 16 * 64 + 2 * 32 * 64) * 4 / 1e6  # conv1 and conv2, before and after ReLU
    assert activations < many - few < 4 * activations


# with the kernels


@pytest.mark.parametrize("rule", ["frozen", "swat"])
@pytest.mark.system
def test_the_sparse_step_is_measured_beside_the_dense_one(here: None, rule: str) -> None:
    needs_kernels()
    row = step.measure_step(replace(SMALL, batch=16, rule=rule), Effort(1, 1, 20.0))  # type: ignore[arg-type]
    assert row.density_per_multiply_add is not None
    assert 0.05 < row.density_per_multiply_add < 0.5
    if row.samples_kept:
        assert row.ms_sparse
        assert row.ratio_fp32 == pytest.approx(row.ms_dense_fp32 / row.ms_sparse)  # type: ignore[operator]
        assert row.share_of_roof == pytest.approx(row.roof_ms / row.ms_sparse)  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits_net", "linear", "leaf_cnn", "char_gpt"])
def test_the_sparse_step_learns_what_the_dense_one_does(model: str) -> None:
    needs_kernels()
    case = Workload(model, 16, 0.9)
    dense, sparse = (
        workload.dense_step(case, "fp32", "contiguous", True),
        workload.sparse_step(workload.sparse_trainer(case), case),
    )
    for _ in range(3):
        assert float(sparse()) == pytest.approx(float(dense()), rel=1e-3)  # type: ignore[arg-type]


@pytest.mark.system
def test_inference_is_measured_for_one_example(here: None) -> None:
    needs_kernels()
    for model in (SMALL.model, "char_gpt"):
        row = inference.measure_inference(replace(SMALL, model=model, batch=1), Effort(1, 1, 20.0))
        assert row.ms_sparse or not row.samples_kept


# the commands


class Narrow(torch.nn.Module):
    """A network of somebody's own, of numbers, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(12, 32), torch.nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(torch.relu(self.a(x * (2 if x.sum() > 1e9 else 1))))
        return y


def test_inference_of_a_trained_model_is_measured_at_its_own_zeros(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedsieve.cli import app

    compressed = compress(Narrow(), 0.25, "uniform", shape=(12,))
    file, hub = tmp_path / "own.fsv", tmp_path / "hub"
    file.write_bytes(encode_model(compressed.metadata, compressed.weights()))
    write_hub_folder(compressed, hub)
    own = ["--recipe", f"{Path(__file__)}:Narrow", "--samples", "1", "--seconds", "0", "--json", "--batch", "2"]
    for path in (file, hub):
        app(["bench", "infer", "--model", str(path), *own], standalone_mode=False)
        said = capsys.readouterr()
        (row,) = map(json.loads, said.out.splitlines())
        assert list(row) == KEYS
        assert row["sparsity"] == pytest.approx(1 - compressed.density(), abs=1e-3)
        assert row["density_per_multiply_add"] == pytest.approx(0.25, abs=1e-3)
        assert row["ms_dense_fp32"] or not row["samples_kept"]
    with pytest.raises(InputError, match="has zeros of its own: leave --sparsity"):
        app(["bench", "infer", "--model", str(file), *own, "--sparsity", ".9"], standalone_mode=False)
    with pytest.raises(InputError, match="name the function that makes it"):
        app(["bench", "infer", "--model", str(file), "--json"], standalone_mode=False)
    with pytest.raises(InputError, match="resnet18 is none"):
        app(["bench", "infer", "--recipe", "x.py:X"], standalone_mode=False)
    file.write_bytes(encode_model(replace(compressed.metadata, shape=()), compressed.weights()))
    workload._opened.cache_clear()
    with pytest.raises(InputError, match="does not say what one example is"):
        app(["bench", "infer", "--model", str(file), *own], standalone_mode=False)


@pytest.mark.slow
def test_without_kernels_the_dense_numbers_are_there(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedsieve.cli import app

    for module in (step, inference, kernels):
        monkeypatch.setattr(module, "unavailable_reason", lambda: "no compiler")
    words = ["--model", "digits_net", "--samples", "1", "--seconds", "0", "--json"]
    app(["bench", "step", *words, "--sparsity", ".9,.95", "--batch", "8"], standalone_mode=False)
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["sparsity"] for row in rows] == [0.9, 0.95]
    assert all(list(row) == KEYS for row in rows)
    assert all(row["ms_sparse"] is row["ratio_fp32"] is row["peak_mb_sparse"] is None for row in rows)
    assert said.err.count("\n") == 1
    assert "no compiler" in said.err
    app(["bench", "infer", *words, "--batch", "1,8"], standalone_mode=False)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["batch"] for row in rows] == [1, 8]
    assert all(list(row) == KEYS for row in rows)
    app(["bench", "step", *words[:-1]], standalone_mode=False)
    said = capsys.readouterr()
    assert "cores" in said.out.splitlines()[0]
    assert "digits_net" in said.out


@pytest.mark.system
def test_a_step_from_the_command_line(tmp_path: Path) -> None:
    words = ("--model", "digits_net", "--sparsity", "0.9", "--samples", "1", "--seconds", "1", "--json")
    said = bench("step", *words, "--threads", "1", cwd=tmp_path).stdout
    (row,) = [json.loads(line) for line in said.splitlines()]
    assert list(row) == KEYS
    assert row["model"] == "digits_net"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("step", "--model", "vgg"), "unknown model 'vgg'; there are resnet18, leaf_cnn"),
        (("infer", "--model", "runs/none"), "or a run directory, a .fsv file or a hub folder that is there"),
        (("step", "--sparsity", "0.9,x"), "--sparsity takes a number, or several"),
        (("step", "--sparsity", "1"), "sparsity must lie in [0, 1)"),
        (("step", "--rule", "top"), "unknown rule 'top'"),
        (("step", "--batch", "0"), "batch must be at least 1"),
        (("infer", "--storage", "fp8"), "unknown storage 'fp8'"),
        (("infer", "--batch", "1.5"), "--batch takes a number"),
        (("step", "--model", "digits_net", "--policy", "fc9"), "policy 'fc9' matches no layer"),
        (("step", "--period", "3"), "period is a number of steps of --rule swat, got 3 with --rule frozen"),
        (("step", "--budget", "fair"), "unknown budget 'fair'"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], part: str) -> None:
    from fedsieve.cli import app

    with pytest.raises(InputError) as caught:
        app(["bench", *words], standalone_mode=False)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("every", "bits"), [(2, 1.0), (4, 0.811278)])
def test_the_entropy_of_positions_is_that_of_a_coin(every: int, bits: float) -> None:
    value = Sparse.of(torch.ones(40, 50), (torch.arange(2000) % every == 0).view(40, 50))
    positions, values = tensor_entropy("w", value, NOTHING, "f32")
    assert positions == pytest.approx(2000 * bits, rel=1e-5)
    assert values == 23 * 2000 / every  # one sign, one exponent, and the mantissa as it is


@pytest.mark.slow
def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(InputError, match=r"could not be measured: .*KeyError: 'diagonal'"):
        run_fresh(step.memory_growth, SMALL, 1, kind="fp32", layout="diagonal")
