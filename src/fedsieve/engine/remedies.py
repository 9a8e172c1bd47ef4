"""What to try where training has diverged, in words of a run's settings."""

from __future__ import annotations

from fedsieve.client.losses import BinaryCrossEntropy, CrossEntropy, NextToken, Regression
from fedsieve.engine.federation import Federation
from fedsieve.types import Examples, leaves
from fedsieve.types.optimizers import AdamW

EXAMPLES, LARGE = 1000, 100.0
"""How many training examples are looked at, and above what absolute value numbers are named: layers expect about 1."""
ADAMW_LR = 0.01
"""Above this a learning rate is rarely good for Adam, each of whose steps is about ``lr`` long in every weight."""


def remedies(federation: Federation) -> str:
    """Return what may help, the likeliest first: the user's loss, the scale of the data, the rate, clipping."""
    run, train, loss = federation.run, federation.dataset.train, federation.run.task.loss
    several = list[str]()
    if not isinstance(loss, CrossEntropy | NextToken | BinaryCrossEntropy | Regression):
        name = getattr(loss, "__name__", type(loss).__name__)
        several.append(f"see that task.loss ({name}) and its gradient are finite for any output")
    for what, part in zip(("inputs", "targets"), train.batch(slice(0, EXAMPLES)), strict=True):
        if (largest := _largest(part)) > LARGE:
            several.append(f"scale the {what}, which reach {largest:.3g}")
    usual = ", for Adam 1e-3 is usual" if isinstance(run.optimizer, AdamW) and run.lr > ADAMW_LR else ""
    several.append(f"lower lr (now {run.lr:g}{usual})")
    several.append(f"lower clip_norm (now {run.clip_norm:g})" if run.clip_norm else "clip gradients (clip_norm=1)")
    return " or ".join((", ".join(several[:-1]), several[-1]))


def _largest(x: Examples) -> float:
    """Return the largest absolute value among the floating tensors of inputs or targets; 0 where there is none."""
    return max((float(one.abs().max()) for one in leaves(x) if one.is_floating_point() and one.numel()), default=0.0)
