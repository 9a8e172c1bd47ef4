"""Small models of torchvision, timm and Hugging Face, without weights, their data, and a run of each.

Each recipe here is a function, as a user would write it: ``open_model`` and the command line take it by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedsieve import Data, Dataset, Run, Task, methods
from fedsieve.client.losses import NextToken


def library(name: str) -> Any:
    """Return a library of models; the test that needs it is skipped where it is not installed."""
    return pytest.importorskip(name)


def images() -> Dataset:
    torch.manual_seed(0)
    x, y = torch.randn(24, 3, 32, 32), torch.arange(24) % 4
    return Dataset("images", Data(x, y), Data(x[:8], y[:8]), tuple("abcd"))


def sentences() -> Dataset:
    """Token ids, of which some are padding, with their types; one of four classes."""
    torch.manual_seed(0)
    tokens = {"input_ids": torch.randint(40, (24, 8)), "token_type_ids": torch.arange(8).expand(24, 8) // 4 % 2}
    tokens["attention_mask"] = (torch.arange(8) < 4 + torch.arange(24)[:, None] % 5).long()
    data = Data(tokens, torch.arange(24) % 4)
    return Dataset("sentences", data, data.subset(torch.arange(8)), tuple("abcd"))


def texts() -> Dataset:
    torch.manual_seed(0)
    ids = torch.randint(40, (24, 9))
    data = Data(ids[:, :-1], ids[:, 1:])
    return Dataset("texts", data, data.subset(torch.arange(8)), tuple(map(str, range(40))))


def torchvision_vit() -> nn.Module:
    vit: nn.Module = library("torchvision").models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4
    )
    nn.init.normal_(vit.heads.head.weight, std=0.1)  # zero in a new one: no client would train the rest in one round
    return vit


def convnext() -> nn.Module:
    """With layer scale and stochastic depth."""
    module = library("torchvision").models.convnext
    blocks = [module.CNBlockConfig(16, 32, 1), module.CNBlockConfig(32, None, 1)]
    net: nn.Module = module.ConvNeXt(blocks, stochastic_depth_prob=0.3, num_classes=4)
    return net


def mobilenetv3() -> nn.Module:
    module = library("torchvision").models.mobilenetv3
    blocks = [(8, 3, 32, 16, True, "RE", 2, 1, 1.0), (16, 5, 64, 32, True, "HS", 2, 1, 1.0)]
    net: nn.Module = module.MobileNetV3(
        [module.InvertedResidualConfig(*block) for block in blocks], last_channel=64, num_classes=4
    )
    return net


def resnet() -> nn.Module:
    """With bottlenecks and GroupNorm."""
    models, layers = library("timm").models, library("timm").layers
    net: nn.Module = models.resnet.ResNet(
        models.resnet.Bottleneck,
        (1, 1, 1, 1),
        channels=(8, 8, 16, 16),
        stem_width=8,
        stem_type="deep",
        num_classes=4,
        norm_layer=layers.GroupNorm1,
    )
    return net


def timm_vit() -> nn.Module:
    """With layer scale and stochastic depth."""
    vit: nn.Module = library("timm").models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=4,
        init_values=0.1,
        drop_path_rate=0.3,
    )
    return vit


def swin() -> nn.Module:
    """With tables of relative positions, their indices, and masks of shifted windows."""
    net: nn.Module = library("timm").models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,), num_classes=4
    )
    return net


def bert() -> nn.Module:
    module = library("transformers")
    config = module.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=4,
    )  # fmt: skip
    net: nn.Module = module.BertForSequenceClassification(config)
    return net


def gpt2() -> nn.Module:
    """Layers with transposed weights, and a head that shares the embedding's."""
    module = library("transformers")
    config = module.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    net: nn.Module = module.GPT2LMHeadModel(config)
    return net


def llama() -> nn.Module:
    module = library("transformers")
    config = module.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    net: nn.Module = module.LlamaForCausalLM(config)
    return net


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Dataset]]] = {
    "torchvision_vit": (torchvision_vit, images),
    "convnext": (convnext, images),
    "mobilenetv3": (mobilenetv3, images),
    "resnet": (resnet, images),
    "timm_vit": (timm_vit, images),
    "swin": (swin, images),
    "bert": (bert, sentences),
    "gpt2": (gpt2, texts),
    "llama": (llama, texts),
}

METHODS: dict[str, Any] = {
    "flash": methods.FLASH(density=0.2, c_d=2, E_d=2, policy="all"),
    "zerofl": methods.ZeroFL(0.8, 0.1, policy="all", activations="where_possible"),
    "topk": methods.TopK(0.8, deployment="pruned"),
}


def run_of(name: str, method: str = "flash") -> Run:
    model, dataset = MODELS[name]
    task = Task(model, dataset, clients=3, partition="iid")
    if dataset is texts:
        task = replace(task, loss=NextToken())
    return Run(METHODS[method], task, rounds=2 if method == "flash" else 1, per_round=2, batch=8, lr=0.05)


def recipe(name: str) -> Callable[[], Run]:
    """Return the function that makes a run, as ``outside_models.py:NAME_run`` names it."""
    return lambda: run_of(name)


globals().update({f"{name}_run": recipe(name) for name in MODELS})
