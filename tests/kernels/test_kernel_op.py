"""CONTRIBUTING says which files a kernel op touches: a copy of the sources gets leaky ReLU, in those files alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from extension import ROOT, Extension
from fedsieve.kernels import build, library
from native_sources import SHARED

PACKAGE, NATIVE = "src/fedsieve/kernels", "src/fedsieve/kernels/native"

LEAKY = Extension(
    {
        f"{NATIVE}/leaky.cpp": """// Leaky ReLU, and its gradient.
#include "vec.h"

namespace {

template <class S>
void rows(const Leaky& g, int thread, int threads) {
    const Home home(g.in, thread, threads);
    Steps ins(g.in), from(g.from), to(g.out);
    for (int64_t c = home.channels.begin; c < home.channels.end; c++) {
        each_line(g.in, home.lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
            const uint32_t *p = ins.at(c, b) + h * ins.row, *r = from.at(c, b) + h * from.row;
            uint32_t* q = to.at(c, b) + h * to.row;
            for (int w = 0; w < g.in.width; w++, p += WORDS, q += WORDS, r += WORDS) {
                V x[S::K], y[S::K];
                S::read(p, x);
                S::read(r, y);
                for (int k = 0; k < S::K; k++) y[k] = select(x[k] > zero(), y[k], y[k] * all(g.slope));
                S::write(q, y);
            }
        });
        zero_halo(g.out, c, home.lines);
    }
}

}  // namespace

void leaky(const Leaky& g, int thread, int threads) {
    g.in.packed ? rows<Bf16>(g, thread, threads) : rows<Fp32>(g, thread, threads);
}
"""
    },
    {
        f"{NATIVE}/abi.h": [
            (
                "struct Op {\n",
                "// out = from where in > 0, and else slope * from.\n"
                "struct Leaky {\n    Map in, from, out;\n    float slope;\n};\n\nstruct Op {\n",
            ),
            (
                "X(VECTOR_COMBINATION, VectorCombination, vector_combination)",
                "X(VECTOR_COMBINATION, VectorCombination, vector_combination) X(LEAKY, Leaky, leaky)",
            ),
        ],
        f"{PACKAGE}/abi.py": [
            (
                "class Instruction(",
                "class LeakyOp(Operation):\n    kind = 39\n"
                '    _fields_ = fields_of((FeatureMap, "in_ from_ out"), (c_float, "slope"))\n\n\nclass Instruction(',
            ),
        ],
        f"{PACKAGE}/graph.py": [
            (
                "@dataclass(eq=False)\nclass FlattenLayer",
                "@dataclass(eq=False)\nclass LeakyLayer(Layer):\n    slope: float\n\n\n"
                "@dataclass(eq=False)\nclass FlattenLayer",
            ),
        ],
        f"{PACKAGE}/trace.py": [
            ("    NormLayer,\n", "    LeakyLayer,\n    NormLayer,\n"),
            (
                "        if which := relu_of(kind, node):\n",
                "        if type(kind) is nn.LeakyReLU:\n"
                "            return self._add(LeakyLayer([x], _value(node), kind.negative_slope))\n"
                "        if which := relu_of(kind, node):\n",
            ),
        ],
        f"{PACKAGE}/training.py": [
            ("    CopyOp,\n", "    CopyOp,\n    LeakyOp,\n"),
            ("    FallbackLayer,\n", "    FallbackLayer,\n    LeakyLayer,\n"),
            (
                "            self.arena.step(lambda: CopyOp(ins[0], out, CopyOp.FLATTEN), ins[0], out)\n",
                "            self.arena.step(lambda: CopyOp(ins[0], out, CopyOp.FLATTEN), ins[0], out)\n"
                "        elif isinstance(layer, LeakyLayer):\n"
                "            self.arena.step(lambda: LeakyOp(ins[0], ins[0], out, layer.slope), ins[0], out)\n",
            ),
            (
                "            self.deliver(layer.inputs[0], lambda to: CopyOp(g, to, CopyOp.UNFLATTEN), g)\n",
                "            self.deliver(layer.inputs[0], lambda to: CopyOp(g, to, CopyOp.UNFLATTEN), g)\n"
                "        elif isinstance(layer, LeakyLayer):\n"
                "            self.recompute(layer.inputs[0])\n"
                "            x = self.activations[layer.inputs[0]]\n"
                "            self.deliver(layer.inputs[0], lambda to: LeakyOp(x, g, to, layer.slope), x, g)\n",
            ),
        ],
        f"{PACKAGE}/inference.py": [
            ("    CopyOp,\n", "    CopyOp,\n    LeakyOp,\n"),
            ("    FusedProduct,\n", "    FusedProduct,\n    LeakyLayer,\n"),
            (
                "        elif isinstance(layer, PoolLayer):\n",
                "        elif isinstance(layer, LeakyLayer):\n"
                "            self.arena.step(lambda: LeakyOp(ins[0], ins[0], out, layer.slope), *ins, out)\n"
                "        elif isinstance(layer, PoolLayer):\n",
            ),
        ],
        "tests/single_ops.py": [
            ("    ActivationOp,\n", "    ActivationOp,\n    LeakyOp,\n"),
            (
                "def _pool(\n",
                "def leaky_relu(x, grad=None, *, storage):\n"
                "    work = SingleOp(len(x), storage)\n"
                "    packed, out = work.pack(x), work.map(*x.shape[1:])\n"
                "    work.run(LeakyOp(packed, packed if grad is None else work.pack(grad), out, 0.25))\n"
                "    return work.unpack(out)\n\n\ndef _pool(\n",
            ),
        ],
        "tests/reference_ops.py": [
            (
                "def _gradient(",
                "def leaky_relu(x, grad=None):\n"
                "    return F.leaky_relu(x, 0.25) if grad is None else torch.where(x > 0, grad, 0.25 * grad)\n\n\n"
                "def _gradient(",
            ),
        ],
        "tests/kernels/test_kernels_ops.py": [
            (
                "POOLS = [",
                """@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("n", SIZES)
