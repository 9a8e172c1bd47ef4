"""What the benchmarks measure: which samples count, what is compared, and what the tables and the JSON say."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedsieve import kernels
from fedsieve.bench import clock, infer, memory, step, training
from fedsieve.bench.cases import NETWORKS, SHAPES, Case
from fedsieve.bench.clock import Work
from fedsieve.bench.compare import Effort, compared
from fedsieve.bench.fresh import fresh
from fedsieve.types import InputError

ROOT = Path(__file__).parent.parent
SMALL = Case("digits_net", 8, 0.9)
STEP = [
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
    "peak_mb_sparse",
    "peak_mb_dense",
    "samples_kept",
    "samples_dropped",
]
"""The keys that ``fedsieve bench step --json`` promises."""


def needs_kernels() -> None:
    if why := kernels.reason():
        pytest.skip(why)


def bench(*words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "fedsieve", "bench", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process."""

    def near(function: Any, case: Case, threads: int, /, **options: Any) -> Any:
        return json.loads(json.dumps(function(case, **options)))

    for module in (step, infer):
        monkeypatch.setattr(module, "fresh", near)
    monkeypatch.setattr(memory, "peak", lambda case, threads: 1.5)
    monkeypatch.setattr(memory, "dense_peak", lambda *_: 6.0)


# the clock


@pytest.mark.parametrize(
    ("waiting", "steal", "quiet"), [(0.0, 0, True), (1e-4, 0, True), (0.01, 0, False), (0.0, 1, False)]
)
def test_a_sample_counts_only_if_nobody_disturbed_it(
    monkeypatch: pytest.MonkeyPatch, waiting: float, steal: int, quiet: bool
) -> None:
    waits, ticks, times = iter([5.0, 5.0 + waiting]), iter([7, 7 + steal]), iter([1.0, 1.02])
    monkeypatch.setattr(clock, "waited", lambda: next(waits))
    monkeypatch.setattr(clock, "stolen", lambda: next(ticks))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(times))
    seconds, counts = clock.sample(lambda: None)
    assert (round(seconds, 9), counts) == (0.02, quiet)


def test_a_summary_is_the_median_of_what_counts() -> None:
    assert clock.summary([(1.0, True), (9.0, False), (3.0, True), (2.0, True)]) == (2.0, 3, 1)
    nothing = clock.summary([(1.0, False)])
    assert math.isnan(nothing.seconds)
    assert nothing.ms is None
    assert nothing[1:] == (0, 1)


def test_variants_take_turns_until_each_has_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    order, quiet = [], iter([True, False, True, True])
    works = {name: Work(lambda name=name: order.append(name), 2) for name in "ab"}  # type: ignore[misc]

    def sample(work: Work) -> tuple[float, bool]:
        work()
        return 6.0, next(quiet)

    monkeypatch.setattr(clock, "sample", sample)
    found = clock.in_turns(works, 1, 60.0)
    assert "".join(order) == "aabbaabb"
    assert found == {"a": (3.0, 2, 0), "b": (3.0, 1, 1)}  # of one call


def test_variants_stop_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "sample", lambda work: (1.0, False))
    assert clock.in_turns({"a": Work(lambda: None)}, 5, 0.0)["a"][1:] == (0, 1)


def test_a_sample_is_long_enough_and_of_whole_groups() -> None:
    work = clock.warm(lambda: clock.time.sleep(0.001), group=3)
    assert work.calls % 3 == 0
    assert work.calls * 0.001 >= clock.SHORTEST / 3


def test_the_system_tells_how_long_threads_wait() -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc")
    assert clock.waited() >= 0
    assert clock.stolen() >= 0
    assert "torch" in clock.machine()


# what is compared


