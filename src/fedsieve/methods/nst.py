"""NST: every client learns a mask of its own; and DNR, the same in one place.

The baseline of Babakniya et al. 2022, "Federated Sparse Training: Lottery Aware Model Compression for Resource
Constrained Edge", Sec. 3: naive sparse training. The server draws one random mask and starts from the weights on it.
A client begins with that mask, keeps its own from round to round, learns it by DNR (Kundu et al. 2021, "DNR: A Tunable
Robust Pruning Framework Through Dynamic Network Rewiring of DNNs"), and sends the weights on it; the server averages,
zeros counting, and so serves the union of the masks. In a training of one epoch the mask moves in its middle (the
authors' code), not at its end (the paper).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fedsieve.client.training import epoch_ends, load_, params_of, train_on_mask
from fedsieve.server.aggregate import LearnedMaskState, Weighting, join_, mean, observed, tensors
from fedsieve.sparse.masks import (
    MaskDraw,
    apply_mask,
    draw_counts,
    drop_zeros,
    keep_topk,
    layer_counts,
    masks_from_spec,
    pack_bits,
    random_masks,
    to_sparse,
    unpack_bits,
    wrong_units,
)
from fedsieve.sparse.policy import select_weights, uniform_densities
from fedsieve.sparse.regrowth import GrowthShare
from fedsieve.sparse.units import check_channels, check_unit
from fedsieve.types import (
    LATER,
    Device,
    InputError,
    Mask,
    Method,
    Params,
    RoundContext,
    Tree,
    Update,
)
from fedsieve.types.contract import Expected, expect_weights
from fedsieve.types.errors import check_interval


@dataclass(frozen=True, kw_only=True)
class NSTState(LearnedMaskState):
    """The global model, the union of the masks that its clients last sent, and what the first mask is drawn from."""

    seed: Tensor
    """int64 []: see ``masks.random_masks``."""


@dataclass(frozen=True)
class NST(Method[NSTState]):
    """Every client learns its own mask by prune and regrow, and keeps it; the server averages what they send."""

    density: float = 0.1
    p: float = 0.25
    """DNR's first prune rate; it falls linearly to 0."""
    decay: Literal["round", "run"] = "round"
    """Over what p falls: the steps of one local training, or of the whole run (DNR)."""
    share: GrowthShare = "mean"
    """Where weights grow: by the mean |w| of a layer's non-zeros (the authors' code), or their sum (the text)."""
    deployment: Literal["aggregate", "pruned"] = "aggregate"
    """What is tested and shipped: the union of the clients' masks, or its top weights, layer by layer."""
    first_mask: Literal["common", "independent"] = "common"
    """What clients start from: the server's mask, or each a random one of its own (which does not learn)."""
    weighting: Weighting = "samples"
    """How clients count in the mean: by their examples, or equally (the authors' code)."""
    policy: str = "flash"
    draw: MaskDraw = field(default="exact", metadata=LATER)
    """How many weights a layer of the common mask keeps: its share, or as a coin for every weight says (the authors'
    code)."""
    unit: int = field(default=1, metadata=LATER)
    """How many successive output channels share a mask's pattern (``sparse.units``)."""

    def __post_init__(self) -> None:
        check_interval("density", self.density, "(0, 1]")
        check_unit(self.unit)
        check_interval("p", self.p, "[0, 1)")
        if self.draw == "bernoulli" and self.first_mask == "independent":
            raise InputError(
                "draw=bernoulli needs first_mask=common: else no server knows how many weights a client may send"
            )

    @property
    def name(self) -> str:
        """What tables and figures call the method."""
        return "nst" if self.decay == "round" else "dnr"

    @property
    def uses_rounds(self) -> bool:
        """Whether the prune rate falls over the whole run."""
        return self.decay == "run"

    @property
    def target_density(self) -> float:
        """The share of the weights that a client's mask keeps."""
        return self.density

    def init(self, model: nn.Module, rng: torch.Generator) -> NSTState:
        """Draw the common mask, and keep the fresh model's weights on it; independent masks need all of them."""
        params, names = params_of(model), select_weights(self.policy, model)
        check_channels(model, names, self.unit)
        like = {name: params[name] for name in names}
        seed = torch.randint(2**62, (), generator=rng)
        counts = draw_counts(self.draw, int(seed), uniform_densities(names, self.density), params, self.unit)
        if self.first_mask == "common":
            mask = dict(random_masks(int(seed), counts, like, self.unit))
        else:
            mask = {name: torch.ones_like(v, dtype=torch.bool) for name, v in like.items()}
        params, unit = apply_mask(params, mask), self.unit
        return NSTState(params, sparse=names, mask=mask, seed=seed, counts=counts, unit=unit)

    def broadcast(self, state: NSTState, context: RoundContext) -> Tree:
        """Send the global model, without what no client's mask keeps, and what the first mask is drawn from.

        Units are sent whole, with the zeros in them: their positions then take a fraction of the bytes.
        """
        mask = {"seed": state.seed, "counts": state.counts}
        whole = self.unit > 1
        params = to_sparse(state.params, state.mask) if whole else drop_zeros(state.params, state.sparse)
        return {"mask": mask, "params": params}

    def client(self, down: Tree, device: Device) -> Update:
        """Train on the client's own mask, learn it on the way, remember it, and send the weights on it."""
        params = down["params"]
        if not isinstance(params, Mapping):
            raise InputError("the message holds no parameters")
        load_(device.model, tensors(params))
        own = self._own(down["mask"], device)
        metrics, mask = train_on_mask(device, own, self.rates(device), self.share, self.unit)
        device.memory |= pack_bits(mask)
        return Update(to_sparse(params_of(device.model), mask), len(device.data), metrics)

    def rates(self, device: Device) -> dict[int, float]:
        """Return the prune rate after those steps that change the mask: the epochs' ends, or an only one's middle."""
        epoch, steps = epoch_ends(device)
        if self.decay == "run":
            start, end = (device.round - 1) * steps, device.rounds * steps
            return {s: self.p * (1 - (start + s) / end) for s in range(epoch, steps + 1, epoch)}
        updates = range(epoch, steps, epoch) if device.epochs > 1 else [max(1, epoch // 2)]
        return {s: self.p * (1 - s / steps) for s in updates}

    def _own(self, first: object, device: Device) -> Mask:
        """Return the client's mask: what it remembers, or in its first round the server's, or a random one."""
        like = {name: device.model.get_parameter(name) for name in select_weights(self.policy, device.model)}
        if device.memory:
            return unpack_bits(device.memory, like)
        if self.first_mask == "common":
            return dict(masks_from_spec(first, device.model, tuple(like), self.unit))
        seed, layers = int(torch.randint(2**62, (), generator=device.rng)), uniform_densities(tuple(like), self.density)
        return dict(random_masks(seed, layer_counts(layers, like, self.unit), like, self.unit))

    def expected(self, state: NSTState, context: RoundContext) -> Expected:
        """Expect the weights on a mask: prune and regrow moves its positions, and keeps their number."""
        sizes, most = {name: state.params[name].numel() for name in state.sparse}, int(state.counts.sum())
        rule = partial(wrong_units, self.unit, state.sparse, most) if self.unit > 1 else None
        return Expected(expect_weights(state.params, sizes), most * self.unit, rule=rule)

    def aggregate(self, state: NSTState, updates: Iterable[Update], context: RoundContext) -> NSTState:
        """Average, zeros counting; the union of the clients' masks survives."""
        union = {name: torch.zeros_like(own) for name, own in state.mask.items()}
        return replace(state, params=mean(observed(updates, partial(join_, union)), self.weighting), mask=union)

    def deploy(self, state: NSTState) -> Params:
        """Ship the aggregate, or its top weights."""
        return state.params if self.deployment == "aggregate" else self.pruned(state)

    def pruned(self, state: NSTState) -> Params:
        """Return the aggregate cut to the target density, layer by layer."""
        return keep_topk(state.params, uniform_densities(state.sparse, self.density), self.unit)


def DNR(density: float = 0.1, p: float = 0.25) -> NST:
    """Learn one mask by prune and regrow, the rate falling over the whole run: central training, with one client."""
    return replace(NST(density, p), decay="run")
