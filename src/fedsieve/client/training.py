"""What a client does with its data: stochastic gradient descent, also on a mask, frozen or learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.client.optimizers import torch_optimizer
from fedsieve.sparse.policy import floats_of, has_frozen_statistics, norm_parameters
from fedsieve.sparse.regrowth import GrowthShare, prune_regrow
from fedsieve.types import Device, Examples, InputError, Mask, Params, Steps, apply_model, compute_loss, leaves
from fedsieve.types.optimizers import SGD, AdamW

MaskMove: TypeAlias = Callable[[Params, Mask], tuple[Params, Mask]]
"""What moves a mask: of the weights on it, on the CPU, and the mask, to those that go on."""
Precision: TypeAlias = Literal["fp32", "tf32", "bf16"]
"""What PyTorch multiplies: float32; float32 rounded to 10-bit mantissas (GPUs); bfloat16. Weights, sums are float32."""


def mixed_precision(where: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which a model computes: products in bfloat16, if that is the precision."""
    return torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


class Training:
    """The steps of a client's local training: iterate over their losses, then the model holds its weights.

    Each epoch is one ``torch.randperm`` of the examples cut into batches, the last of which may be smaller. A step is
    ``v = momentum * v + g + weight_decay * w; w -= lr * v``, momentum starting at rest; weights off the mask are 0.
    Without ``norm_weight_decay`` the parameters of norms are not decayed.
    In between the model need not hold the weights, unless ``steps.write_`` is called; ``steps.put_`` changes the mask.
    """

    def __init__(self, device: Device, mask: Mask | None = None):
        self.device = device
        train_(device.model)
        self.steps: Steps = (device.steps or DenseSteps)(device, mask or {})

    def __iter__(self) -> Iterator[Tensor]:
        """Yield every step's loss."""
        device, n = self.device, len(self.device.data)
        for _ in range(device.epochs):
            order = torch.randperm(n, generator=device.rng)
            draws = None
            if device.augment and n:
                sizes = map(len, torch.split(order, device.batch))
                draws = torch.cat([device.augment.draw(b, device.rng) for b in sizes])
            yield from self.steps.epoch(order, draws)
        self.steps.write_()


def train_(model: nn.Module) -> nn.Module:
    """Put the model in training mode, and return it; a frozen BatchNorm computes with its running statistics."""
    model.train()
    for module in model.modules():
        if has_frozen_statistics(module):
            module.eval()
    return model