def test_the_fastest_variant_of_a_kind_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {("sparse",): (0.01, 5), ("fp32", "a"): (0.06, 4), ("fp32", "b"): (0.05, 9), ("bf16",): (0.02, 6)}
    timings = {key: clock.Timing(seconds, kept, 10 - kept) for key, (seconds, kept) in took.items()}
    monkeypatch.setattr("fedsieve.bench.compare.in_turns", lambda *_: timings)
    found = compared({}, Effort(1))
    assert found["ms_dense_fp32"] == pytest.approx(50)
    assert (found["ratio_fp32"], found["ratio_bf16"]) == pytest.approx((5, 2))
    assert (found["samples_kept"], found["samples_dropped"]) == (4, 6)


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_has_its_images_and_its_sparse_layers(model: str) -> None:
    case = Case(model, 2, 0.75)
    network, mask = case.pruned()
    x, y = case.examples()
    assert network(x).shape == (2, SHAPES[model][2])
    assert int(y.max()) < SHAPES[model][2]
    for name, own in mask.items():
        assert float(own.float().mean()) == pytest.approx(0.25, abs=0.01)
        assert not network.get_parameter(name)[~own].any()


def test_resnets_first_convolution_and_classifier_stay_dense() -> None:
    case = Case()
    network = case.network()
    assert network.get_submodule("layer2.0.shortcut.0").weight is not None
    every = {name for name, v in network.named_parameters() if v.dim() > 1}
    assert every - set(case.densities(network)) == {"conv1.weight", "fc.weight"}
    shortcuts = {f"layer{i}.0.shortcut.0.weight" for i in (2, 3, 4)}
    assert set(case.densities(network)) - set(replace(case, rule="swat").densities(network)) == shortcuts


def test_erdos_renyi_kernel_has_as_many_weights_but_more_work() -> None:
    found = []
    for budget in ("uniform", "erk"):
        case = Case(batch=1, sparsity=0.9, budget=budget)  # type: ignore[arg-type]
        network, mask = case.pruned()
        found.append((sum(int(m.sum()) for m in mask.values()), infer.density(network.eval(), case.examples()[0])))
    (few, work), (same, more) = found
    assert same == pytest.approx(few, rel=1e-4)
    assert more > 1.5 * work


@pytest.mark.parametrize("layout", training.LAYOUTS)
def test_the_dense_step_is_masked_training(layout: str) -> None:
    model, mask = SMALL.pruned()
    x, y = SMALL.examples()
    velocity = {name: torch.zeros_like(w) for name, w in model.named_parameters()}
    one = training.dense(SMALL, "fp32", layout, frozen=True)
    for _ in range(4):
        loss = F.cross_entropy(model(x), y)
        assert float(one()) == pytest.approx(float(loss.detach()), rel=1e-5)  # type: ignore[arg-type]
        found = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, w), g in zip(model.named_parameters(), found, strict=True):
                velocity[name].mul_(training.MOMENTUM).add_(g)
                w.sub_(training.LR * velocity[name])
                w.mul_(mask.get(name, torch.tensor(1)))


def test_the_density_of_inference_is_that_of_its_products() -> None:
    network, mask = SMALL.pruned()
    sizes = {"conv1": 16 * 9 * 64, "conv2": 32 * 16 * 9 * 64, "fc1": 512 * 128, "fc2": 128 * 10}
    real = sum(n * float(mask[f"{k}.weight"].float().mean()) if f"{k}.weight" in mask else n for k, n in sizes.items())
    assert infer.density(network, SMALL.examples()[0]) == pytest.approx(real / sum(sizes.values()))


def test_memory_grows_with_the_batch() -> None:
    if not (memory.ITSELF / "clear_refs").exists():
        pytest.skip("the system does not tell a peak of one's own choice")
    few, many = (fresh(memory.grown, Case("digits_net", n), 1, kind="fp32", layout="contiguous") for n in (8, 4096))
    assert few is not None
    assert many is not None
    activations = 4096 * (2 * 16 * 64 + 2 * 32 * 64) * 4 / 1e6  # conv1 and conv2, before and after ReLU
    assert activations < many - few < 4 * activations


# with the kernels


