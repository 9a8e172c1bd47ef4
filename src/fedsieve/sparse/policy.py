"""Which layers a method makes sparse (policies), and the density of each (uniform, ERK, scaled)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from fedsieve.types import InputError, Params

WeightLayer: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
POLICIES = ("all", "swat", "flash", "zerofl")


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Return the names of what training leaves as it is.

    These are the parameters whose ``requires_grad`` is False, and the statistics of ``has_frozen_statistics`` layers.
    """
    every = model.named_parameters(remove_duplicate=False)
    fixed = {name for name, w in every if not w.requires_grad}
    for path, module in model.named_modules(remove_duplicate=False):
        if has_frozen_statistics(module):
            fixed |= {f"{path}.{name}".lstrip(".") for name, v in module.named_buffers() if v.is_floating_point()}
    return frozenset(fixed)


def has_frozen_statistics(module: nn.Module) -> bool:
    """Tell a BatchNorm (or the like) all of whose parameters are frozen: its running statistics stay too."""
    own = [*module.parameters(recurse=False)]
    tracked = getattr(module, "track_running_stats", False)
    return bool(tracked and own) and not any(w.requires_grad for w in own)


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights and biases of PyTorch's norms: BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm."""
    return [w for module in model.modules() if isinstance(module, NORMS) for w in module.parameters(recurse=False)]


def tied_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that have more than one: tied weights, a layer in two places."""
    every = [*model.named_parameters(remove_duplicate=False)]
    uses = Counter(id(w) for _, w in every)
    return frozenset(name for name, w in every if uses[id(w)] > 1)


@dataclass(frozen=True)
class Coverage:
    """How much of a model a method makes sparse. Numbers are of single parameters, biases and norms among them."""

    total: int
    frozen: int
    dense: Mapping[str, int]
    """The parameters that are in no sparse layer, the largest first."""
    sparse: bool
    """Whether the method makes any layer sparse."""

    @classmethod
    def of(cls, model: nn.Module, sparse: Collection[str]) -> Coverage:
        """Return what of a model is outside the weights named in ``sparse``."""
        every = dict(model.named_parameters())
        outside = {name: w.numel() for name, w in every.items() if name not in sparse}
        fixed = sum(w.numel() for w in every.values() if not w.requires_grad)
        ordered = dict(sorted(outside.items(), key=lambda item: -item[1]))
        return cls(sum(w.numel() for w in every.values()), fixed, ordered, bool(sparse))

    @property
    def share(self) -> float:
        """The share of all parameters that stays dense."""
        return sum(self.dense.values()) / max(self.total, 1)

    def lines(self, policy: str) -> list[str]:
        """Return what a person should know of it, a line each."""
        lines, names = list[str](), [*self.dense]
        if self.sparse and names:
            more = f" ({len(names) - 3} more)" if len(names) > 3 else ""
            which = f"the policy {policy}" if policy else "the method"
            lines.append(f"{which} leaves {self.share:.1%} of all weights dense: {', '.join(names[:3])}{more}")
        if self.frozen:
            what = f"{self.frozen:,} of {self.total:,} weights are frozen (requires_grad=False)"
            lines.append(f"{what}: they stay as they are, in no policy, and are not sent up")
        return lines


def weight_layers(model: nn.Module) -> dict[str, WeightLayer]:
    """Return the convolutions and linear layers by name, in the order of the module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightLayer)}


def select_weights(name: str, model: nn.Module) -> tuple[str, ...]:
    """Return the weights that a policy sparsifies, in the order of the module.

    ``name`` is one of ``POLICIES``, or layer names and patterns joined by commas (``"conv*,fc1"``). A model may name
    its own layers for a policy in an attribute ``policies`` (a mapping to tuples of layer names); otherwise:
    ``all``: every convolution and linear layer; ``swat``: all but the first convolution; ``flash``: all but the last
    layer; ``zerofl``: neither the first nor the last layer, nor 1x1 convolutions.

    Weights that are frozen (``requires_grad`` is False) or that two layers share are in no policy. Raises InputError
    if none is left, or none of a pattern's, or if a layer's weight is no parameter of its own.
    """
    layers = weight_layers(model)
    if "" in layers:
        raise InputError(f"the model is one layer, which has no name: give nn.Sequential of the {type(model).__name__}")
    own: Mapping[str, tuple[str, ...]] = getattr(model, "policies", {})
    fixed = frozen_names(model) | tied_names(model)
    free = [layer for layer in layers if f"{layer}.weight" not in fixed]
    matches = [*own[name]] if name in own else _rule(name, layers, free)
    weights = tuple(f"{layer}.weight" for layer in matches if f"{layer}.weight" not in fixed)
    if not matches:
        raise InputError(
            f"policy {name!r} matches no layer; the layers are {', '.join(layers)} (policies: {', '.join(POLICIES)})"
        )
    if not weights:
        some = ", ".join(matches[:3]) + (f" and {len(matches) - 3} more" if len(matches) > 3 else "")
        raise InputError(
            f"policy {name!r} matches no layer that is trained: {some} are frozen (requires_grad=False) or "
            f"share their weights; {_others(free)}"
        )
    for weight in weights:
        _check_own(model, weight)
    return weights


