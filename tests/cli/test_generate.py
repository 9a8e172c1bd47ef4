"""``fedsieve generate``: a run's model continues a prompt, alike by the kernels and PyTorch; mistakes in one line."""

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from command_line import CommandLine
from deployed_models import make
from fedsieve.client.vector_models import CharGPT, CharLSTM, GPTBlock
from fedsieve.data.shakespeare import CHARACTERS
from fedsieve.kernels import unavailable_reason
from fedsieve.runs.generation import Sampling, choose_next, generate, tokenize
from fedsieve.runs.model import ModelMetadata, TrainedModel, encode_model
from fedsieve.types import InputError, rng

KERNELS = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))
OWN = """
import torch
from fedsieve import Data, Dataset, Run, Task
from fedsieve.client.losses import NextToken
from fedsieve.client.vector_models import CharGPT
from fedsieve.methods import TopK

def texts():
    text = torch.tensor(["abc ".index(c) for c in "abcab c" * 40])
    rows = text[:270].view(30, 9)
    data = Data(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    return Dataset("texts", data, data.subset(torch.arange(6)), tuple("abc "))

def model():
    return CharGPT(8, 4, width=16, blocks=1, heads=2)

def recipe():
    task = Task(model, texts, clients=2, partition="iid", loss=NextToken())
    return Run(TopK(0.5, deployment="pruned"), task, rounds=1, per_round=2, batch=8, lr=0.5)
"""


def trained(network: nn.Module, length: int = 8, classes: str = "abc ", **task: object) -> TrainedModel:
    run = {"task": {"model": "x:y", "dataset": "x:z", "loss": {"kind": "NextToken"}} | task}
    metadata = ModelMetadata("x", "1", run, tuple(classes), (length,), (0.0,), (1.0,))
    return TrainedModel(network.requires_grad_(False).eval(), metadata)


