"""Which weights a method makes sparse (policies), and the density of each (uniform, ERK, scaled)."""

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
WHERE_POSSIBLE = "-s method.activations=where_possible reaches every weight"


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


def floats_of(model: nn.Module) -> Params:
    """Return every floating parameter and buffer of a model's state itself; one of several names by the first."""
    state = {name: v for name, v in model.state_dict(keep_vars=True).items() if v.is_floating_point()}
    if len({*map(id, state.values())}) == len(state):
        return state
    several = model.named_parameters(), model.named_buffers()
    first = {name for tensors in several for name, _ in tensors}
    return {name: v for name, v in state.items() if name in first}


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
    reachable: bool = False
    """Whether the policy names weights that the method leaves dense, since no layer of their own multiplies by them."""

    @classmethod
    def of(cls, model: nn.Module, sparse: Collection[str], policy: Collection[str] = ()) -> Coverage:
        """Return what of a model is outside the weights named in ``sparse``, of which ``policy`` may name more."""
        every = dict(model.named_parameters())
        outside = {name: w.numel() for name, w in every.items() if name not in sparse}
        fixed = sum(w.numel() for w in every.values() if not w.requires_grad)
        ordered = dict(sorted(outside.items(), key=lambda item: -item[1]))
        reachable = not {*policy} <= {*sparse}
        return cls(sum(w.numel() for w in every.values()), fixed, ordered, bool(sparse), reachable)

    @property
    def share(self) -> float:
        """The share of all parameters that stays dense."""
        return sum(self.dense.values()) / max(self.total, 1)

    def lines(self, policy: str) -> list[str]:
        """Return what a person should know of it, a line each."""
        lines, names = list[str](), [*self.dense]
        if self.sparse and names:
            more = f" ({len(names) - 3} more)" if len(names) > 3 else ""
            hint = f"; {WHERE_POSSIBLE}" if self.reachable else ""
            which = f"the policy {policy}" if policy else "the method"
            lines.append(f"{which} leaves {self.share:.1%} of all weights dense: {', '.join(names[:3])}{more}{hint}")
        if self.frozen:
            what = f"{self.frozen:,} of {self.total:,} weights are frozen (requires_grad=False)"
            lines.append(f"{what}: they stay as they are, in no policy, and are not sent up")
        return lines


def weight_layers(model: nn.Module) -> dict[str, WeightLayer]:
    """Return the convolutions and linear layers by name, in the order of the module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightLayer)}


def weights_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return what may be made sparse, by the parameter's name, with the module that holds it, in the model's order.

    These are the weights of convolutions and linear layers, also where they are computed from others; of PyTorch's
    other modules but norms the floating parameters of two dimensions and more (embeddings, recurrent layers,
    attention); and the bare parameters that are matrices: of two sizes above 1, the first among them. None is a bias by
    name. A parameter of several names has the first.
    """
    weights, seen = dict[str, nn.Module](), set[int]()
    for path, module in model.named_modules():
        if ".parametrizations" in f".{path}" or isinstance(module, NORMS):
            continue
        layer, prefix = isinstance(module, WeightLayer), f"{path}." if path else ""
        if layer and id(w := module._parameters.get("weight")) not in seen:
            weights[f"{prefix}weight"] = module
            seen |= {id(w)} if w is not None else set()
        for name, w in module.named_parameters(recurse=False):
            computed = layer and name.startswith("weight")
            matrix = type(module).__module__.startswith("torch.nn.") or _is_matrix(w)
            eligible = matrix and w.dim() > 1 and w.is_floating_point() and "bias" not in name
            if id(w) not in seen and not computed and eligible:
                weights[prefix + name] = module
                seen.add(id(w))
    return weights


def _is_matrix(w: Tensor) -> bool:
    return w.dim() > 1 and w.shape[0] > 1 and sum(size > 1 for size in w.shape) > 1


