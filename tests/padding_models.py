"""Small transformers that leave padding out, in the ways in which outsiders write it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH = 13, 7
"""As in token_models."""
LATER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
SELF = torch.eye(LENGTH, dtype=torch.bool)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys, values [n, heads, length, size], and which tokens are padding [n, 1, 1, length]."""


def attend(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return attention with scores that are changed before the softmax."""
    return change(q @ k.mT / 2).softmax(-1) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Return sums of attention with masks that are changed in place, before, between and behind their uses."""
    later = torch.ones(LENGTH, LENGTH)
    later.triu_(1)
    mask = ~pad & (later == 0) | SELF
    y = F.scaled_dot_product_attention(q, k, v, mask)
    mask[..., :2] = True
    y = y + F.scaled_dot_product_attention(q, k, v, mask)
    added = torch.zeros(pad.shape[0], 1, LENGTH, LENGTH)
    part = added[:, :, 1:]
    part.masked_fill_(pad & ~SELF[1:], -torch.inf)
    y = y + F.scaled_dot_product_attention(q, k, v, added)
    other = added.clone()
    part = other[:, :, 1:]
    other += 1 - 0.5 * pad
    y = y + attend(q, k, v, lambda x: x + part.mean(2, keepdim=True).clamp(min=-2))
    mask.fill_(False)
    return y


PADDED: dict[str, Attend] = {
    "none to attend to": lambda q, k, v, pad: F.scaled_dot_product_attention(q, k, v, ~pad & ~LATER),
    "itself at least": lambda q, k, v, pad: F.scaled_dot_product_attention(q, k, v, (~pad | SELF) & ~LATER, 0.0),
    "filled": lambda q, k, v, pad: attend(q, k, v, lambda x: x.masked_fill(pad & ~SELF, -1e9)),
    "filled where not both": lambda q, k, v, pad: attend(
        q, k, v, lambda x: x.masked_fill(((~pad | SELF) & ~LATER) == 0, -torch.inf)
    ),
    "filled twice": lambda q, k, v, pad: attend(
        q, k, v, lambda x: x.masked_fill(LATER, -1e9).masked_fill(pad & ~SELF, -1e9)
    ),
    "of queries as well": lambda q, k, v, pad: F.scaled_dot_product_attention(q, k, v, ~pad & ~pad.mT & ~LATER),
    "a head apart": lambda q, k, v, pad: attend(
        q,
        k,
        v,
        lambda x: x + (pad & ~SELF) * torch.tensor([-1.0, -2.0, -torch.inf]).view(3, 1, 1).nan_to_num(0, 0, -1e9),
    ),
    "by heads as samples": lambda q, k, v, pad: (
        (
            q.flatten(0, 1) @ k.flatten(0, 1).mT
            + torch.where(pad & ~SELF, -torch.inf, 0.0).expand(-1, 3, -1, -1).flatten(0, 1)
        ).softmax(-1)
        @ v.flatten(0, 1)
    ).view(q.shape),
    "changed in place": lambda q, k, v, pad: by_hand(q, k, v, pad),
    "by turns": lambda q, k, v, pad: attend(q, k, v, lambda x: torch.where((pad | LATER) & ~SELF, -torch.inf, x)),
    "kept": lambda q, k, v, pad: attend(q, k, v, lambda x: torch.where(~pad | SELF, x, torch.tensor(-1e9))),
    "added": lambda q, k, v, pad: attend(
        q, k, v, lambda x: x + torch.zeros_like(pad & ~SELF, dtype=x.dtype).masked_fill(pad & ~SELF, -torch.inf)
    ),
    "none, by numbers that are added": lambda q, k, v, pad: F.scaled_dot_product_attention(
        q, k, v, torch.zeros_like(pad, dtype=q.dtype).masked_fill(pad, -torch.inf) + torch.where(LATER, -torch.inf, 0.0)
    ),
}
"""Ways to leave padding out of attention."""

Pool = Callable[[Tensor, Tensor], Tensor]
"""Of tokens [n, length, channels] and which are no padding [n, length]: [n, channels]."""
POOLS: dict[str, Pool] = {
    "mean": lambda x, keep: (x * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True).clamp(min=1),
    "filled": lambda x, keep: x.masked_fill(~keep[..., None], 0.0).mean(1),
    "chosen": lambda x, keep: torch.where(keep[..., None], x, 0.0).sum(1) * (1 + keep.float().mean(1))[:, None],
    "mean of each channel": lambda x, keep: (lambda keep: (x * keep).sum(1) / keep.sum(1).clamp(min=1e-9))(
        keep.unsqueeze(-1).expand(x.size()).float()
    ),
    "like others": lambda x, keep: (
        (x * keep[..., None].expand_as(x).type_as(x)).sum(1)
        + torch.where(keep[..., None], x, torch.zeros_like(x)).mean(1)
    ),
    "channels in other ways": lambda x, keep: (x / (keep[:, :1, None] + torch.arange(1, x.shape[-1] + 1))).mean(1),
    "last": lambda x, keep: x[torch.arange(x.shape[0]), (keep.long().cumsum(1).argmax(1)) - 1],
}
"""Ways to leave padding out of what is made of all tokens."""


class Classifier(nn.Module):
    """nn.TransformerEncoder of texts, with its default dropout; the tokens 0 to 2 are padding; layers without use."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        self.tokens, self.head, self.mask = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 4), mask
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.spare, self.norm = nn.Linear(5, 3), nn.LayerNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids < 3
        if self.mask is not None and self.mask.is_floating_point():  # PyTorch warns where one is and one is not
            padding = torch.zeros(ids.shape).masked_fill(padding, -torch.inf)
        x = self.encoder(self.tokens(ids), mask=self.mask, src_key_padding_mask=padding)
        logits: Tensor = self.head(x[:, 1])
        return logits


class Pooling(nn.Module):
    """What is made of all tokens but padding, whose positions leave it out, too; constants of each token."""

    share: Tensor
    same: Tensor

    def __init__(self, how: str):
        super().__init__()
        self.register_buffer("share", torch.linspace(0.5, 1.5, VOCABULARY))
        self.register_buffer("same", torch.arange(2 * LENGTH) % 5)
        self.how, self.tokens, self.places = how, nn.Embedding(VOCABULARY, 8), nn.Embedding(LENGTH + 1, 8)
        self.up, self.head, self.of_rest = nn.Linear(8, 16), nn.Linear(16, 4), nn.Embedding(2, 8)

    def forward(self, ids: Tensor) -> Tensor:
        keep = self.kept = ids >= 3  # to be looked at afterwards
        x = (
            self.tokens(ids) * self.share[ids][..., None]
            + self.tokens(self.same[ids])
            + self.places(keep.cumsum(1) * keep)
            + self.of_rest((ids % 2)[:, :1])
        )
        logits: Tensor = self.head(POOLS[self.how](self.up(x).relu(), keep))
        return logits


class Padding(nn.Module):
    """Attention that leaves padding out, the tokens 0 to 2; a matrix that is not used."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.tokens, self.head = how, nn.Embedding(VOCABULARY, 12), nn.Linear(12, 4)
        self.qkv, self.unused = nn.Linear(12, 36), nn.Parameter(torch.ones(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = PADDED[self.how](q, k, v, (ids < 3)[:, None, None])
        logits: Tensor = self.head((x + y.transpose(1, 2).flatten(2)).mean(1))
        return logits


PADDING: dict[str, Callable[[], nn.Module]] = {
    "encoder": Classifier,
    "encoder, causal": lambda: Classifier(LATER),
    "encoder, causal by numbers": lambda: Classifier(torch.where(LATER, -torch.inf, 0.0)),
    **{how: (lambda how=how: Padding(how)) for how in PADDED},  # type: ignore[misc]
    **{f"pooled, {how}": (lambda how=how: Pooling(how)) for how in POOLS},  # type: ignore[misc]
}
"""The models, by how they leave padding out."""


def first_label(output: Tensor, target: Tensor) -> Tensor:
    """Return the loss of the class of each sample's first target."""
    return F.cross_entropy(output, target[:, 0] % 4)