@pytest.mark.parametrize("rule", ["frozen", "swat"])
def test_the_sparse_step_is_measured_beside_the_dense_one(here: None, rule: str) -> None:
    needs_kernels()
    row = step.measured(replace(SMALL, batch=16, rule=rule), Effort(1, 1, 20.0))  # type: ignore[arg-type]
    assert row.density_per_multiply_add is not None
    assert 0.05 < row.density_per_multiply_add < 0.5
    if row.samples_kept:
        assert row.ms_sparse
        assert row.ratio_fp32 == pytest.approx(row.ms_dense_fp32 / row.ms_sparse)  # type: ignore[operator]


@pytest.mark.parametrize("model", ["digits_net", "linear", "leaf_cnn"])
def test_the_sparse_step_learns_what_the_dense_one_does(model: str) -> None:
    needs_kernels()
    case = Case(model, 16, 0.9)
    dense, sparse = training.dense(case, "fp32", "contiguous", True), training.sparse(training.trainer(case), case)
    for _ in range(3):
        assert float(sparse()) == pytest.approx(float(dense()), rel=1e-3)  # type: ignore[arg-type]


def test_inference_is_measured_for_one_example(here: None) -> None:
    needs_kernels()
    row = infer.measured(replace(SMALL, batch=1), Effort(1, 1, 20.0))
    assert row.ms_sparse or not row.samples_kept


# the commands


def test_without_kernels_the_dense_numbers_are_there(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedsieve.cli import app

    for module in (step, infer, kernels):
        monkeypatch.setattr(module, "reason", lambda: "no compiler")
    words = ["--model", "digits_net", "--samples", "1", "--seconds", "0", "--json"]
    app(["bench", "step", *words, "--sparsity", ".9,.95", "--batch", "8"], standalone_mode=False)
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["sparsity"] for row in rows] == [0.9, 0.95]
    assert all(list(row) == STEP for row in rows)
    assert all(row["ms_sparse"] is row["ratio_fp32"] is row["peak_mb_sparse"] is None for row in rows)
    assert said.err.count("\n") == 1
    assert "no compiler" in said.err
    app(["bench", "infer", *words, "--batch", "1,8"], standalone_mode=False)
    assert [json.loads(line)["batch"] for line in capsys.readouterr().out.splitlines()] == [1, 8]
    app(["bench", "step", *words[:-1]], standalone_mode=False)
    said = capsys.readouterr()
    assert "cores" in said.out.splitlines()[0]
    assert "digits_net" in said.out


@pytest.mark.slow
def test_a_step_from_the_command_line(tmp_path: Path) -> None:
    words = ("--model", "digits_net", "--sparsity", "0.9", "--samples", "1", "--seconds", "1", "--json")
    said = bench("step", *words, "--threads", "1", cwd=tmp_path).stdout
    (row,) = [json.loads(line) for line in said.splitlines()]
    assert list(row) == STEP
    assert row["model"] == "digits_net"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("step", "--model", "vgg"), "unknown model 'vgg'; there are resnet18, leaf_cnn"),
        (("step", "--sparsity", "0.9,x"), "--sparsity takes a number, or several"),
        (("step", "--sparsity", "1"), "sparsity must lie in [0, 1)"),
        (("step", "--rule", "top"), "unknown rule 'top'"),
        (("step", "--batch", "0"), "batch must be at least 1"),
        (("infer", "--storage", "fp8"), "unknown storage 'fp8'"),
        (("infer", "--batch", "1.5"), "--batch takes a number"),
        (("step", "--model", "digits_net", "--policy", "fc9"), "policy 'fc9' matches no layer"),
        (("step", "--budget", "fair"), "unknown budget 'fair'"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], part: str) -> None:
    from fedsieve.cli import app

    with pytest.raises(InputError) as caught:
        app(["bench", *words], standalone_mode=False)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(InputError, match=r"could not be measured: .*KeyError: 'diagonal'"):
        fresh(memory.grown, SMALL, 1, kind="fp32", layout="diagonal")


