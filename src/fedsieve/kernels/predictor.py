"""Inference that computes with the non-zero weights alone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fedsieve.kernels import library
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import fuse_batchnorm
from fedsieve.kernels.inference import BlockPass, ForwardPass, SinglePass
from fedsieve.kernels.program import run_each
from fedsieve.kernels.trace import read_graph
from fedsieve.types import InputError

STORAGES = {"fp32": 16, "bf16": 32}
"""How many samples lie side by side: a block, see ``native/abi.h``."""
ALONE = 12
"""As many samples are faster one by one than side by side in a block."""

SHARED = 8e6
"""As many multiply-adds of a pass are worth more than one thread."""


class Predictor:
    """Computes a model's logits in eval mode: a weight that is zero costs nothing. The model is copied, as it is now.

    ``batch`` samples at most run at once; ``storage="bf16"`` keeps the maps of more than sixteen in bfloat16. A model
    that the kernels do not know runs as it is, and ``reason`` says why, from the first call on.
    """

    def __init__(self, model: nn.Module, batch: int, storage: str = "fp32"):
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        if storage not in STORAGES:
            raise InputError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        self.model, self.batch, self.block = copy.deepcopy(model).eval(), batch, STORAGES[storage]
        self.reason: str | None = library.unavailable_reason()
        self._shape: tuple[int, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits [n, classes] of samples [n, ...], of any number. Raises InputError if they do not fit."""
        if x.dim() < 2 or x.dtype != torch.float32 or x.device.type != "cpu":
            kind = f"{list(x.shape)} of {x.dtype} on {x.device}"
            raise InputError(f"samples must be [n, ...] of torch.float32 on cpu, got {kind}")
        with torch.inference_mode(False), torch.no_grad():
            if x.shape[1:] != self._shape:
                self._prepare(tuple(x.shape[1:]))
            if self.reason is not None:
                starts = range(0, max(1, len(x)), self.batch)
                return torch.cat([self.model(x[i : i + self.batch]) for i in starts])
            return self._logits(x)

    def _prepare(self, shape: tuple[int, ...]) -> None:
        try:
            self.model(torch.zeros(1, *shape))
        except RuntimeError as error:
            raise InputError(
                f"the model takes no samples of shape {list(shape)}: {str(error).splitlines()[0]}"
            ) from None
        self.reason, self._shape, self._passes = library.unavailable_reason(), shape, dict[int, list[ForwardPass]]()
        if self.reason is not None:
            return
        try:
            self._graph = fuse_batchnorm(read_graph(self.model, shape, training=False))
            if self._graph.fallbacks:
                raise Unsupported(f"the kernels do not know {', '.join(self._graph.fallbacks)}")
            self._team(1, 1)
        except Unsupported as error:
            self.reason = str(error)

    def _logits(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), self._graph.output.channels)
        for start in range(0, len(x), self.batch):
            done, sizes = start, _sizes(min(self.batch, len(x) - start), self.block)
            while sizes:
                group = _group(sizes, library.get_num_threads())
                count = min(sum(group), start + self.batch - done, len(x) - done)
                self._run(x[done : done + count], out[done : done + count], group)
                done, sizes = done + count, sizes[len(group) :]
        return out

    def _run(self, x: Tensor, out: Tensor, group: list[int]) -> None:
        """Compute the logits of samples by passes of one size, a thread each; a large one alone has all threads."""
        passes = self._team(group[0], len(group))
        for one, samples in zip(passes, torch.split(x, group[0]), strict=True):
            one.x[: len(samples)] = samples
        if len(passes) == 1 and passes[0].multiply_adds >= SHARED:
            passes[0].program.run()
        else:
            run_each([one.program for one in passes])
        for one, logits in zip(passes, torch.split(out, group[0]), strict=True):
            logits.copy_(one.logits[: len(logits)])

    def _team(self, size: int, count: int) -> list[ForwardPass]:
        """Return as many forward passes of one size."""
        team = self._passes.setdefault(size, [])
        while len(team) < count:
            alone = size == 1
            team.append(SinglePass(self._graph, 1) if alone else BlockPass(self._graph, size, size == STORAGES["bf16"]))
        return team[:count]


def _sizes(samples: int, block: int) -> list[int]:
    """Return how many samples each forward pass is for. It does not depend on the threads, so that no bit does."""
    sizes: list[int] = []
    while samples > 0:
        sizes.append(1 if samples <= ALONE else 16 if samples <= 16 else block)
        samples -= sizes[-1]
    return sizes


def _group(sizes: list[int], threads: int) -> list[int]:
    """Return the first passes, of one size, that run at once: one, by all threads, where that uses more of them."""
    group = [size for size in sizes[:threads] if size == sizes[0]]
    return group if 2 * len(group) > threads else group[:1]