def seeded(make: type[nn.Module], *sizes: int, **more: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make(*sizes, **more)


@KERNELS
def test_a_run_continues_a_prompt(tmp_path: Path, fedsieve: CommandLine) -> None:
    """Greedy and drawn, beyond the window: what the kernels write is what PyTorch writes."""
    (tmp_path / "own.py").write_text(OWN)
    fedsieve("run", "own.py:recipe", "--engine", "local", "--out", "run")
    words = ["generate", "run", "--prompt", "cab", "--recipe", "own.py:recipe"]
    for more in (["--temperature", 0], ["--top-k", 3, "--seed", 4]):
        sparse = fedsieve(*words, "--tokens", 30, *more, "--kernels", "sparse")
        dense = fedsieve(*words, "--tokens", 30, *more, "--kernels", "dense")
        assert sparse.stdout == dense.stdout
        assert re.fullmatch("cab[abc ]{30}\n", sparse.stdout)
        assert re.fullmatch(r"kernels: sparse \(\w+\), a token at a time\n", sparse.stderr)
        assert dense.stderr == "kernels: dense\n"
    words += ["--kernels", "dense", "--tokens"]
    short, whole, other = (fedsieve(*words, n, "--seed", seed).stdout for n, seed in ((9, 3), (30, 3), (30, 5)))
    assert whole.startswith(short[:-1])
    assert whole != other
    refusal = fedsieve("predict", "run", "test:0", "--recipe", "own.py:recipe", code=2).stderr
    assert refusal.endswith("this model's targets are none: continue a text by generate\n")


def test_a_file_of_a_built_in_model(tmp_path: Path, fedsieve: CommandLine) -> None:
    """LEAF's LSTM, which the kernels do not know."""
    model = trained(seeded(CharLSTM, 80, len(CHARACTERS)), 80, CHARACTERS, model="char_lstm", dataset="shakespeare")
    (tmp_path / "model.fsv").write_bytes(encode_model(model.metadata, model.weights()))
    printed = fedsieve("generate", "model.fsv", "--prompt", "To be", "--tokens", 4)
    assert re.fullmatch("To be.{4}\n", printed.stdout, re.DOTALL)
    assert re.fullmatch("kernels: dense, because .+\n", printed.stderr)
    assert "no sparse kernels for this model, because" in fedsieve(
        "generate", "model.fsv", "--prompt", "a", "--kernels", "sparse", code=2
    ).stderr if not unavailable_reason() else True  # fmt: skip


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prompt", ""], "--prompt is empty: give the beginning of a text"),
        (["--prompt", "abé"], "--prompt has 'é', which the model never saw: it knows 'abc '"),
        (["--prompt", "a", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be 0 (the likeliest token) or more, got -1"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature must be 0 (the likeliest token) or more, got nan"),
        (["--prompt", "a", "--top-k", "0"], "--top-k must be at least 1, got 0: leave it out for all tokens"),
        (["--prompt", "a", "--kernels", "fast"], "--kernels must be one of auto, sparse, dense, got 'fast'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, tmp_path: Path, fedsieve: CommandLine) -> None:
    model = trained(seeded(CharGPT, 8, 4), model="char_gpt", dataset="shakespeare")
    (tmp_path / "model.fsv").write_bytes(encode_model(model.metadata, model.weights()))
    printed = fedsieve("generate", "model.fsv", *words, code=2)
    assert printed.stderr == f"fedsieve: {line}\n"
    assert not printed.stdout


def test_models_without_a_next_token_are_refused() -> None:
    with pytest.raises(InputError, match="was not trained to tell the next token"):
        tokenize("0", make().metadata)
    metadata = trained(nn.Identity()).metadata
    for nameless in (replace(metadata, classes=()), replace(metadata, shape=())):
        with pytest.raises(InputError, match="does not say which tokens there are"):
            tokenize("0", nameless)


def test_the_longest_name_that_fits_is_the_token() -> None:
    metadata = replace(trained(nn.Identity()).metadata, classes=("a", "ab", "abc", "c"))
    assert tokenize("abcabaac", metadata) == [2, 1, 0, 0, 3]


def test_what_is_drawn_follows_the_logits() -> None:
    """Shares of 4,000 draws beside softmax; of the two likeliest alone; the likeliest of equal ones."""
    logits, chance = torch.tensor([0.0, 1.0, -2.0, 1.5]), rng(0, "test")
    for top_k, kept in ((None, [0, 1, 2, 3]), (2, [1, 3])):
        how = Sampling(temperature=0.7, top_k=top_k)
        drawn = torch.tensor([how.choose(logits, chance) for _ in range(4000)]).bincount(minlength=4) / 4000
        want = torch.zeros(4).index_copy_(0, torch.tensor(kept), (logits[kept] / 0.7).softmax(0))
        torch.testing.assert_close(drawn, want, rtol=0, atol=0.03)
        assert ((drawn == 0) == (want == 0)).all()
    assert Sampling(temperature=0).choose(torch.tensor([0.0, 2.0, 2.0]), chance) == 1
    assert Sampling(temperature=1e-310).choose(torch.tensor([1.0, 2.0, -1.0]), chance) == 1  # no number overflows


class Windows:
    """Remembers what it is asked, and answers that the next token is the number of those it was given, modulo 4."""

    def __init__(self) -> None:
        self.windows: list[list[int]] = []

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        self.windows.append([*tokens])
        return torch.eye(4)[len(tokens) % 4]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_window_moves_by_half(length: int) -> None:
    """Where it is full, its later half and the new token stay."""
    metadata, ask = replace(trained(nn.Identity()).metadata, shape=(length,)), Windows()
    continuation = [*generate(ask, [0, 1, 2], metadata, Sampling(12, 0))]
    text = [0, 1, 2, *("abc ".index(name) for name in continuation)]
    sizes = [len(window) for window in ask.windows]
    end = 3
    for window in ask.windows:
        assert window == text[end - len(window) : end]
        end += 1
    wanted = {1: [1] * 12, 2: [2, 1] * 6, 5: [3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5]}
    assert sizes == wanted[length]


@KERNELS
def test_models_that_look_ahead_take_whole_passes() -> None:
    """By the kernels where there are as many tokens as the model is read for, by PyTorch before."""

    class Seeing(CharGPT):
        def __init__(self) -> None:
            super().__init__(8, 4, width=16, blocks=0)
            self.blocks = nn.ModuleList([GPTBlock(16, 2, causal=False)])

    model = trained(seeded(Seeing))
    next_logits, way = choose_next(model)
    assert "all 8 tokens for each" in way
    assert way.endswith("because of attention that is not causal")
    plain, _ = choose_next(model, "dense")
    for n in (3, 8):
        torch.testing.assert_close(next_logits([1, 2, 3, 0, 1, 2, 3, 0][:n]), plain([1, 2, 3, 0, 1, 2, 3, 0][:n]))


def test_numbers_that_are_not_finite() -> None:
    bad = generate(lambda _: torch.tensor([0.0, torch.nan]), [0], trained(nn.Identity()).metadata, Sampling())
    with pytest.raises(InputError, match="a number that is not finite: its training diverged"):
        [*islice(bad, 1)]
