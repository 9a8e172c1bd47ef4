"""A model of tokens as ``torch.export`` gives it: for batches of any size, with its layers as plain ones."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import transformer

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.inputs import Inputs
from fedsieve.kernels.places import SAMPLES
from fedsieve.sparse.layers import SparseLayer


def export_program(model: nn.Module, inputs: Inputs, training: bool) -> Any:
    """Return the ``ExportedProgram`` of a model, which is left as it was. Raises Unsupported if there is none."""
    modes = {m: m.training for m in model.modules()}
    args, kwargs = inputs.zeros(SAMPLES + 1)
    try:
        with _plain_layers(model), torch.random.fork_rng(devices=[]), redirect_stderr(io.StringIO()):
            batch: Any = {0: torch.export.Dim.AUTO}
            batches = dict.fromkeys(kwargs, batch) if kwargs else (batch,) * len(args)
            return torch.export.export(model.train(training), args, kwargs, dynamic_shapes=batches, strict=False)
    except Exception as error:
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise Unsupported(f"the model cannot be exported ({line})") from error
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def _plain_layers(model: nn.Module) -> Iterator[None]:
    """Let sparse layers be exported as plain ones, without the hooks that count, and failures without a log.

    Hugging Face's models, whose ``config.use_cache`` is on by default, make no cache of keys and values. PyTorch's
    encoder does not look whether its mask is the causal one, which depends on numbers and changes none.
    """
    layers = [m for m in model.modules() if isinstance(m, SparseLayer)]
    hooks = [(m, name, getattr(m, name)) for m in model.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]
    own_configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(config): config for config in own_configs if getattr(config, "use_cache", False)}
    level, detect = logging.root.manager.disable, transformer._detect_is_causal_mask
    logging.disable(logging.CRITICAL)
    for layer in layers:
        plain = nn.Conv2d.forward if isinstance(layer, nn.Conv2d) else nn.Linear.forward
        layer.forward = partial(plain, layer)  # type: ignore[arg-type]
    for m, name, own in hooks:
        setattr(m, name, type(own)())
    for config in configs.values():
        config.use_cache = False
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        logging.disable(level)
        transformer._detect_is_causal_mask = detect
        for config in configs.values():
            config.use_cache = True
        for layer in layers:
            del layer.forward
        for m, name, own in hooks:
            setattr(m, name, own)
