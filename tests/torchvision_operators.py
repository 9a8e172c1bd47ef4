"""Lets torchvision, and what imports it (timm, transformers, peft), be imported beside any build of PyTorch.

Its compiled operators are built for one kind of PyTorch: those of the wheel on PyPI want CUDA, and do not load beside a
PyTorch for CPUs. Importing it then fails, since it describes two of its operators by name. Declared beforehand they are
there, and are never called: no network of the tests finds boxes.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

DECLARED: list[torch.library.Library] = []
"""What declares the operators: they go with it."""

if (spec := find_spec("torchvision")) and spec.origin:
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
    except OSError:
        DECLARED.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
