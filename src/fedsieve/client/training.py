"""What a client does with its data: stochastic gradient descent, also on a mask, frozen or learnt; and accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.sparse.masks import GrowthShare, prune_regrow
from fedsieve.sparse.policy import has_frozen_statistics, norm_parameters
from fedsieve.types import Data, Device, InputError, Mask, Params, Steps


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
        device, data = self.device, self.device.data
        change = partial(device.augment, generator=device.rng) if device.augment else None
        for _ in range(device.epochs):
            for index in torch.split(torch.randperm(len(data), generator=device.rng), device.batch):
                yield self.steps.step(*data.batch(index.to(data.y.device), change))
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

    def __init__(self, device: Device, mask: Mask):
        self.device = device
        self.weights = [w for w in device.model.parameters() if w.requires_grad]
        norms = [] if device.norm_weight_decay else norm_parameters(device.model)
        self.decay = [0.0 if any(w is norm for norm in norms) else device.weight_decay for w in self.weights]
        self.velocity = [torch.zeros_like(w) for w in self.weights] if device.momentum else []
        self.put_(mask)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on a batch, and return its loss."""
        device = self.device
        loss = F.cross_entropy(device.model(x), y)
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        with torch.no_grad():
            for i, (w, g) in enumerate(zip(self.weights, gradients, strict=True)):
                step = torch.zeros_like(w) if g is None else g
                if self.decay[i]:
                    step = step.to_dense().add(w, alpha=self.decay[i])
                if self.velocity:
                    step = self.velocity[i].mul_(device.momentum).add_(step)
                w.sub_(step, alpha=device.lr)
        self._project_()
        return loss.detach()

    def put_(self, mask: Mask) -> None:
        """Go on with another mask."""
        masked = [(self.device.model.get_parameter(name), own) for name, own in mask.items()]
        self.masked = [(w, own.to(w.device)) for w, own in masked]
        self._project_()

    def write_(self) -> None:
        """Do nothing but wait for a GPU: the model holds its weights."""
        if self.weights[0].is_cuda:
            torch.cuda.synchronize(self.weights[0].device)

    @torch.no_grad()
    def _project_(self) -> None:
        for w, own in self.masked:
            w.mul_(own)


def sgd(device: Device) -> Iterator[Tensor]:
    """Train ``device.model`` for its epochs, yielding every step's loss: a method's extra work is the loop's body.

    The body may read the model's weights, and change them. The steps are ``Training``'s.
    """
    training = Training(device)
    for loss in training:
        training.steps.write_()
        yield loss
        training.steps.put_({})


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images [b, c, h, w] cropped at random out of a border of 4 zeros, every other one mirrored."""
    b, _, h, w = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, b, 1), generator=generator)
    mirrored = torch.rand(b, 1, generator=generator) < 0.5
    rows, columns = top + torch.arange(h), left + torch.arange(w)
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(b, device=x.device)[:, None, None]
    return padded[each, :, rows[:, :, None].to(x.device), columns[:, None, :].to(x.device)].movedim(3, 1)


def train(device: Device) -> dict[str, float]:
    """Train for all epochs; the metrics of a plain local training: the mean loss."""
    return mean_loss(list(Training(device)))


def mean_loss(losses: list[Tensor]) -> dict[str, float]:
    """Return the metrics of a training: the mean of its steps' losses, nothing without a step."""
    return {"loss": float(torch.stack(losses).mean())} if losses else {}


def params_of(model: nn.Module) -> Params:
    """Return a copy, on the CPU, of every floating parameter and buffer."""
    state = model.state_dict()
    return {name: v.detach().to("cpu", copy=True) for name, v in state.items() if v.is_floating_point()}


@torch.no_grad()
def load_(model: nn.Module, params: Mapping[str, Tensor]) -> nn.Module:
    """Write ``params`` into the model in place, BatchNorm's batch counters at 0. Raises InputError on a misfit."""
    own = {name: v for name, v in model.state_dict(keep_vars=True).items() if v.is_floating_point()}
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


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, batch: int = 500) -> float:
    """Return the share of ``data`` that the model labels rightly."""
    model.eval()
    batches = (data.batch(slice(i, i + batch)) for i in range(0, len(data), batch))
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(data)


def train_on_mask(
    device: Device, mask: Mask, rates: Mapping[int, float] | None = None, share: GrowthShare = "mean"
) -> tuple[dict[str, float], Mask]:
    """Train ``device.model`` on a mask; after step s, prune and regrow at the rate ``rates[s]``.

    Without rates the mask is frozen. Returns the metrics and the mask at the end.
    """
    _declare_(device.model, mask)
    training, losses = Training(device, mask), list[Tensor]()
    for step, loss in enumerate(training, start=1):
        losses.append(loss)
        if rates and rates.get(step):
            training.steps.write_()
            mask = _moved(device, mask, rates[step], share)
            training.steps.put_(mask)
    return mean_loss(losses), mask


def _moved(device: Device, mask: Mask, p: float, share: GrowthShare) -> Mask:
    """Return the mask after a step of DNR on the model's weights, which are left on both masks."""
    weights = {name: device.model.get_parameter(name) for name in mask}
    now = {name: w.detach().cpu() for name, w in weights.items()}
    left, after = prune_regrow(now, mask, p, share, device.rng)
    with torch.no_grad():
        for name, w in weights.items():
            w.copy_(left[name])
    _declare_(device.model, after)
    return after


def epoch_ends(device: Device) -> tuple[int, int]:
    """Return the steps of one local epoch, and of the whole local training."""
    steps = -(-len(device.data) // device.batch)
    return steps, steps * device.epochs


def _declare_(model: nn.Module, mask: Mask) -> None:
    """Tell ``client.cost.Cost`` what share of its products each layer on a mask needs."""
    for name, own in mask.items():
        d = int(own.sum()) / max(own.numel(), 1)
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        layer.densities = (d, d, d)
