"""What decoding sets aside is bounded by the model, whatever a message says; and honest messages are within it."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from claims import SIZES, hostile, of_one_tensor, tried
from fedsieve.sparse.masks import top
from fedsieve.types import Sparse, Tree
from fedsieve.wire import Known, Manifest, WireError, decode, encode
from fedsieve.wire.known import LEAST, Budget
from fedsieve.wire.streams import BACK_ENDS
from messages import message, same, varint

OWN = 12 << 10
"""Bytes of Python's and NumPy's own objects: what counts beside a model of a few thousand elements alone."""


def peak(call: Callable[[], object]) -> int:
    """The bytes that a call had set aside at its worst moment, by Python and by NumPy."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_is_lent_is_given_back_once_and_what_is_drawn_is_gone() -> None:
    budget = Budget(of_one_tensor("4 k"), 100)
    whole = budget.left
    budget.draw(1000)
    with budget.lent(500):
        assert budget.left == whole - 1500
    assert budget.left == whole - 1000
    budget.give(1000)
    with budget.at_work(10 * budget.block) as blocks:
        assert budget.left < whole
        assert len(blocks) == 10
    assert budget.left == whole
    for beyond in (whole + 1, 1 << 60):
        with pytest.raises(WireError, match="would be set aside"):
            budget.draw(beyond)
    assert budget.left == whole


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_a_short_message_that_claims_much_takes_less_than_twice_the_model(size: str) -> None:
    known = of_one_tensor(size)
    assert known.manifest
    came, found = dict[str, str](), dict[str, int]()
    for name, data in hostile(size).items():
        assert len(data) < known.manifest.size / 20 + 3000
        found[name] = peak(lambda: came.update({name: tried(data, known)}))  # noqa: B023
    bound = 2 * known.manifest.size + (OWN if size == "4 k" else 0)
    assert {name: most for name, most in found.items() if most >= bound} == {}
    assert "taken" in came.values()
    assert any("positions announced" in reason or "would be set aside" in reason for reason in came.values())


WATCHED = """
import json, sys
from pathlib import Path
from claims import of_one_tensor, tried
from claims import tried

known, folder = of_one_tensor("4 M"), Path(sys.argv[1])
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
found = []
for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    known.orders.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    tried(data, known)
    found.append(resident("VmHWM") - before)
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of memory")
@pytest.mark.system
def test_and_neither_does_the_process(tmp_path: Path) -> None:
    """What torch, pcodec and zstandard set aside is in it, which tracemalloc does not see."""
    for number, data in enumerate(hostile("4 M").values()):
        (tmp_path / f"{number:02d}").write_bytes(data)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert max(json.loads(done.stdout)) < 2 * 4 * 4_000_000


MILLION = 1_000_000


def crowds() -> dict[str, bytes]:
    """A million entries: empty tensors, numbers, trees; at once, a few a tree, or under long names."""
    names = [b"\0\3" + bytes([20 + i // 10_000, 20 + i // 100 % 100, 20 + i % 100]) for i in range(MILLION)]
    empty, number = b"\2%s\0\1\0\0", b"\1%s" + bytes(8)
    tensors = b"".join(empty % name for name in names)
    thousand = varint(1000) + b"".join(empty % name for name in names[:1000])
    return {
        "tensors": varint(MILLION) + tensors,
        "numbers": varint(MILLION) + b"".join(number % name for name in names),
        "trees": varint(MILLION) + b"".join(b"\0%s\0" % name for name in names),
        "tensors, a thousand a tree": varint(1000) + b"".join(b"\0%s" % name + thousand for name in names[:1000]),
        "long names": varint(3000) + b"".join(b"\1\0" + varint(4096) + b"%04096d" % i + bytes(8) for i in range(3000)),
        "names beyond ASCII": varint(3000)
        + b"".join(b"\1\0" + varint(4095) + "€".encode() * 1363 + b"%06d" % i + bytes(8) for i in range(3000)),
    }


@pytest.mark.slow
def test_a_million_entries_are_refused_at_once() -> None:
    small = Known(Manifest.of({"x": torch.ones(4096)}))
    assert small.manifest
    for name, plan in crowds().items():
        for data, known in ((message(plan), None), (message(plan, b"", b"", 1, small.manifest.digest), small)):
            if "names" in name and known is None:
                continue  # 3,000 numbers in 12 MB are no crowd
            said, spent = [], []
            for _ in range(3):
                began = time.process_time()
                said.append(tried(data, known or Known(finite=False)))
                spent.append(time.process_time() - began)
            assert "entries announced" in said[0] or "would be set aside" in said[0], (name, said[0])
            assert min(spent) < 0.05, (name, spent)
            assert peak(lambda: tried(data, known or Known(finite=False))) < 10e6, name  # noqa: B023


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "one tensor of 4 k": {"x": (64, 64)},
    "some of 4 k": {"x": (60, 60), "b": (60,), "y": (400,)},
    "pooled": {f"{i}.weight": (20, 20) for i in range(40)},
    "300 k": {"x": (500, 500), "y": (50, 1000)},
}


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.slow
def test_honest_messages_are_within_it(shapes: str, back_end: str) -> None:
    """Every density, sparse and dense, whatever is known, and with all positions."""
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES[shapes].items()}
    near = {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
    manifest = Manifest.of(base)
    bound = max(2 * manifest.size, LEAST) + OWN + 1024 * len(base)
    for density in (0.01, 0.12, 0.3, 0.5, 0.7, 0.93, 1.0):
        masks = {n: top(v, density) for n, v in near.items()}
        cut = {n: torch.where(top(v, density), v, torch.zeros(())) for n, v in base.items()}
        sparse: Tree = {n: Sparse.of(v, masks[n]) for n, v in near.items()}
        dense: Tree = {n: torch.where(masks[n], v, torch.zeros(())) for n, v in near.items()}
        for tree, values in ((sparse, "f32"), (dense, "f32"), (sparse, "bf16"), (dense, "int8")):
            for known in (Known(manifest), Known(manifest, base), Known(manifest, cut), Known(manifest, masks=masks)):
                data, back = encode(tree, known, values, back_end), dict[str, Any]()
                assert peak(lambda: back.update(decode(data, known))) < bound  # noqa: B023
                assert values != "f32" or same(tree, back)


def test_models_that_are_sent_with_more_than_their_parameters_say_so() -> None:
    """Moments or control variates beside the parameters: ``Known.copies``, of a method its ``copies``."""
    model = {f"{i}": torch.randn(100, 100) for i in range(4)}
    twice: Tree = {"params": model, "control": {n: v + 1 for n, v in model.items()}}
    with pytest.raises(WireError, match="320000 bytes of tensors, more than 1 times the model justifies"):
        encode(twice, Known(Manifest.of(model)))
    known = Known(Manifest.of(model), copies=2)
    assert same(twice, decode(encode(twice, known), known))
    masks: Tree = {"params": model, "masks": {n: v > 0 for n, v in model.items()}}
    assert same(masks, decode(encode(masks, Known(Manifest.of(model))), Known(Manifest.of(model))))
