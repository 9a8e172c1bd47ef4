"""The masked dense step in plain PyTorch, of any floating type, to hold the kernels' trainer against."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.kernels import Trainer

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sgd:
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    norms: bool = True
    """Whether norms are decayed."""


def batches(shape: tuple[int, ...], sizes: Iterable[int], classes: int = 4, seed: int = 0) -> Batches:
    """Return random batches of these sizes; each class has a direction of its own, so that there is much to learn."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, *shape, generator=generator)
    labels = [torch.randint(classes, (n,), generator=generator) for n in sizes]
    return [(means[y] + torch.randn(len(y), *shape, generator=generator), y) for y in labels]


def masks(model: nn.Module, density: float = 0.3, seed: int = 1) -> dict[str, Tensor]:
    """Return random masks of all weights of convolutions and linear layers."""
    generator = torch.Generator().manual_seed(seed)
    named = [(f"{name}.weight", m.weight) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return {name: torch.rand(w.shape, generator=generator) < density for name, w in named}


def dense(model: nn.Module, mask: Mapping[str, Tensor], data: Batches, sgd: Sgd, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the model after masked dense steps."""
    model = copy.deepcopy(model).to(dtype).train()
    parameters = dict(model.named_parameters())
    norms = [w for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for w in m.parameters()]
    others = [w for w in model.parameters() if not any(w is norm for norm in norms)]
    groups = [{"params": others}, {"params": norms, "weight_decay": sgd.weight_decay if sgd.norms else 0.0}]
    optimizer = torch.optim.SGD(groups, sgd.lr, sgd.momentum, weight_decay=sgd.weight_decay)
    project_(parameters, mask)
    for x, y in data:
        for w in parameters.values():
            w.grad = torch.zeros_like(w)
        F.cross_entropy(model(x.to(dtype)), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        project_(parameters, mask)
    return model


@torch.no_grad()
def project_(parameters: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
    for name, m in mask.items():
        parameters[name].mul_(m)


def trained(
    model: nn.Module,
    mask: Mapping[str, Tensor],
    data: Batches,
    sgd: Sgd,
    storage: str = "fp32",
    low_memory: bool = False,
) -> tuple[nn.Module, Trainer]:
    """Return a copy of the model after the kernels' steps; between them, what is left in memory is made NaN."""
    model = copy.deepcopy(model)
    trainer = Trainer(
        model, mask, max(len(y) for _, y in data),
        lr=sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay, storage=storage, low_memory=low_memory,
        norm_weight_decay=sgd.norms,
    )  # fmt: skip  # type: ignore[arg-type]
    for x, y in data:
        trainer.step(x, y)
        trainer.lowered.arena.memory.fill_(0x7FC07FC0)
    trainer.write_()
    return model, trainer


def distance(model: nn.Module, exact: nn.Module, start: nn.Module) -> dict[str, float]:
    """Return how far every tensor is from the exact one: as a part of the way that it went, and 0.001 a number."""
    state, want, was = ({k: x.double() for k, x in m.state_dict().items()} for m in (model, exact, start))
    way = {name: (want[name] - was[name]).norm() + 1e-3 * was[name].numel() ** 0.5 for name in state}
    return {name: float((x - want[name]).norm() / way[name]) for name, x in state.items()}


def assert_as_dense(
    model: nn.Module,
    shape: tuple[int, ...],
    sizes: Iterable[int] = (17, 5, 17),
    sgd: Sgd = Sgd(),
    mask: Mapping[str, Tensor] | None = None,
    classes: int = 4,
    tries: int = 6,
) -> Trainer:
    """Assert that the kernels train a model as PyTorch does in float64, nearly as closely as PyTorch in float32.

    Where a number is so close to 0 that rounding decides what ReLU does, or two so close that it decides which is the
    larger, gradients jump: then other data are tried. A mistake shows with all of them; one that takes a tensor as far
    from where it should be as it went at all, with any. (One ReLU of few can take it a fifth of that way.)
    """
    mask = masks(model) if mask is None else mask
    start = dense(model, mask, [], sgd, torch.float32)
    for seed in range(tries):
        data = batches(shape, sizes, classes, seed)
        exact, single = (dense(model, mask, data, sgd, dtype) for dtype in (torch.float64, torch.float32))
        ours, trainer = trained(model, mask, data, sgd)
        found, theirs = distance(ours, exact, start), distance(single, exact, start)
        for name, m in mask.items():
            assert not bool(ours.state_dict()[name][~m].any()), name
        assert max(found.values()) < 1, found
        if max(found.values()) < max(3e-5, 4 * max(theirs.values())):
            return trainer
    raise AssertionError(found, theirs)
