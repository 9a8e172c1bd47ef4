"""What can be measured of a run beside its accuracy and bytes, on demand (``--measure``).

masks    the server's masks after every aggregation: their mismatch with the round before (Babakniya et al. 2022,
         eq. 1), the share of non-zeros in every layer (Qiu et al. 2022, Fig. 2), every 20 rounds the positions of
         the top 10 % of each layer (Fig. 3); and what a client's autograd keeps for backward
pruned   the accuracy of the model cut to the target density, where a method serves a union of masks
kernels  at the end of a run, a training step by the kernels beside the dense one: milliseconds, multiply-adds, memory
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fedsieve.client.training import accuracy, load_
from fedsieve.sparse.masks import mismatch, top
from fedsieve.types import Data, InputError, Mask, Method, ServerState

MEASURES = ("masks", "pruned", "kernels")
EVERY, SHARE = 20, 0.1
"""How often positions are kept, and of what share of a layer (ZeroFL, Fig. 3)."""


def check_measures(names: tuple[str, ...]) -> None:
    """Raise InputError for a measure that there is not."""
    for name in names:
        if name not in MEASURES:
            raise InputError(f"unknown measure {name!r}; the measures are {', '.join(MEASURES)}")


def measure_masks(method: Method[Any], before: ServerState | None, after: ServerState) -> dict[str, Any]:
    """Return the row's entries for ``masks``, from the state of the round before (None: there was none) and this.

    The mismatch is that of the deployed models' masks; the layers' non-zeros are those of the aggregate.
    """
    layers = {name: int(own.sum()) / own.numel() for name, own in after.support(after.params).items()}
    if before is None or not layers:
        return {"mismatch": None, "layers": layers}
    masks = [state.support(method.deploy(state)) for state in (before, after)]
    return {"mismatch": mismatch(*masks), "layers": layers}


def top_positions(state: ServerState) -> Mask:
    """Return where each sparse layer of the server's model has its top weights, zeros never."""
    return {name: top(state.params[name], SHARE) & (state.params[name] != 0) for name in state.sparse}


def measure_pruned(method: Method[Any], state: ServerState, plain: nn.Module, test: Data) -> dict[str, Any]:
    """Return the row's entry for ``pruned``, nothing for a method that serves no union."""
    pruned = method.pruned(state)
    return {} if pruned is None else {"accuracy_pruned": accuracy(load_(plain, pruned), test)}