# the tables


@pytest.fixture
def performance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import performance

    monkeypatch.setattr(performance, "RESULTS", tmp_path / "performance.json")
    monkeypatch.setattr(performance.runs, "RESULTS", tmp_path / "kernels.json")
    return performance


def fabricated(name: str, case: Case, effort: Effort) -> dict[str, Any]:
    times = {"ms_sparse": 41.0, "ms_dense_fp32": 287.0, "ms_dense_bf16": 164.0, "ratio_fp32": 7.0, "ratio_bf16": 4.0}
    return {"density_per_multiply_add": 0.0525, **times, "samples_kept": effort.samples, "samples_dropped": 2}


def test_the_picture_shows_the_numbers(performance: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import picture

    rows = [
        {"table": "frozen", "case": {"sparsity": s}, "ms_sparse": ms, "ms_dense_fp32": 200 + ms, "ms_dense_bf16": 150.0}
        | {"ratio_fp32": 200 / ms}
        for s, ms in ((0.99, 10.0), (0.9, 50.0))
    ] + [{"table": "swat", "case": {"sparsity": 0.9}, "ms_sparse": 1.0}]
    assert [bar[:3] for bar in picture.bars(rows)] == [
        ("PyTorch, dense fp32", 210.0, ""),
        ("PyTorch, bf16 autocast", 150.0, ""),
        ("FedSieve, fp32, 90 % zeros", 50.0, "4.0x"),
        ("FedSieve, fp32, 99 % zeros", 10.0, "20.0x"),
    ]
    performance.RESULTS.write_text(json.dumps(rows))
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "step.png")
    picture.main()
    assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


def test_a_table_shows_what_was_measured_and_wanted(performance: Any) -> None:
    wanted, effort = performance.PLAN["frozen"][1], Effort(2)
    numbers = fabricated("frozen", wanted.case, effort)
    told = {"table": "frozen", "case": asdict(wanted.case), **performance.circumstances(effort), **numbers}
    lines = performance.table("frozen", [told]).splitlines()
    assert lines[2] == "| 90 % | - | - | - | - | - | 4.5x | 7x | - | - |"
    assert lines[3] == "| 95 % | 5.25 % | 41.0 | 287 | 164 | 7.0x | 7x | 12x | 4.0x | 7 (2) |"
    assert "2 threads, kernels for" in performance.hardware([told])


def test_every_row_is_measured_once_and_a_poor_one_again(
    performance: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measured(name: str, case: Case, effort: Effort) -> dict[str, Any]:
        asked.append(name)
        poor = {"samples_kept": 1} if name == "swat" and len(asked) < 40 else {}
        return fabricated(name, case, effort) | poor

    monkeypatch.setattr(performance, "measured", measured)
    monkeypatch.setattr(performance.runs, "main", lambda: asked.append("runs"))
    monkeypatch.setattr(sys, "argv", ["performance.py"])
    planned = [name for name, lines in performance.PLAN.items() for _ in lines]
    performance.main()
    assert asked == [*planned, "runs"]
    assert len(performance.committed()) == len(planned)
    asked.clear()
    performance.main()
    assert asked == ["swat"] * len(performance.PLAN["swat"]) + ["runs"]
    asked.clear()
    monkeypatch.setattr(sys, "argv", ["performance.py", "--quick"])
    before = performance.RESULTS.read_bytes()
    performance.main()
    assert asked == planned
    assert performance.RESULTS.read_bytes() == before
    assert "wanted" in capsys.readouterr().out


def test_the_table_of_runs(performance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, ran = performance.runs, []

    def one(recipe: str, kernels: str, seed: int) -> list[dict[str, Any]]:
        ran.append((kernels, seed))
        slow = 6.0 if kernels == "dense" else 2.0
        rows = [{"round": t, "seconds": slow + t, "accuracy": 0.5 + t / 10 + seed / 100} for t in range(3)]
        rows = [row | {"cpu_seconds": 0.99 * row["seconds"]} for row in [*rows, {"round": 3, "seconds": 0.0}]]
        return [*rows, {"round": 4, "seconds": 99.0, "cpu_seconds": 90.0}]  # disturbed

    def tested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"accuracy": None} | row for row in rows]

    monkeypatch.setattr(runs, "one", lambda *run: tested(one(*run)))
    found = {"flash.mnist": runs.measure("flash.mnist")}
    assert ran == [(kernels, seed) for seed in (0, 1, 2) for kernels in ("dense", "sparse")]
    line = "| `flash.mnist` | 30 | 7.00 | 3.00 | 2.3x | 18 (6) | 71.0 (70.0, 71.0, 72.0) | 71.0 (70.0, 71.0, 72.0) |"
    assert runs.table(found).splitlines()[3] == line