def uniform_densities(names: tuple[str, ...], q: float) -> dict[str, float]:
    """Return the same density for every layer."""
    return dict.fromkeys(names, q)


def erdos_renyi_kernel(params: Params, names: tuple[str, ...], q: float) -> dict[str, float]:
    """Return densities proportional to sum(dimensions) / product(dimensions), at most 1, of total ``q``.

    Evci et al. 2020, Sec. 3 (1): sum over a layer's dimensions (in, out, height, width) over their product.
    """
    raw = _by_dimensions(params, names)
    return scale_densities(raw, {name: params[name].numel() for name in names}, q)


def erdos_renyi_sparsity(params: Mapping[str, Tensor], names: tuple[str, ...], q: float) -> dict[str, float]:
    """Return densities whose complements are proportional to 1 - sum(dimensions) / product(dimensions), of total ``q``.

    Bibikar et al. 2022 (FedDST), in their code; Evci et al. have the densities themselves proportional.
    """
    raw = {name: max(0.0, 1 - share) for name, share in _by_dimensions(params, names).items()}
    sparsities = scale_densities(raw, {name: params[name].numel() for name in names}, 1 - q)
    return {name: 1 - s for name, s in sparsities.items()}


def _by_dimensions(params: Mapping[str, Tensor], names: Collection[str]) -> dict[str, float]:
    return {name: sum(params[name].shape) / params[name].numel() for name in names}


def density_within(model: nn.Module, names: Collection[str], d: float) -> float:
    """Return how dense the named weights are if all of a model's parameters, the others whole, are at density ``d``.

    Raises InputError if the others alone are more than that.
    """
    sizes = {name: w.numel() for name, w in model.named_parameters()}
    within, total = sum(sizes[name] for name in names), sum(sizes.values())
    if (left := d * total - (total - within)) <= 0:
        share = (total - within) / total
        raise InputError(f"density {d:g} of all parameters leaves the policy none: the others are {share:.3g} of them")
    return left / within


def scale_densities(raw: Mapping[str, float], sizes: Mapping[str, int], q: float) -> dict[str, float]:
    """Return densities proportional to ``raw`` of total ``q``; what a layer cannot hold goes to the others alike."""
    full: set[str] = set()
    while True:
        budget = q * sum(sizes.values()) - sum(sizes[name] for name in full)
        scale = budget / max(sum(raw[name] * size for name, size in sizes.items() if name not in full), 1e-30)
        over = {name for name in sizes if name not in full and raw[name] * scale > 1}
        if not over:
            return {name: 1.0 if name in full else raw[name] * scale for name in sizes}
        full |= over


def _rule(name: str, layers: Mapping[str, WeightLayer], free: Collection[str]) -> list[str]:
    names = list(layers)
    if name == "all":
        return names
    if name == "swat":
        first = next((n for n in names if not isinstance(layers[n], nn.Linear)), None)
        return [n for n in names if n != first]
    if name == "flash":
        return names[:-1]
    if name == "zerofl":
        return [n for n in names[1:-1] if isinstance(layer := layers[n], nn.Linear) or max(layer.kernel_size) > 1]
    patterns = [pattern.strip() for pattern in name.split(",")]
    if unused := [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]:
        raise InputError(f"policy {unused[0]!r} matches no layer; the layers are {', '.join(names)}")
    if fixed := [p for p in patterns if not any(fnmatchcase(n, p) for n in free)]:
        raise InputError(
            f"policy {fixed[0]!r} matches only layers that are frozen (requires_grad=False) or share their weights: "
            f"leave it out; {_others(free)}"
        )
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]


def _others(free: Collection[str]) -> str:
    return f"name others, -s method.policy={','.join(free)}" if free else "train another layer, or take a dense method"


def _check_own(model: nn.Module, weight: str) -> None:
    """Raise InputError unless a layer's weight is a parameter of its own, of floats."""
    path = weight.removesuffix(".weight")
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise InputError(f"the model's own policies name {path}, but it has no such layer") from None
    if any(name == "weight" for name, _ in layer.named_parameters(recurse=False)):
        return
    raise InputError(
        f"layer {path} has no parameter 'weight' of its own, it is computed from others: call {undo_call(layer)} "
        "first, or leave the layer out (-s method.policy=...)"
    )


def undo_call(layer: nn.Module, name: str = "weight") -> str:
    """Return the call after which a layer that PyTorch computes a weight for has it as a parameter again."""
    calls = {
        "parametrizations": f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})",
        f"{name}_mask": f"torch.nn.utils.prune.remove(layer, {name!r})",
        f"{name}_g": f"torch.nn.utils.remove_weight_norm(layer, {name!r})",
        f"{name}_u": f"torch.nn.utils.remove_spectral_norm(layer, {name!r})",
    }
    return next((call for mark, call in calls.items() if hasattr(layer, mark)), "what undoes that")
