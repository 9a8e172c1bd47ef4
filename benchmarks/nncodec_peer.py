"""NNC (ISO/IEC 15938-17) by nncodec beside our messages: run by a Python of its own, since it needs numpy < 2.

    python3 -m venv nnc && nnc/bin/pip install nncodec
    NNCODEC_PYTHON=nnc/bin/python python benchmarks/wire.py

It reads dense arrays from an .npz, and prints bytes, the relative error of the weights, the share of the
non-zeros that come back as such, and seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any

import numpy as np


def measured(arrays: dict[str, Any], qp: int) -> dict[str, Any]:
    """Encode and decode with the quantiser's step that ``qp`` stands for."""
    from nncodec import nn

    with tempfile.TemporaryDirectory() as folder:
        settings = {"qp": qp, "verbose": False, "results": folder}
        began = time.process_time()
        data = nn.encode(dict(arrays), settings)
        out, began = time.process_time() - began, time.process_time()
        back = nn.decode(data, settings)
        again = time.process_time() - began
    weights = {n: v for n, v in arrays.items() if v.ndim > 1}
    lost = sum(float(((v - back[n].reshape(v.shape)) ** 2).sum()) for n, v in weights.items())
    error = (lost / sum(float((v**2).sum()) for v in weights.values())) ** 0.5
    common = sum(int(np.count_nonzero(v * back[n].reshape(v.shape))) for n, v in weights.items())
    share = common / sum(int(np.count_nonzero(v)) for v in weights.values())
    return {"qp": qp, "bytes": len(data), "error": error, "kept": share, "encode_s": out, "decode_s": again}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    file = np.load(sys.argv[1], allow_pickle=False)
    arrays = {name: file[name] for name in file.files}
    with redirect_stdout(sys.stderr):
        rows = [measured(arrays, int(qp)) for qp in sys.argv[2:]]
    print(json.dumps({"version": version("nncodec"), "rows": rows}))
