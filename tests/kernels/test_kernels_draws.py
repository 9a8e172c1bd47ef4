"""What the library draws for dropout: PyTorch's numbers, and its generator where PyTorch would have left it."""

import pytest
import torch

from fedsieve.kernels import draws

SIZES = (0,), (1,), (311, 1), (1, 312), (313,), (5, 2, 7), (624,), (2001,)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 2 / 3, 0.9, 1.0])
@pytest.mark.parametrize("before", [0, 1, 2, 622, 623, 624, 625])
def test_draws_are_pytorchs(p: float, before: int, native: None) -> None:
    """At the edges of the generator's state, after numbers of 32 bits, in the middle of a pair of normal ones."""
    if not draws._is_pytorchs():
        pytest.skip("PyTorch draws in another way here")
    results = []
    for ours in (False, True):
        torch.manual_seed(before)
        torch.randn(3)
        torch.randint(7, (before,))
        for sizes in SIZES:
            drawn = draws.bernoulli(sizes, p) if ours else torch.empty(*sizes, dtype=torch.uint8).bernoulli_(p)
            results.append(drawn)
        results += [torch.randn(3), torch.rand(3), torch.rand(20, dtype=torch.float64)]
    half = len(results) // 2
    assert all(map(torch.equal, results[:half], results[half:]))


def test_where_the_library_draws_otherwise_pytorch_does(monkeypatch: pytest.MonkeyPatch, native: None) -> None:
    draws._is_pytorchs.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(draws, "_drawn", lambda sizes, p: torch.ones(*sizes, dtype=torch.uint8))
        assert not draws._is_pytorchs()
        torch.manual_seed(1)
        got = draws.bernoulli((3, 5), 0.4)
    draws._is_pytorchs.cache_clear()
    torch.manual_seed(1)
    assert torch.equal(got, torch.empty(3, 5, dtype=torch.uint8).bernoulli_(0.4))
