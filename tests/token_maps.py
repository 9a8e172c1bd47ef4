"""Maps of tokens, to and from ordinary tensors [n, tokens, channels], amid memory full of NaN."""

import torch
from torch import Tensor

from fedsieve.kernels.abi import WORDS, FeatureMap, address

GAP = 3 * WORDS
"""Words between a channel and the next; as many stand before the first."""


class TokenMap:
    """A map of n samples of ``length`` tokens, one column wider than they need: NaN where nobody has written."""

    def __init__(self, n: int, length: int, channels: int, storage: str = "fp32"):
        self.shape, self.packed = (n, length, channels), storage == "bf16"
        self.lanes_of_column = 2 * WORDS if self.packed else WORDS
        self.width = -(-n * length // self.lanes_of_column) + 1
        nan = 0x7FC07FC0 if self.packed else 0x7FC00000
        self.memory = torch.full((channels + 1, self.width * WORDS + GAP), nan, dtype=torch.int32)
        self.untouched = self.memory.clone()

    @property
    def map(self) -> FeatureMap:
        """As the kernels know it."""
        place = address(self.memory, self.memory.shape[1])
        return FeatureMap(place, self.shape[2], 1, 1, self.width, 0, self.packed, GAP)

    def lanes(self) -> Tensor:
        """Return all numbers, [lanes, channels]: the tokens, and what stands behind them."""
        words = self.memory[1:, : self.width * WORDS]
        if not self.packed:
            return words.view(torch.float32).T
        both = torch.stack([words & -65536, words << 16]).view(torch.float32)
        return both.view(2, -1, self.width, WORDS).permute(2, 0, 3, 1).flatten(0, 2)

    def read(self) -> Tensor:
        """Return the tokens."""
        n, length, channels = self.shape
        return self.lanes()[: n * length].reshape(n, length, channels).contiguous()

    def rest(self) -> Tensor:
        """Return what stands in the lanes behind the tokens."""
        return self.lanes()[self.shape[0] * self.shape[1] :]

    def write(self, x: Tensor, rest: float = torch.nan) -> "TokenMap":
        """Store tokens, and a number in the lanes behind them; return the map."""
        n, length, channels = self.shape
        lanes = torch.full((self.width * self.lanes_of_column, channels), float(rest))
        lanes[: n * length] = x.reshape(n * length, channels)
        if self.packed:
            both = lanes.bfloat16().view(torch.int16).int().view(self.width, 2, WORDS, channels).permute(1, 3, 0, 2)
            words = (both[0] << 16) | (both[1] & 0xFFFF)
        else:
            words = lanes.T.contiguous().view(torch.int32)
        self.memory[1:, : self.width * WORDS] = words.reshape(channels, -1)
        return self

    def is_clean(self) -> bool:
        """Tell whether the words between the channels are as they were."""
        gaps = [memory[:, self.width * WORDS :] for memory in (self.memory, self.untouched)]
        return torch.equal(*gaps)