def test_a_median_of_rounds_needs_three_undisturbed_ones(performance: Any) -> None:
    rows = [{"seconds": s, "cpu_seconds": c} for s, c in ((1.0, 1.0), (2.0, 1.97), (3.0, 2.9), (4.0, 4.0))]
    timed = performance.runs.timed
    assert timed(rows) == {"seconds": 2.0, "rounds_kept": 3, "rounds_dropped": 1}
    assert timed(rows[:3]) == {"seconds": None, "rounds_kept": 2, "rounds_dropped": 1}


def test_messages_are_weighed_as_the_table_says() -> None:
    from fedsieve.bench.wire import Case, beside, csr_bytes, cut, entropy_bits, measured
    from fedsieve.wire import Known, Manifest

    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(300, 400, generator=generator), "v": torch.randn(90, 90, generator=generator)}
    base = {n: v * (1 + 0.01 * torch.randn(v.shape, generator=generator)) for n, v in params.items()}
    tree = cut(params, 0.1)
    row = measured(Case("drawn", tree, "manifest", Known(Manifest.of(params))), repeats=1)
    known = measured(Case("drawn", tree, "base", Known(Manifest.of(params), base)), repeats=1)
    nnz = round(0.1 * 128_100)
    assert row.density == pytest.approx(0.1, abs=1e-4)
    assert (row.csr_bytes, row.dense_bytes) == (8 * nnz + 260, 4 * 128_100)
    assert csr_bytes(tree) == row.csr_bytes
    assert 0.9 < row.bytes / row.entropy_bytes < 1.03
    assert 0.9 < known.bytes / known.entropy_bytes < 1.06
    assert known.bytes < 0.8 * row.bytes
    assert row.churn is None
    assert known.churn is not None
    assert 0 < known.churn < 0.05
    peers = {told["codec"]: told["bytes"] for told in beside(tree, repeats=1)}
    assert len(peers) == 4
    assert min(peers, key=lambda name: peers[name]) == "FedSieve"
    assert entropy_bits("w", torch.ones(64, 64), Known(), "f32") == 64 * 64 * 23  # one sign, one exponent


def test_bench_wire_prints_the_rows_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsieve.bench import wire
    from fedsieve.bench.commands import wire_command
    from fedsieve.types import InputError

    small = {"w": torch.randn(40, 50, generator=torch.Generator().manual_seed(0))}
    monkeypatch.setattr(wire, "drawn", lambda densities: wire.cases("small", small, small, densities))
    threads = torch.get_num_threads()
    wire_command("0.05,0.2", True)
    torch.set_num_threads(threads)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = ["case", "density", "known", "values", "bytes", "entropy_bytes", "csr_bytes", "dense_bytes"]
    assert list(rows[0])[:10] == [*wanted, "encode_mb_s", "decode_mb_s"]
    assert [row["values"] for row in rows] == [
        "f32",
        "f32",
        *(v for v in ("bf16", "int8", "int4") for _ in range(2)),
        "f32",
        "f32",
    ]
    with pytest.raises(InputError, match="between 0 and 1"):
        wire_command("2", True)
