"""Whether the parts of an experiment fit: data, model and method. What does not is said before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedsieve.data import Dataset
from fedsieve.types import InputError

if TYPE_CHECKING:
    from fedsieve.engine.task import Federation


def check_labels(dataset: Dataset) -> None:
    """Raise InputError unless there are examples, and every label is a number of a class."""
    for what, data in (("training", dataset.train), ("test", dataset.test)):
        if not len(data):
            raise InputError(f"{dataset.name} has no {what} example")
        low, high = int(data.y.min()), int(data.y.max())
        if data.y.dtype != torch.int64 or low < 0 or high >= len(dataset.classes):
            raise InputError(
                f"{dataset.name}: {what} labels must be int64 from 0 to {len(dataset.classes) - 1} "
                f"({len(dataset.classes)} classes), got {data.y.dtype} from {low} to {high}"
            )


@torch.no_grad()
def check_model(federation: Federation) -> None:
    """Raise InputError unless the model takes the dataset's examples, tells its classes apart, and can be trained."""
    dataset, model, named = federation.dataset, federation.model(), federation.run.task.model
    what = named if isinstance(named, str) else getattr(named, "__name__", "of yours")
    fits = f"model {what} does not fit {dataset.name}"
    x, _ = dataset.train.batch(slice(0, 2))
    try:
        logits = model.eval()(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"{fits}: given examples of shape {list(x.shape[1:])} it fails ({error})") from None
    if logits.shape != (len(x), len(dataset.classes)):
        raise InputError(
            f"{fits}: it answers {list(logits.shape)} for {len(x)} examples of {len(dataset.classes)} classes"
        )
    if federation.run.task.augment != "none" and x.dim() != 4:
        raise InputError(f"task.augment=crop_flip needs images, but {dataset.name} has shape {list(x.shape[1:])}")
    if not any(w.requires_grad for w in model.parameters()):
        raise InputError(f"{fits}: it has no parameter to train")
    try:
        model.train()(x[:1])
    except ValueError:
        _check_last_batches(federation)


def _check_last_batches(federation: Federation) -> None:
    """Raise InputError if a client's last batch holds one example, which this model's BatchNorm cannot train on."""
    run = federation.run
    sizes = {len(shard) - int(run.task.validation * len(shard)) for shard in federation.shards}
    if all(size % run.batch != 1 for size in sizes):
        return
    works = next((b for b in range(run.batch + 1, max(sizes) + 2) if all(size % b != 1 for size in sizes)), None)
    remedy = f"-s batch={works} leaves none" if works else "use fewer clients, so that all have more"
    raise InputError(f"BatchNorm cannot train on the one example that batches of {run.batch} leave a client: {remedy}")
