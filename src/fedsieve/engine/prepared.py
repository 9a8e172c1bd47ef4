"""Whether the model that clients train computes what the plain one does with the same weights: checked before a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedsieve.client.training import load_, params_of, train_
from fedsieve.engine.federation import Federation
from fedsieve.sparse.effective import effective_weights
from fedsieve.sparse.layers import sparse_layers
from fedsieve.types import Examples, InputError, Params, apply_model, tensors_of


@torch.no_grad()
def check_prepared(federation: Federation, prepared: nn.Module) -> None:
    """Raise InputError if the model that clients train computes something else than the plain one does.

    A layer that the method replaced may be used without being called: it would stay a plain one. Where the method has
    weights computed wherever the model uses them, the model may have kept others, or compute again in its backward
    pass. Both are run on two examples, in training and in testing, the plain model with the weights that the prepared
    one computes with. ``prepared`` is of no use afterwards.
    """
    layers, rules, plain = sparse_layers(prepared), effective_weights(prepared), federation.model()
    x, _ = federation.dataset.train.batch(slice(0, 2))
    if not layers and not rules:
        return
    name = federation.run.method.name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for w in prepared.parameters():  # what starts at zero would hide what follows it
            w.add_(torch.randn_like(w) * (float(w.std(correction=0)) or 0.1) / 4)
        equal, past = _compare(prepared, plain, x)
        if rules and not equal and (kept := _kept(prepared, plain, x)):
            raise InputError(
                f"the model keeps {', '.join(kept)} elsewhere than in its parameters (.data, a list), so that {name} "
                f"does not reach what it computes with: leave it out of method.policy, or take flash, pdst, nst or topk"
            )
        if rules and equal and (odd := _odd_gradients(prepared, plain, x)):
            raise InputError(
                f"the gradient of {odd[0]} is not that of the weights that {name} computes with: switch off what "
                "computes again in the backward pass (activation checkpointing), or take flash, pdst, nst or topk"
            )
    if past and not rules:
        others = [name for name in layers if name not in past]
        remedy = f"leave it out, -s method.policy={','.join(others)}" if others else "take flash, pdst, nst or topk"
        raise InputError(
            f"the model uses the weight of {', '.join(sorted(past))} without calling the layer, so that {name} "
            f"cannot replace it: {remedy}"
        )


def _computed(prepared: nn.Module) -> Params:
    """Return the plain model's state with the weights that a prepared model computes with."""
    layers, rules = sparse_layers(prepared), effective_weights(prepared)
    own = {f"{name}.weight": layer.effective() for name, layer in layers.items()}
    return params_of(prepared) | own | {name: rule.weight(prepared.get_parameter(name)) for name, rule in rules.items()}


def _compare(prepared: nn.Module, plain: nn.Module, x: Examples) -> tuple[bool, set[str]]:
    """Tell whether both models compute the same; if not, which layers' weights are read without calling the layer."""
    load_(plain, _computed(prepared))
    equal, past = True, set[str]()
    for mode in (train_, nn.Module.eval):
        try:
            expected = _drawn(mode(plain), x)
        except (RuntimeError, ValueError):
            continue  # one example too few for BatchNorm: the plain model's own affair
        with _Uses(prepared) as uses:
            outputs = _drawn(mode(prepared), x)
        if not _close(outputs, expected):
            equal = False
            past |= uses.past
    return equal, past


def _close(some: list[Tensor], others: list[Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(
        torch.allclose(a, b, 1e-3, 1e-4 * float(b.abs().max()) if b.numel() else 0, equal_nan=True) for a, b in pairs
    )


def _kept(prepared: nn.Module, plain: nn.Module, x: Examples) -> list[str]:
    """Return the weights that a model does not take from its parameters when it is called."""
    if not _close(_drawn(plain.eval(), x), _drawn(plain.eval(), x)):
        return []  # it draws by a chance of its own, and nothing can be told
    rules = effective_weights(prepared)
    every, kept = dict(rules), list[str]()
    for name, rule in every.items():
        rules.clear()
        rules[name] = rule
        if not _compare(prepared, plain, x)[0]:
            kept.append(name)
    rules.update(every)
    return kept


def _odd_gradients(prepared: nn.Module, plain: nn.Module, x: Examples) -> list[str]:
    """Return the parameters whose gradients are not those of the plain model with the weights that are computed with.

    Weights whose layers cut their input for the gradient are left out.
    """
    load_(plain, _computed(prepared))
    twins = {f"{name}.weight" for name in sparse_layers(prepared)}
    names = [name for name, w in prepared.named_parameters() if w.requires_grad and name not in twins]
    several = []
    for model in (plain, prepared):
        weights = [model.get_parameter(name) for name in names]
        with torch.enable_grad():
            outputs = [one.square().sum() for one in _drawn(train_(model), x) if one.requires_grad]
            several.append(torch.autograd.grad(outputs, weights, allow_unused=True, materialize_grads=True))
    scale = max((float(g.to_dense().abs().max()) for g in several[0] if g.numel()), default=0.0)
    rules, odd = effective_weights(prepared), list[str]()
    for name, wanted, own in zip(names, *several, strict=True):
        w = prepared.get_parameter(name)
        with torch.enable_grad():
            rule = rules.get(name)
            expected = torch.autograd.grad(rule.of_step(w), w, wanted.to_dense())[0] if rule else wanted
        if not torch.allclose(own.to_dense(), expected.to_dense(), 1e-3, 1e-4 * scale, equal_nan=True):
            odd.append(name)
    return odd


def _drawn(model: nn.Module, x: Examples) -> list[Tensor]:
    """Return the numbers that a model gives under one draw of its own chance."""
    torch.manual_seed(1)
    return [one for one in tensors_of(apply_model(model, x)) if one.is_floating_point()]


class _Uses(TorchFunctionMode):
    """Notes which replaced layers' weights are read outside of their own forward (``past``)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.past, self.inside, self.handles = set[str](), list[nn.Module](), []
        self.weights = {id(layer.weight): (name, layer) for name, layer in sparse_layers(model).items()}
        for _, layer in self.weights.values():
            self.handles.append(layer.register_forward_pre_hook(lambda layer, _: self.inside.append(layer)))
            self.handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def _leave(self, *_: object) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as without the mode."""
        result = func(*args, **(kwargs or {}))
        for argument in (*args, *(kwargs or {}).values()):
            name, layer = self.weights.get(id(argument), ("", None))
            if layer is not None and layer not in self.inside and isinstance(result, Tensor | tuple):
                self.past.add(name)
        return result

    def __exit__(self, *error: Any) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]
