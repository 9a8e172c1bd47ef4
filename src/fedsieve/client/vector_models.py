"""The built-in models of numbers and text, and transformers: a perceptron, LEAF's LSTM, a small GPT, ViT-tiny."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Two hidden layers of 64 with ReLU, of numbers [n, features]."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(features, 64), nn.Linear(64, 64), nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[n, features] -> [n, outputs]."""
        y: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return y


class CharLSTM(nn.Module):
    """LEAF's model of Shakespeare (Caldas et al. 2018): an embedding of 8, two LSTMs of 256, and a linear layer.

    LEAF's tells the one character behind its window; this one the next at each place of it.
    """

    def __init__(self, length: int, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [n, T] -> [n, T, vocabulary]."""
        logits: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return logits


class GPTBlock(nn.Module):
    """Attention, causal or not, and a perceptron of four times the width, each after a norm and around a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, T, width] -> [n, T, width]."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        values = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(values.transpose(1, 2).reshape(n, t, width))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.ln2(x))))
        return y


class CharGPT(nn.Module):
    """A small GPT (Radford et al. 2019) of characters: width 128, 4 blocks of 4 heads, positions that are learnt."""

    def __init__(self, length: int, vocabulary: int, width: int = 128, blocks: int = 4, heads: int = 4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [n, T] -> [n, T, vocabulary], for T up to the length."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class ViTTiny(nn.Module):
    """ViT-tiny (Dosovitskiy et al. 2021; Touvron et al. 2021) on patches of 4x4: 12 blocks of width 192, 3 heads.

    A learnt token beside the patches' tells the class. 5,362,762 parameters at 3 channels, 10 classes.
    """

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 192, blocks: int = 12, heads: int = 3):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 4, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 65, width))
        self.blocks = nn.ModuleList(GPTBlock(width, heads, causal=False) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for parameter in (self.token, self.positions, *(m.weight for m in self.modules() if isinstance(m, nn.Linear))):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] -> [n, classes]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


VECTOR_MODELS: dict[str, Callable[[int, int], nn.Module]] = {"mlp": MLP, "char_lstm": CharLSTM, "char_gpt": CharGPT}
"""By name; they are made of the numbers of an input, and of classes, of which a regression has one."""
