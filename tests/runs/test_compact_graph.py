"""Zeros left out of ONNX files, and int8 weights: onnxruntime's answers beside PyTorch's, sizes, and accuracy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deployed_models import make
from fedsieve import InputError
from fedsieve.runs.compact_graph import byte_gaps, dequantize
from fedsieve.runs.compression import compress
from fedsieve.runs.export import check_export_path, export, quantization_cost, quantized
from fedsieve.runs.model import load_test_set, open_model


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_onnx_leaves_zeros_out_and_answers_the_same(weights: str, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make("mnist_net", (1, 28, 28), mean=(0.1307,), std=(0.3081,))
    with torch.no_grad():
        for w in model.network.parameters():
            if w.dim() > 1:
                w.copy_(torch.randn(w.shape) * w[0].numel() ** -0.5)
    small = compress(model, 0.1)
    out = tmp_path / "m.onnx"
    export(small, out, weights)
    onnx.checker.check_model(onnx.load(out), full_check=True)
    nonzeros = sum(int(v.count_nonzero()) for v in small.weights().values())
    assert out.stat().st_size <= {"float32": 1.3 * 4, "int8": 2.1}[weights] * nonzeros + 8000
    session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
    expected = small if weights == "float32" else quantized(small)
    raw = torch.rand(3, 1, 28, 28)
    (found,) = session.run(None, {"input": raw.numpy()})
    assert np.abs(found - expected.network(expected.normalize(raw)).numpy()).max() < 1e-4
    if weights == "int8":
        assert not torch.allclose(expected.network(expected.normalize(raw)), small.network(small.normalize(raw)))


def test_gaps_give_the_positions_back() -> None:
    for positions in ([], [0], [254], [255], [256], [510, 511], [3, 1000, 1001, 5000]):
        gaps, entries = byte_gaps(np.array(positions, np.int64))
        assert (gaps > 0).all()
        assert (np.cumsum(gaps.astype(np.int64)) - 1)[entries].tolist() == positions


def test_int8_is_to_the_nearest_of_each_channel() -> None:
    w = torch.tensor([[127.0, -1.4, 0.6], [0.0, 0.0, 0.0], [-2.54, 0.0, 0.03]])
    assert torch.allclose(dequantize(w), torch.tensor([[127.0, -1.0, 1.0], [0.0] * 3, [-2.54, 0.0, 0.04]]), atol=1e-6)


def test_int8_says_what_it_costs(run: Path, tmp_path: Path) -> None:
    model = open_model(run)
    line = quantization_cost(model)
    test = load_test_set(model.metadata)
    right = [
        float((one.network(one.normalize(test.x)).argmax(1) == test.y).float().mean())
        for one in (model, quantized(model))
    ]
    shares = [f"{share:.2%}" for share in right]
    assert line == f"accuracy {shares[0]} in float32, {shares[1]} with int8 weights, of 100 test examples"
    with pytest.raises(InputError, match="--weights int8 is of ONNX alone"):
        check_export_path(tmp_path / "m.fsv", "int8")
    with pytest.raises(InputError, match="--weights must be one of float32, int8"):
        check_export_path(tmp_path / "m.onnx", "int4")
