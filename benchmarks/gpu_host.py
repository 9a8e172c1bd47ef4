"""What a round takes on the host beside its training and its replies: processor time of one thread, drawn weights.

Of ResNet-18's size: what is sent is encoded and decoded, a client chooses what it sends back, ten such answers are
averaged, the model is deployed, the bound's norms are taken, a checkpoint is written. The best of three counts. And by
the clock, on an undisturbed machine of two cores: how much faster two threads encode and decode replies than one.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsieve import Run, Update
from fedsieve.client.models import MODELS
from fedsieve.client.process import num_threads
from fedsieve.engine.rollback import Rollbacks
from fedsieve.methods import FLASH, ZeroFL
from fedsieve.runs.record import CHECKPOINTS
from fedsieve.runs.resume import save_checkpoint
from fedsieve.sparse.masks import apply_mask, gather_values, top
from fedsieve.types import Mask, Params, Sparse, rng
from fedsieve.types.contract import norms_of
from fedsieve.wire import Known, Manifest, decode, encode

T = TypeVar("T")
REPEATS = 3
CLIENTS = 10


def host_times(run: Run) -> dict[str, float]:
    """Return the seconds of each part for a run's method, ``support``: of what a GPU finds of it, where it does."""
    method, model = run.method, MODELS["resnet18"](3, 10)
    assert isinstance(method, ZeroFL | FLASH)
    state = method.init(model, rng(0, "init"))
    if isinstance(method, FLASH):
        stage2 = replace(state, stage=torch.tensor(2))
        state = replace(stage2, params=apply_mask(stage2.params, stage2.mask))
    floats = {name: v for name, v in model.state_dict().items() if v.is_floating_point()}
    known, context, seconds = Known(Manifest.of(floats), finite=False, copies=method.copies), run.context(1), {}
    with num_threads(1), tempfile.TemporaryDirectory() as folder:
        tree, sent = _timed(partial(method.broadcast, state, context))
        message, encoded = _timed(partial(encode, tree, known))
        seconds |= {"broadcast": sent + encoded, "open": _timed(partial(decode, message, known))[1]}
        base = replace(known, base={name: v for name, v in tree.items() if isinstance(v, Tensor | Sparse)})
        after = {name: v + 1e-3 * torch.randn_like(v) if v.dim() > 1 else v for name, v in state.params.items()}
        upload, seconds["choose"], seconds["choose_support"] = _choice(method, state, after)
        reply = encode(upload, base)
        seconds["encode_speed"] = _speed(lambda: encode(upload, base))
        seconds["decode_speed"] = _speed(lambda: decode(reply, base))
        updates = [Update(upload, 450, {})] * CLIENTS
        state, seconds["mean"] = _timed(lambda: method.aggregate(state, iter(updates), context))
        seconds["deploy"] = _timed(partial(method.deploy, state))[1]
        seconds["deploy_support"] = 0.0
        if isinstance(method, ZeroFL):
            supports = partial(_supports, state.params, state.sparse, 1 - method.sparsity)
            seconds["deploy_support"] = _timed(supports)[1]
        seconds["bound"] = _timed(lambda: norms_of(state.params.items()))[1]
        (Path(folder) / CHECKPOINTS).mkdir()
        round_: Any = SimpleNamespace(t=1, state=state, memory={}, norms=(), lengths={}, rollbacks=Rollbacks())
        seconds["checkpoint"] = _timed(partial(save_checkpoint, Path(folder), round_, {}))[1]
    sizes = [v.numel() for v in state.params.values()]
    return seconds | {
        "largest": max(sizes) / sum(sizes),
        "selected": sum(state.params[n].numel() for n in state.sparse),
    }


def _choice(method: ZeroFL | FLASH, state: Any, after: Params) -> tuple[dict[str, Tensor | Sparse], float, float]:
    """Return what a client sends, the seconds it takes to choose it, and those of them that go to supports."""
    if isinstance(method, FLASH):
        mask = state.mask
        values, seconds = _timed(partial(gather_values, after, mask))
        return {**values}, seconds, 0.0
    upload, seconds = _timed(partial(method.select_upload, state.params, after, state.sparse))
    return upload, seconds, _timed(partial(_supports, after, state.sparse, method.q))[1]


def _supports(params: Params, names: tuple[str, ...], q: float) -> Mask:
    return {name: top(params[name], q) for name in names}


def _speed(function: Callable[[], object]) -> float:
    """Return how many times as much two threads get done as one, by the clock."""
    seconds: dict[int, float] = {}
    for threads in (1, 2):
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in range(REPEATS):
                began = time.perf_counter()
                for future in [pool.submit(function) for _ in range(4)]:
                    future.result()
                seconds[threads] = min(seconds.get(threads, math.inf), time.perf_counter() - began)
    return seconds[1] / seconds[2]


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    """Return a function's result, and the least processor time that it takes this thread."""
    seconds = list[float]()
    for _ in range(REPEATS):
        began = time.thread_time()
        result = function()
        seconds.append(time.thread_time() - began)
    return result, min(seconds)