def select_weights(name: str, model: nn.Module, products: bool = False) -> tuple[str, ...]:
    """Return the weights that a policy sparsifies, parameters by name, in the model's order.

    ``name`` is one of ``POLICIES``, or names and patterns joined by commas, of modules (``"conv*,fc1"``: all that they
    hold) or of parameters (``"*.in_proj_weight"``). A model may name its own for a policy in an attribute ``policies``
    (a mapping to tuples of such names); otherwise: ``all``: every weight (``weights_of``); ``swat``: all but the first
    convolution's; ``flash``: all but the last module's; ``zerofl``: neither the first nor the last module's, nor those
    of 1x1 convolutions. ``products``: of these the convolutions and linear layers alone, which are called as such; a
    weight that two layers share is then left out as well.

    Frozen weights (``requires_grad`` is False) are in no policy. Raises InputError if none is left, or none of a
    pattern's, or if a layer's weight is no parameter of its own.
    """
    every = weights_of(model)
    if "weight" in every and isinstance(every["weight"], WeightLayer):
        raise InputError(f"the model is one layer, which has no name: give nn.Sequential of the {type(model).__name__}")
    fixed = frozen_names(model)
    several = {*every}
    if products:
        every = {weight: module for weight, module in every.items() if isinstance(module, WeightLayer)}
        fixed |= tied_names(model)
    own: Mapping[str, tuple[str, ...]] = getattr(model, "policies", {})
    free = [weight for weight in every if weight not in fixed]
    patterns = own[name] if name in own else () if name in POLICIES else [one.strip() for one in name.split(",")]
    _check_tied(name, patterns, several, model)
    _check_products(name, patterns, every, several)
    matches = _own(own[name], every) if name in own else _rule(name, every, free)
    weights = tuple(weight for weight in matches if weight not in fixed)
    if not matches:
        raise InputError(
            f"policy {name!r} matches no layer; the layers are {_layers(every)} (policies: {', '.join(POLICIES)})"
            f"{f'; {WHERE_POSSIBLE}' if len(several) > len(every) else ''}"
        )
    if not weights:
        raise InputError(
            f"policy {name!r} matches no layer that is trained: {_layers(matches, 3)} are frozen (requires_grad=False)"
            f"{' or share their weights' if products else ''}; {_others(free)}"
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


def _rule(name: str, weights: Mapping[str, nn.Module], free: Collection[str]) -> list[str]:
    names, modules = list(weights), list(weights.values())
    if name == "all":
        return names
    if name == "swat":
        first = next((n for n in names if hasattr(weights[n], "kernel_size")), None)
        return [n for n in names if n != first]
    if name == "flash":
        return [n for n in names if weights[n] is not modules[-1]]
    if name == "zerofl":
        inner = [n for n in names if weights[n] is not modules[0] and weights[n] is not modules[-1]]
        return [n for n in inner if max(getattr(weights[n], "kernel_size", (2,))) > 1]
    return _match(name, weights, free)


def _own(names: Collection[str], weights: Mapping[str, nn.Module]) -> list[str]:
    """Return the weights of a model's own policy. Raises InputError for a name that there is not."""
    if missing := [one for one in names if not any(_matches(n, one) for n in weights)]:
        raise InputError(f"the model's own policies name {missing[0]}, but it has no such layer")
    return [n for n in weights if any(_matches(n, one) for one in names)]


def _match(name: str, weights: Mapping[str, nn.Module], free: Collection[str]) -> list[str]:
    """Return the weights that patterns joined by commas match. Raises InputError for one that matches none."""
    patterns = [pattern.strip() for pattern in name.split(",")]
    if unused := [p for p in patterns if not any(_matches(n, p) for n in weights)]:
        raise InputError(f"policy {unused[0]!r} matches no layer; the layers are {_layers(weights)}")
    if fixed := [p for p in patterns if not any(_matches(n, p) for n in free)]:
        raise InputError(
            f"policy {fixed[0]!r} matches only layers that are frozen (requires_grad=False) or share their weights: "
            f"leave it out; {_others(free)}"
        )
    return [n for n in weights if any(_matches(n, pattern) for pattern in patterns)]


def _check_tied(policy: str, patterns: Collection[str], weights: Collection[str], model: nn.Module) -> None:
    """Raise InputError for a pattern that names a shared weight alone by another name than its first."""
    unused = [p for p in patterns if not any(_matches(n, p) for n in weights)]
    first = {id(w): name for name, w in model.named_parameters()}
    for name, w in model.named_parameters(remove_duplicate=False) if unused else ():
        if first[id(w)] in weights and any(_matches(name, p) for p in unused):
            raise InputError(
                f"policy {policy!r} names {name}, which is {first[id(w)]} once more (a shared weight): name that, "
                "and both places have it"
            )


def _check_products(policy: str, patterns: Collection[str], layers: Collection[str], weights: Collection[str]) -> None:
    """Raise InputError for a pattern that matches weights, but none of a layer."""
    for pattern in patterns:
        if not any(_matches(n, pattern) for n in layers) and (odd := [n for n in weights if _matches(n, pattern)]):
            what = "no weight of a Linear or convolution that is called as such"
            raise InputError(f"policy {policy!r}: {odd[0]} is {what}; {WHERE_POSSIBLE}")


def _matches(weight: str, pattern: str) -> bool:
    return fnmatchcase(weight, pattern) or fnmatchcase(weight.rpartition(".")[0], pattern)


def _layers(weights: Collection[str], most: int = 40) -> str:
    """Return weights for a line: those of layers by the layer's name."""
    names = [weight.removesuffix(".weight") for weight in weights]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _others(free: Collection[str]) -> str:
    names = ",".join(weight.removesuffix(".weight") for weight in free)
    return f"name others, -s method.policy={names}" if free else "train another layer, or take a dense method"


def _check_own(model: nn.Module, weight: str) -> None:
    """Raise InputError unless a layer's weight is a parameter of its own."""
    path, _, parameter = weight.rpartition(".")
    layer = model.get_submodule(path)
    if any(name == parameter for name, _ in layer.named_parameters(recurse=False)):
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
