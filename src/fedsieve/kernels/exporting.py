"""A model of tokens as ``torch.export`` gives it: for batches of any size, with its layers as plain ones."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import transformer
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.inputs import Inputs
from fedsieve.kernels.places import SAMPLES
from fedsieve.sparse.layers import SparseLayer

LIKE = {
    "type_as": None, "expand_as": None, "view_as": None, "reshape_as": None,
    "zeros_like": 0, "ones_like": 1, "full_like": 2, "new_zeros": 0, "new_ones": 1, "new_full": 2,
}  # fmt: skip
"""Operations that are given another tensor for its sizes or its type alone, and the number that some are full of."""


def export_program(model: nn.Module, inputs: Inputs, training: bool) -> Any:
    """Return the ``ExportedProgram`` of a model, which is left as it was. Raises Unsupported if there is none."""
    modes = {m: m.training for m in model.modules()}
    args, kwargs = inputs.zeros(SAMPLES + 1)
    try:
        with (
            _put_back(model) as changes,
            _plain_layers(model),
            torch.random.fork_rng(devices=[]),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
            given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
            batches = tree_map(lambda _: {0: torch.export.Dim.AUTO}, given)
            program = torch.export.export(model.train(training), args, kwargs, dynamic_shapes=batches, strict=False)
        _check_kept(program, changes)
        _take_sizes(program.graph_module.graph, {*program.graph_signature.user_inputs})
        return program
    except Unsupported:
        raise
    except Exception as error:
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise Unsupported(f"the model cannot be exported ({line})") from error
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def _put_back(model: nn.Module) -> Iterator[list[tuple[str, Any]]]:
    """Give modules back the attributes that they had; yield a list for those that a call changes: as they were before.

    What is None before the first call, or an entry that a dictionary has not, is taken for what each call would make.
    """
    internal = nn.Module().__dict__.keys()
    states = [(m, {key: x for key, x in vars(m).items() if key not in internal}) for m in model.modules()]
    stores = [(key, x, copy.copy(x)) for _, state in states for key, x in state.items() if type(x) in (list, dict)]
    changes = list[tuple[str, Any]]()

    def note(called: nn.Module, *_: Any) -> None:
        if called is model:
            own = [(key, x, vars(m).get(key)) for m, state in states for key, x in state.items() if x is not None]
            changes.extend((key, x) for key, x, now in own if x is not now)
            own = [(key, old, now if type(now) is list else {k: now.get(k) for k in old}) for key, now, old in stores]
            changes.extend((key, old) for key, old, now in own if [*map(id, _values(old))] != [*map(id, _values(now))])

    hook = register_module_forward_hook(note)
    try:
        yield changes
    finally:
        hook.remove()
        for m, state in states:
            for key in vars(m).keys() - internal - state.keys():
                del m.__dict__[key]
            m.__dict__.update(state)
        for _, x, old in stores:
            x.clear()
            (x.extend if type(x) is list else x.update)(old)


def _values(x: Any) -> Any:
    return x.values() if type(x) is dict else x


def _check_kept(program: Any, changes: Sequence[tuple[str, Any]]) -> None:
    """Raise Unsupported where a call changes an attribute that it may have computed with, as a number or a tensor."""
    memory = {x.untyped_storage().data_ptr() for x in program.constants.values() if isinstance(x, Tensor)}
    for name, before in changes:
        if not isinstance(before, Tensor) or before.untyped_storage().data_ptr() in memory:
            raise Unsupported(f"the model keeps {name} from one call to the next")


def _take_sizes(graph: fx.Graph, inputs: set[str]) -> None:
    """Give operations that need another tensor's sizes or type alone these in its place, which does not matter then."""
    aten = torch.ops.aten
    first = [node for node in graph.nodes if node.op == "placeholder"]
    own = next(node for node in first if node.name in inputs)
    with graph.inserting_after(first[-1]):
        batch = graph.call_function(aten.sym_size.int, (own, 0))
    batch.meta["val"] = own.meta["val"].shape[0]
    for node in [*graph.nodes]:
        name, val = str(getattr(node.target, "__name__", "")).partition(".")[0], node.meta.get("val")
        if name not in LIKE:
            continue
        sizes = [batch if str(size) == str(batch.meta["val"]) else size for size in val.shape]
        if not all(isinstance(size, int | fx.Node) for size in sizes):
            continue
        with graph.inserting_before(node):
            if name == "type_as":
                plain = graph.call_function(aten.to.dtype, (node.args[0], val.dtype))
            elif LIKE[name] is None:
                plain = graph.call_function(getattr(aten, name.removesuffix("_as")).default, (node.args[0], sizes))
            else:
                number = node.args[-1] if "full" in name else LIKE[name]
                plain = graph.call_function(aten.full.default, (sizes, number), {"dtype": val.dtype})
        plain.meta = dict(node.meta)
        node.replace_all_uses_with(plain)
        graph.erase_node(node)


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
