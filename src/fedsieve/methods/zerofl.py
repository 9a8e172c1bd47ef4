"""ZeroFL: SWAT on the device, and an upload that is sparse too.

Qiu et al. 2022, "ZeroFL: Efficient On-Device Training for Federated Learning with Local Sparsity", Algorithm 1,
Sec. 3.3. With ``q = min(1, 1 - sp + r_mask)`` and ``d_k = w_k - w_t``, a client sends, layer by layer,

    full         w_k                    the server:  w = mean(w_k)
    top_weights  w_k on top(w_k, q)                  w = mean(w_k), zeros counting
    diff_of_top  d_k on top(w_k, q)                  w = w_t + mean(d_k)
    top_diff     d_k on top(d_k, q)                  w = w_t + mean(d_k)

and everything outside the policy's layers whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import Average, ServerOptimizer, added, dense_bytes, mean, tensors
from fedsieve.sparse.csr import ENTRY, TENSOR
from fedsieve.sparse.effective import Activations, reset_thresholds_, swat_where_possible_
from fedsieve.sparse.layers import swat_
from fedsieve.sparse.masks import keep_topk, top, topk_count
from fedsieve.sparse.policy import select_weights, uniform_densities
from fedsieve.types import Device, InputError, Method, Params, RoundContext, ServerState, Sparse, Tree, Update
from fedsieve.types.contract import Expected, expect_changes, expect_weights
from fedsieve.types.errors import check_interval
from fedsieve.types.method import LATER

Upload = Literal["full", "top_weights", "diff_of_top", "top_diff"]


@dataclass(frozen=True)
class ZeroFL(Method[ServerState]):
    """Clients train by SWAT and send only their top weights or changes, r_mask more than they train with."""

    sparsity: float = 0.9
    r_mask: float = 0.1
    """The share of further weights that travel: 0 sends just those that SWAT trains with."""
    upload: Upload = "top_weights"
    """What is sent: all weights, the top weights, the changes of the top weights, or the top changes."""
    policy: str = "zerofl"
    period: int = 1
    """Steps from one exact top-k to the next; the last threshold serves in between."""
    server: ServerOptimizer = Average()
    activations: Activations = field(default="always", metadata=LATER)
    """Which weights are sparse: of layers that cut their input too (``always``), or all that the policy names, inputs
    cut where a layer multiplies them itself (``where_possible``)."""

    def __post_init__(self) -> None:
        check_interval("sparsity", self.sparsity, "[0, 1)")
        check_interval("r_mask", self.r_mask, "[0, 1]")
        if self.period < 1:
            raise InputError(f"period must be at least 1 step, got {self.period}")

    @property
    def q(self) -> float:
        """The share of a layer that is sent (Algorithm 1: the top 1 - sp + r_mask)."""
        return min(1.0, 1 - self.sparsity + self.r_mask)

    @property
    def target_density(self) -> float:
        """The share of a layer's weights that training computes with and that is shipped."""
        return 1 - self.sparsity

    def prepare(self, model: nn.Module) -> nn.Module:
        """Clients train the policy's layers by SWAT."""
        swat = swat_ if self.activations == "always" else swat_where_possible_
        return swat(model, uniform_densities(self.weights(model), 1 - self.sparsity), self.period)

    def weights(self, model: nn.Module) -> tuple[str, ...]:
        """Return the weights that are sparse."""
        return select_weights(self.policy, model, products=self.activations == "always")

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        """Start from the fresh model."""
        params = params_of(model)
        return ServerState(params, self.server.init(params), self.weights(model))

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        """Send the dense model: only the upload is sparse."""
        return state.params

    def client(self, down: Tree, device: Device) -> Update:
        """Train by SWAT, and choose what to send."""
        before = tensors(down)
        load_(device.model, before)
        reset_thresholds_(device.model)
        metrics = train(device)
        upload = self.select_upload(before, params_of(device.model), self.weights(device.model))
        return Update(upload, len(device.data), metrics)

    def select_upload(self, before: Params, after: Params, sparse: tuple[str, ...]) -> dict[str, Tensor | Sparse]:
        """Return what a client sends (Sec. 3.3)."""
        if self.upload == "full":
            return dict(after)
        values = after if self.upload == "top_weights" else {name: w - before[name] for name, w in after.items()}
        ranked = after if self.upload == "diff_of_top" else values
        return {n: Sparse.of(v, top(ranked[n], self.q)) if n in sparse else v for n, v in values.items()}

    def expected(self, state: ServerState, context: RoundContext) -> Expected:
        """Expect weights or changes, of the sparse layers the share q of each."""
        most = {name: topk_count(self.q, state.params[name].numel()) for name in state.sparse}
        if self.upload in ("diff_of_top", "top_diff"):
            return Expected(expect_changes(state.params, most))
        return Expected(expect_weights(state.params, most if self.upload == "top_weights" else {}))

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        """Take the server's step towards the mean of the models, or the old model plus the mean of the changes."""
        average = mean(updates)
        target = average if self.upload in ("full", "top_weights") else added(state.params, average)
        params, moments = self.server.step(state.params, target, state.moments)
        return ServerState(params, moments, state.sparse)

    def deploy(self, state: ServerState) -> Params:
        """Ship the top weights of every layer: the network that training computed with."""
        return keep_topk(state.params, uniform_densities(state.sparse, 1 - self.sparsity))

    def paper_bytes(self, model: nn.Module) -> float:
        """Return the paper's upload: every tensor, dense ones too, a 1 x n CSR of int32 and float32, pickled.

        That is 8 bytes a number plus about 130 bytes a tensor (Table 1, whose MB are 1,024,000 bytes); ``full`` is
        the plain model at 4 bytes a number.
        """
        params, sparse = params_of(model), self.weights(model)
        if self.upload == "full":
            return dense_bytes(params)
        numbers = sum(v.numel() * (self.q if name in sparse else 1.0) for name, v in params.items())
        return float(ENTRY * numbers + TENSOR * len(model.state_dict()))
