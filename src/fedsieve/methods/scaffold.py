"""SCAFFOLD: control variates take the drift out of local training.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1, option II. The
server has a control variate c, every client one of its own, c_i, which it keeps; both start at 0. With x the model that
was sent, y the client's after K steps (with momentum ``gradients_in_change``), S the round's clients, N all of them,

    every step      g + c - c_i
    the client      c_i' = c_i - c + (x - y) / (K lr), and sends y and c_i' - c_i
    the server      x = mean(y), c = c + |S| / N mean(c_i' - c_i)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from fedsieve.client.optimizers import gradients_in_change
from fedsieve.client.training import epoch_ends, load_, params_of, train
from fedsieve.server.aggregate import Average, ServerOptimizer, Weighting, mean, observed
from fedsieve.server.dense import DenseMethod
from fedsieve.sparse.masks import scatter_values
from fedsieve.types import SGD, Correction, Device, InputError, Params, RoundContext, ServerState, Tree, Update
from fedsieve.types.contract import Expected, expect_changes

OWN = "control:"
"""Before a parameter's name in a client's memory, and in its answer: its control variate, and that one's change."""


@dataclass(frozen=True, kw_only=True)
class ControlState(ServerState):
    """The global model, and the server's control variate, of the parameters that are trained."""

    control: Params


@dataclass(frozen=True)
class SCAFFOLD(DenseMethod[ControlState]):
    """Dense local training, its gradients corrected by control variates, which travel beside the model."""

    start: Literal["zero", "model"] = "zero"
    """What control variates start at: 0, or the model's weights (Flower's public code)."""
    weighting: Weighting = "equal"
    """How clients count in both means: equally, or by their examples (Flower's public code)."""
    server: ServerOptimizer = Average()

    @property
    def copies(self) -> float:
        """A message holds the model and a control variate of its size."""
        return 2.0

    def check_run(self, run: Any) -> None:
        """Raise InputError where a change of weights is no sum of gradients."""
        if not isinstance(run.optimizer, SGD) or run.clip_norm:
            raise InputError("scaffold sums gradients, which it can by SGD alone: leave optimizer and clip_norm out")

    def init(self, model: nn.Module, rng: torch.Generator) -> ControlState:
        """Start from the fresh model."""
        state = super().init(model, rng)
        return ControlState(state.params, state.moments, control=self.first(model, state.params))

    def first(self, model: nn.Module, params: Params) -> Params:
        """Return a control variate as it starts, of the parameters that are trained."""
        names = [name for name, w in model.named_parameters() if w.requires_grad]
        return {n: params[n].clone() if self.start == "model" else torch.zeros_like(params[n]) for n in names}

    def broadcast(self, state: ControlState, context: RoundContext) -> Tree:
        """Send the model, and the server's control variate."""
        return {"control": state.control, "params": state.params}

    def client(self, down: Tree, device: Device) -> Update:
        """Train with corrected gradients; send the model, and by how much the own control variate changes."""
        before, control = (scatter_values(down[name], {}) for name in ("params", "control"))
        own = self.first(load_(device.model, before), before)
        own |= {name: device.memory[OWN + name] for name in own if OWN + name in device.memory}
        shift = {name: control[name] - value for name, value in own.items()}
        metrics = train(replace(device, correction=Correction(shift)))
        after, weight = params_of(device.model), device.lr * gradients_in_change(device, epoch_ends(device)[1])
        change = {name: (before[name] - after[name]) / weight - control[name] for name in own}
        device.memory |= {OWN + name: value + change[name] for name, value in own.items()}
        return Update(after | {OWN + name: value for name, value in change.items()}, len(device.data), metrics)

    def expected(self, state: ControlState, context: RoundContext) -> Expected:
        """Expect the whole model, and a change of a control variate, which counts in the update's norm."""
        changes = {OWN + name: entry for name, entry in expect_changes(state.control).items()}
        return Expected({**super().expected(state, context).tree, **changes})

    def aggregate(self, state: ControlState, updates: Iterable[Update], context: RoundContext) -> ControlState:
        """Take the server's step towards the mean model; move the control variate by the share of clients in it."""
        numbers = list[int]()
        average = mean(observed(updates, lambda update: numbers.append(update.clients)), self.weighting)
        share = sum(numbers) / context.clients
        control = {name: c + share * average.pop(OWN + name) for name, c in state.control.items()}
        return replace(self.stepped(state, average), control=control)

    def paper_bytes(self, model: nn.Module) -> float:
        """Return four bytes for every number of the model and of a control variate."""
        return super().paper_bytes(model) + 4.0 * sum(w.numel() for w in model.parameters() if w.requires_grad)
