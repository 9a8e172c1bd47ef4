"""Streams packed by several threads: the same bytes, errors told, and processes that fork."""

import multiprocessing
from typing import Any

import pytest
import torch

from fedsieve.client.process import num_threads
from fedsieve.sparse.masks import top
from fedsieve.types import Sparse
from fedsieve.wire import WireError, decode, encode
from fedsieve.wire.streams import BACK_ENDS
from messages import same


@pytest.mark.parametrize("back", BACK_ENDS)
def test_the_bytes_do_not_depend_on_the_threads_that_pack(back: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tree: Any = {f"w{i}": torch.randn(300, 300, generator=generator) for i in range(7)}
    tree["sparse"] = Sparse.of(tree["w0"], top(tree["w0"], 0.9))
    found = set()
    for n in (1, 2, 5):
        with num_threads(n):
            found.add(encode(tree, back_end=back))
    assert len(found) == 1


def test_what_fails_while_others_pack_is_told_and_the_next_message_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(numbers: Any, back: str, free: bool = False) -> Any:
        raise WireError("no room")

    tree: Any = {name: torch.arange(200_000) for name in "nmop"}
    with num_threads(2):
        with monkeypatch.context() as patch:
            patch.setattr("fedsieve.wire.encoder.pack", fails)
            with pytest.raises(WireError, match="no room"):
                encode(tree)
        assert same(decode(encode(tree)), tree)


def packs(tree: Any) -> int:
    torch.set_num_threads(2)
    return len(encode(tree))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_packs_with_threads_of_its_own() -> None:
    tree: Any = {name: torch.arange(200_000) for name in "nm"}
    with num_threads(2):
        size = packs(tree)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(packs, (tree,)).get(60) == size