class DenseSteps:
    """Training steps by PyTorch."""

    def __init__(self, device: Device, mask: Mask, precision: Precision = "fp32"):
        self.device, self.precision = device, precision
        self.lr: float | Tensor = device.lr
        named = [(name, w) for name, w in device.model.named_parameters() if w.requires_grad]
        self.names = [name for name, _ in named]
        self.weights: list[Tensor] = [w for _, w in named]
        norms = [] if device.norm_weight_decay else norm_parameters(device.model)
        spared = [any(w is norm for norm in norms) for w in self.weights]
        self.decayed = [i for i, spare in enumerate(spared) if device.weight_decay and not spare]
        sgd = device.optimizer is None or isinstance(device.optimizer, SGD)
        self.nesterov = bool(device.optimizer and sgd and device.optimizer.nesterov)
        self.velocity = [torch.zeros_like(w) for w in self.weights] if device.momentum and sgd else []
        self.optimizer = None if sgd else torch_optimizer(device, *self._by_decay())
        self.masked: list[tuple[Tensor, Tensor]] = []
        own = device.correction
        self.start = [torch.zeros_like(w) for w in self.weights] if own and own.mu else []
        self.shift = [torch.zeros_like(w) for w in self.weights] if own and own.shift else []
        self.put_(mask)
        self._correct_()

    def _by_decay(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights that decay, and the others."""
        decayed = [w for i, w in enumerate(self.weights) if i in self.decayed]
        return decayed, [w for i, w in enumerate(self.weights) if i not in self.decayed]

    @torch.no_grad()
    def _correct_(self) -> None:
        """Take over what the method adds to the gradients of a training, which begins."""
        if self.start:
            torch._foreach_copy_(self.start, self.weights)
        for name, shift in zip(self.names, self.shift, strict=False):
            assert self.device.correction
            own = self.device.correction.shift.get(name)
            shift.zero_() if own is None else shift.copy_(own)

    def state(self) -> list[Tensor]:
        """Return what a step changes beside the weights, and the optimizer alone: velocities, or its own memory."""
        own = self.optimizer.state.values() if self.optimizer else ()
        return [*self.velocity, *(value for one in own for value in one.values() if isinstance(value, Tensor))]

    @torch.no_grad()
    def forget_(self) -> None:
        """Let what the optimizer remembers off the mask be nothing: a weight that comes back starts at rest."""
        state = self.optimizer.state if self.optimizer else {}
        for w, mask in self.masked:
            for value in state.get(w, {}).values():
                if isinstance(value, Tensor) and value.shape == w.shape:
                    value.mul_(mask)

    @torch.no_grad()
    def rest_(self, device: Device, lr: float | Tensor) -> None:
        """Begin another training, at rest, in the same memory."""
        self.device, self.lr = device, lr
        if self.optimizer and not isinstance(device.optimizer, AdamW):  # what rest is of a user's, it alone knows
            self.optimizer = torch_optimizer(device, *self._by_decay())
        for value in self.state():
            value.zero_()
        for group in self.optimizer.param_groups if isinstance(device.optimizer, AdamW) and self.optimizer else ():
            group["lr"] = lr
        self._correct_()

    @torch.no_grad()
    def allocate_(self) -> None:
        """Make the optimizer's memory, before steps are captured. Raises RuntimeError of an optimizer of the user's."""
        if not self.optimizer:
            return
        if not isinstance(self.device.optimizer, AdamW):
            raise RuntimeError("the optimizer is one of your own")
        before = [w.clone() for w in self.weights]
        for w in self.weights:
            w.grad = torch.zeros_like(w)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_copy_(self.weights, before)

    def epoch(self, order: Tensor, draws: Tensor | None) -> Iterator[Tensor]:
        """Train on an epoch's batches, and yield their losses."""
        for x, y in self.device.batches(order, draws):
            yield self.step(x, y)

    def step(self, x: Examples, y: Examples) -> Tensor:
        """Train on a batch, and return its loss."""
        with mixed_precision(leaves(x)[0].device, self.precision):
            loss = compute_loss(self.device.loss, apply_model(self.device.model, x), y)
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        self._update_([torch.zeros_like(w) if g is None else g for w, g in zip(self.weights, gradients, strict=True)])
        self.project_()
        return loss.detach()

    def put_(self, mask: Mask) -> None:
        """Go on with another mask."""
        self.forget_()
        masked = [(self.device.model.get_parameter(name), own) for name, own in mask.items()]
        self.masked = [(w, own.to(w.device)) for w, own in masked]
        self.project_()

    def write_(self) -> None:
        """Do nothing but wait for a GPU: the model holds its weights."""
        if self.weights[0].is_cuda:
            torch.cuda.current_stream(self.weights[0].device).synchronize()

    @torch.no_grad()
    def _update_(self, steps: list[Tensor]) -> None:
        """Take the optimizer's step along the gradients ``steps``, which are only read."""
        steps = self._changed([step.to_dense() for step in steps])
        if self.optimizer:
            for w, step in zip(self.weights, steps, strict=True):
                w.grad = step
            self.optimizer.step()
            self.optimizer.zero_grad()
            return
        if self.decayed:
            decayed = [self.weights[i] for i in self.decayed]
            sums = torch._foreach_add([steps[i] for i in self.decayed], decayed, alpha=self.device.weight_decay)
            for i, step in zip(self.decayed, sums, strict=True):
                steps[i] = step
        if self.velocity:
            torch._foreach_mul_(self.velocity, self.device.momentum)
            torch._foreach_add_(self.velocity, steps)
            if self.nesterov:
                steps = list(torch._foreach_add(steps, self.velocity, alpha=self.device.momentum))
            else:
                steps = self.velocity
        if isinstance(self.lr, Tensor):
            torch._foreach_sub_(self.weights, list(torch._foreach_mul(steps, self.lr)))
        else:
            torch._foreach_sub_(self.weights, steps, alpha=self.lr)

    def _changed(self, gradients: list[Tensor]) -> list[Tensor]:
        """Return gradients with the method's correction, on the masks, and cut to the norm that they may have.

        Those of SGD are left alone where there is neither: what is off the masks is set to 0 after the step.
        """
        device = self.device
        if not (self.optimizer or self.start or self.shift or device.clip_norm):
            return gradients
        if self.start and device.correction:
            drift = torch._foreach_sub(self.weights, self.start)
            gradients = list(torch._foreach_add(gradients, drift, alpha=device.correction.mu))
        if self.shift:
            gradients = list(torch._foreach_add(gradients, self.shift))
        if len(self.masked):
            masks = {id(w): mask for w, mask in self.masked}
            pairs = zip(self.weights, gradients, strict=True)
            gradients = [g * masks[id(w)] if id(w) in masks else g for w, g in pairs]
        if device.clip_norm:
            norm = torch.stack(list(torch._foreach_norm(gradients))).norm()
            gradients = list(torch._foreach_mul(gradients, (device.clip_norm / (norm + 1e-6)).clamp(max=1)))
        return gradients

    @torch.no_grad()
    def project_(self) -> None:
        """Set the weights off the mask to 0."""
        if self.masked:
            torch._foreach_mul_(*map(list, zip(*self.masked, strict=True)))


def sgd(device: Device) -> Iterator[Tensor]:
    """Train ``device.model`` for its epochs, yielding every step's loss: a method's extra work is the loop's body.

    The body may read the model's weights, and change them. The steps are ``Training``'s.
    """
    training = Training(device)
    for loss in training:
        training.steps.write_()
        yield loss
        training.steps.put_({})


class CropFlip:
    """Images cropped at random out of a border of 4 zeros, every other one mirrored."""

    def draw(self, b: int, generator: torch.Generator) -> Tensor:
        """Return, for each of ``b`` images, the first row and column of the crop, and whether it is mirrored."""
        top, left = torch.randint(9, (2, b), generator=generator)
        return torch.stack([top, left, (torch.rand(b, generator=generator) < 0.5).long()], 1)

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """Return images [b, c, h, w], each changed by its row of ``draws`` [b, 3]."""
        b, _, h, w = x.shape
        top, left, mirrored = torch.split(draws, 1, dim=1)
        rows, columns = top + torch.arange(h, device=x.device), left + torch.arange(w, device=x.device)
        columns = torch.where(mirrored.bool(), columns.flip(1), columns)
        each = torch.arange(b, device=x.device)[:, None, None]
        return F.pad(x, (4, 4, 4, 4))[each, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


crop_flip = CropFlip()


def train(device: Device) -> dict[str, float]:
    """Train for all epochs; the metrics of a plain local training: the mean loss."""
    return mean_loss(list(Training(device)))


def mean_loss(losses: list[Tensor]) -> dict[str, float]:
    """Return the metrics of a training: the mean of its steps' losses, nothing without a step."""
    return {"loss": float(torch.stack(losses).mean())} if losses else {}


def params_of(model: nn.Module) -> Params:
    """Return a copy, on the CPU, of every floating parameter and buffer."""
    state = {name: v.detach() for name, v in floats_of(model).items()}
    if not any(v.is_cuda for v in state.values()):
        return {name: v.to("cpu", copy=True) for name, v in state.items()}
    result = dict[str, Tensor]()
    for dtype in {v.dtype for v in state.values()}:  # all of a type at once: a GPU is waited for only then
        some = {name: v for name, v in state.items() if v.dtype == dtype}
        flat = torch.cat([v.reshape(-1) for v in some.values()])
        host = torch.empty(flat.shape, dtype=dtype, pin_memory=True).copy_(flat)
        parts = torch.split(host, [v.numel() for v in some.values()])
        result |= {name: part.view(v.shape) for (name, v), part in zip(some.items(), parts, strict=True)}
    return {name: result[name] for name in state}


@torch.no_grad()
def load_(model: nn.Module, params: Mapping[str, Tensor]) -> nn.Module:
    """Write ``params`` into the model in place, BatchNorm's batch counters at 0. Raises InputError on a misfit."""
    own = floats_of(model)
    wrong = [
        n for n in own.keys() | params.keys() if n not in own or n not in params or own[n].shape != params[n].shape
    ]
    if wrong:
        raise InputError(f"the message does not fit the model at {', '.join(sorted(wrong))}")
    for name, value in own.items():
        value.copy_(params[name])
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return model


def train_on_mask(
    device: Device, mask: Mask, rates: Mapping[int, float] | None = None, share: GrowthShare = "mean", unit: int = 1
) -> tuple[dict[str, float], Mask]:
    """Train ``device.model`` on a mask; after step s, prune and regrow at the rate ``rates[s]``, in units of channels.

    Without rates the mask is frozen. Returns the metrics and the mask at the end.
    """
    moves = {step: partial(_dnr, device, p, share, unit) for step, p in (rates or {}).items() if p}
    return train_on_masks(device, mask, moves)


def _dnr(device: Device, p: float, share: GrowthShare, unit: int, weights: Params, mask: Mask) -> tuple[Params, Mask]:
    return prune_regrow(weights, mask, p, share, device.rng, unit)


def train_on_masks(device: Device, mask: Mask, moves: Mapping[int, MaskMove]) -> tuple[dict[str, float], Mask]:
    """Train ``device.model`` on a mask, which moves after some steps: after step s as ``moves[s]`` says.

    Returns the metrics and the mask at the end.
    """
    _declare_(device.model, mask)
    training, losses = Training(device, mask), list[Tensor]()
    for step, loss in enumerate(training, start=1):
        losses.append(loss)
        if step in moves:
            training.steps.write_()
            weights = {name: device.model.get_parameter(name) for name in mask}
            left, mask = moves[step]({name: w.detach().cpu() for name, w in weights.items()}, mask)
            with torch.no_grad():
                for name, w in weights.items():
                    w.copy_(left[name])
            _declare_(device.model, mask)
            training.steps.put_(mask)
    return mean_loss(losses), mask


def epoch_ends(device: Device) -> tuple[int, int]:
    """Return the steps of one local epoch, and of the whole local training."""
    steps = -(-len(device.data) // device.batch)
    return steps, steps * device.epochs


def _declare_(model: nn.Module, mask: Mask) -> None:
    """Tell ``client.cost.Cost`` what share of its products each weight on a mask needs."""
    for name, own in mask.items():
        d = int(own.count_nonzero()) / max(own.numel(), 1)
        weight: Any = model.get_parameter(name)
        weight.densities = (d, d, d)
