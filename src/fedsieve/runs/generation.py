"""``fedsieve generate``: a prompt continued by the deployed model of a run, token by token.

A model sees the last tokens, as many as the examples that it was trained on have. Where its window is full, it moves:
the later half of the tokens stays, so that those that come find room, and attention's cache is begun anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedsieve.kernels import Decoder, Predictor, loaded_isa
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.decode import NotCausal
from fedsieve.runs.model import ModelMetadata, TrainedModel
from fedsieve.runs.prediction import KERNELS
from fedsieve.types import InputError, logits_of, rng

NextLogits: TypeAlias = Callable[[Sequence[int]], Tensor]
"""Returns the logits [vocabulary] of the token that follows some, of one window at most."""


@dataclass(frozen=True)
class Sampling:
    """How many tokens are drawn, and how. Raises InputError on what cannot be."""

    tokens: int = 200
    temperature: float = 1.0
    """What logits are divided by; 0: the likeliest token is taken."""
    top_k: int | None = None
    """Among how many of the likeliest tokens; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"--tokens must be at least 1, got {self.tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature must be 0 (the likeliest token) or more, got {self.temperature:g}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k must be at least 1, got {self.top_k}: leave it out for all tokens")

    def choose(self, logits: Tensor, chance: torch.Generator) -> int:
        """Return a token by its logits [vocabulary]; of equal ones the first counts as the larger."""
        values, order = logits.double().sort(descending=True, stable=True)
        if self.temperature == 0:
            return int(order[0])
        share = ((values[: self.top_k] - values[0]) / self.temperature).softmax(0).cumsum(0)
        drawn = torch.rand((), generator=chance, dtype=torch.float64) * share[-1]
        return int(order[min(int(torch.searchsorted(share, drawn, right=True)), len(share) - 1)])


def tokenize(prompt: str, metadata: ModelMetadata) -> list[int]:
    """Return the numbers of a prompt's tokens, each the longest name that fits. Raises InputError."""
    if not metadata.next_token:
        raise InputError("generate continues text, and this model was not trained to tell the next token: see predict")
    if len(metadata.shape) != 1 or not all(metadata.classes) or not metadata.classes:
        raise InputError("the run does not say which tokens there are: give its dataset their names as classes")
    if not prompt:
        raise InputError("--prompt is empty: give the beginning of a text")
    number = {name: i for i, name in enumerate(metadata.classes)}
    longest, tokens, place = max(map(len, number)), list[int](), 0
    while place < len(prompt):
        fits = (prompt[place : place + n] for n in range(longest, 0, -1))
        name = next((name for name in fits if name in number), None)
        if name is None:
            known = "".join(metadata.classes) if longest == 1 else f"{len(number)} tokens such as {metadata.classes[0]}"
            raise InputError(f"--prompt has {prompt[place]!r}, which the model never saw: it knows {known[:200]!r}")
        tokens.append(number[name])
        place += len(name)
    return tokens


def choose_next(model: TrainedModel, kernels: str = "auto") -> tuple[NextLogits, str]:
    """Return what computes the next token's logits, and in words which way that is.

    ``kernels``: ``sparse`` skips the zeros and raises InputError where that cannot be; ``dense`` is the plain model;
    ``auto`` is sparse where it can be. Sparse keeps attention's keys and values where the model lets it.
    """
    if kernels not in KERNELS:
        raise InputError(f"--kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    (length,) = model.metadata.shape
    plain = _Anew(lambda x: logits_of(model.network(x)))
    if kernels == "dense":
        return plain, "dense"
    try:
        return _Cached(Decoder(model.network, length)), f"sparse ({loaded_isa()}), a token at a time"
    except NotCausal as error:
        predictor, why = Predictor(model.network, 1), f"because of {error}"
        predictor(torch.zeros(1, length, dtype=torch.int64))
        reason = predictor.reason
        if reason is None:
            way = f"sparse ({loaded_isa()}), all {length} tokens for each, PyTorch as long as there are fewer, {why}"
            return _Anew(lambda x: logits_of(predictor(x)) if x.shape[1] == length else plain.forward(x)), way
    except Unsupported as error:
        reason = str(error)
    if kernels == "sparse":
        raise InputError(f"there are no sparse kernels for this model, because {reason}: use --kernels dense")
    return plain, f"dense, because {reason}"


class _Cached:
    """Gives a decoder those tokens that are new to it."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.seen = decoder, list[int]()

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits behind all tokens."""
        known = len(self.seen)
        if known >= len(tokens) or self.seen != [*tokens[:known]]:
            self.decoder.reset()
            known = 0
        self.seen = [*tokens]
        return [self.decoder(token) for token in tokens[known:]][-1]


class _Anew:
    """Gives a model all tokens each time."""

    def __init__(self, forward: Callable[[Tensor], Tensor]):
        self.forward = forward

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits behind all tokens."""
        return self.forward(torch.tensor([[*tokens]]))[0, -1]


@torch.inference_mode()
def generate(next_logits: NextLogits, prompt: Sequence[int], metadata: ModelMetadata, how: Sampling) -> Iterator[str]:
    """Yield the names of the tokens that follow a prompt, each when it is there. Raises InputError."""
    (length,), classes, chance = metadata.shape, metadata.classes, rng(how.seed, "generate")
    window = [*prompt[-length:]]
    for _ in range(how.tokens):
        logits = next_logits(window)[: len(classes)]
        if not logits.isfinite().all():
            raise InputError("the model answers a number that is not finite: its training diverged")
        window.append(how.choose(logits, chance))
        yield classes[window[-1]]
        if len(window) > length:
            window = window[-((length + 1) // 2) :]