def test_leaky_relu(n, storage):
    x = randn(n, 3, 5, 4)
    for grad in (None, randn(n, 3, 5, 4, seed=1)):
        want = reference_ops.leaky_relu(x.double(), None if grad is None else grad.double())
        within(ops.leaky_relu(x, grad, storage=storage), want, 1, want.abs(), storage)


@pytest.mark.parametrize("bias", [True, False])
def test_leaky_relu_in_a_net(bias):
    from fedsieve.kernels import Predictor
    from stepping import Sgd, assert_as_dense

    torch.manual_seed(0)
    first = [torch.nn.Conv2d(2, 6, 3, padding=1, bias=bias), torch.nn.BatchNorm2d(6), torch.nn.LeakyReLU(0.25)]
    model = torch.nn.Sequential(*first, torch.nn.Conv2d(6, 5, 3), torch.nn.Flatten(), torch.nn.Linear(60, 4))
    assert assert_as_dense(model, (2, 6, 5), (17, 5, 17), Sgd(0.05, 0.9, 1e-2)).fallbacks == []
    predict = Predictor(model, 17)
    for n in (1, 17):
        x = randn(n, 2, 6, 5)
        torch.testing.assert_close(predict(x), model.eval()(x).detach())
    assert predict.reason is None


POOLS = [""",
            ),
        ],
    },
)


@pytest.mark.system
@SHARED
def test_a_kernel_op_trains_and_predicts(tmp_path: Path) -> None:
    """Compiled for the least instruction set, it computes what its reference does; nets with it, what PyTorch does."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    LEAKY.apply(tmp_path)
    isa, compiler = library.supported_isas()[-1], build.compiler()
    native = tmp_path / NATIVE
    command = [*compiler, *build.options(isa), *build.openmp(compiler), "-O0", "-shared", *native.glob("*.cpp")]
    test = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "leaky", "tests/kernels/test_kernels_ops.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "FEDSIEVE_ISA": isa, "FEDSIEVE_KERNELS_DIR": ""}
    for words in ([*command, "-o", native / f"libfedsieve-{isa}.so"], test):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^16 passed", done.stdout, re.M), done.stdout


def test_contributing_names_the_files_of_a_kernel_op() -> None:
    named = re.findall(r"`([\w/]*\.\w+)`", LEAKY.assert_named("a kernel op"))
    assert sorted(Path(path).name for path in named) == sorted(Path(path).name for path in LEAKY.changed)
