"""The format: exact round trips in every mode, what knowledge saves, and rounding with error feedback."""

import tracemalloc
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve import wire
from fedsieve.cli.bench.wire import Message, measure_message
from fedsieve.sparse.masks import top
from fedsieve.types import Sparse, Tree
from fedsieve.wire import Known, Manifest, WireError, decode, encode, rounded
from fedsieve.wire.plan import OWN
from fedsieve.wire.streams import BACK_ENDS
from messages import BASE, W, leaf, same, size, stream, varint
from messages import message as message_of

bits = st.lists(st.integers(0, 2**32 - 1), max_size=70)
special = st.sampled_from([0, 0x80000000, 1, 0x7F800000, 0x7FC00001, 0xFFFFFFFF])


def floats(words: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.float32))


@settings(deadline=None, max_examples=300)
@given(bits, st.lists(special, max_size=20), st.integers(0, 2**70 - 1))
def test_every_bit_of_every_float_survives(words: list[int], odd: list[int], chosen: int) -> None:
    x = floats(words + odd)
    support = torch.tensor([bool(chosen >> i & 1) for i in range(len(x))], dtype=torch.bool)
    tree: dict[str, object] = {"dense": x, "sparse": Sparse.of(x, support), "n": 0.1, "deeper": {"x": x.view(1, -1)}}
    assert same(tree, decode(encode(tree)))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", wire.TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5)])
def test_every_type_and_shape_survives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    assert same({"x": x}, decode(encode({"x": x})))


@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("numel", [1, 7, 64, 1000, 65537])
def test_sparse_tensors_survive_at_every_density(numel: int, density: float) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    sparse = Sparse.of(x, top(x, density))
    assert same({"x": sparse}, decode(encode({"x": sparse})))


@pytest.mark.parametrize("numel", [0, 1023, 5000, 300_000])
def test_long_vectors_survive_and_are_packed(numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) / 50
    x[: numel // 7] = floats([0, 0x80000000, 1, 0x7F800000, 0x7FC00001, 0xFFFFFFFF] * numel)[: numel // 7]
    message = encode({"x": x})
    assert same({"x": x}, decode(message))
    assert len(message) < 3.8 * numel + 64


@pytest.mark.parametrize(
    "x", [torch.zeros(3_000_000), torch.arange(2048.0), torch.rand(2048) > 0.5, torch.ones(9, 2048)]
)
def test_vectors_that_are_nothing_like_weights_survive(x: torch.Tensor) -> None:
    assert same({"x": x}, decode(encode({"x": x})))


def test_noise_is_sent_as_it_is() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)
    assert len(encode({"x": torch.from_numpy(words.view(np.float32))})) <= 4 * 4096 + 64


def test_an_explicit_zero_is_a_value() -> None:
    sparse = Sparse.of(torch.tensor([0.0, -0.0, 1.0]), torch.tensor([True, True, False]))
    assert same(decode(encode({"x": sparse}))["x"], sparse)


def test_positions_cost_what_the_docstring_says_and_about_their_entropy() -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1))
    for q in (0.3, 0.1, 0.05, 0.01):
        sparse = Sparse.of(x, torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < q)
        p = len(sparse.index) / len(x)
        entropy = len(x) * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8
        positions = len(encode({"x": sparse})) - 4 * len(sparse.index)
        assert positions <= 1.02 * entropy + 64


@pytest.fixture(scope="module")
def message() -> bytes:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    return encode(
        {"a": Sparse.of(x, top(x, 0.05)), "b": {"c": x[:9], "d": 3.0}, "e": Sparse.of(x[:9], x[:9] > 0), "f": x}
    )


@pytest.mark.slow
def test_a_message_cut_anywhere_is_refused(message: bytes) -> None:
    for end in range(len(message)):
        with pytest.raises(WireError):
            decode(message[:end])


@pytest.mark.slow
def test_a_damaged_message_is_refused_or_is_another_message(message: bytes) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5000):
        damaged = bytearray(message)
        for at in generator.integers(0, len(message), generator.integers(1, 4)):
            damaged[at] = generator.integers(0, 256)
        try:
            tree = decode(bytes(damaged))
        except WireError:
            continue
        for value in tree.values():
            if isinstance(value, Sparse):
                assert len(value.index) == len(value.values)
                assert (value.index.diff() > 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(2, dtype=torch.complex64)},
        {"x": Sparse(torch.ones(2), torch.tensor([1, 1]), (4,))},
        {"x": Sparse(torch.ones(2), torch.tensor([1, 4]), (4,))},
        {"x": Sparse(torch.ones(2), torch.tensor([-1, 1]), (4,))},
    ],
    ids=["complex", "repeated", "out of range", "negative"],
)
def test_what_cannot_be_sent_is_refused(wrong: Tree) -> None:
    with pytest.raises(WireError):
        encode(wrong)


SHAPES = {"big": (70, 70), "small": (9, 7), "bias": (33,), "empty": (0, 3), "one": (1,)}


def model(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def near(base: Mapping[str, torch.Tensor], step: float) -> dict[str, torch.Tensor]:
    noise = model(99)
    return {name: v * (1 + step * noise[name]) for name, v in base.items()}


def pruned(tree: Mapping[str, torch.Tensor], density: float) -> dict[str, torch.Tensor]:
    return {name: torch.where(top(v, density), v, torch.zeros(())) for name, v in tree.items()}


def contexts() -> dict[str, Known]:
    base = model(0)
    masks = {name: top(v, 0.2) for name, v in base.items()}
    manifest = Manifest.of(base)
    return {
        "nothing": Known(finite=False),
        "manifest": Known(manifest, finite=False),
        "base": Known(manifest, base, finite=False),
        "base without manifest": Known(base=base, finite=False),
        "sparse base": Known(manifest, {n: Sparse.of(v, masks[n]) for n, v in base.items()}, finite=False),
        "masks": Known(manifest, masks=masks, finite=False),
        "everything": Known(manifest, pruned(base, 0.2), masks, finite=False),
    }


def trees() -> dict[str, Tree]:
    base = model(0)
    masks = {name: top(v, 0.2) for name, v in base.items()}
    mixed = {n: v if n == "bias" else Sparse.of(v, masks[n]) for n, v in near(base, 1e-4).items()}
    return {
        "the base itself": base,
        "near the base": near(base, 1e-4),
        "far from the base": model(5),
        "pruned": pruned(near(base, 1e-2), 0.2),
        "sparse on other positions": {n: Sparse.of(v, top(v, 0.1)) for n, v in model(7).items()},
        "sparse on the masks": {n: Sparse.of(v, masks[n]) for n, v in near(base, 1e-4).items()},
        "values on the masks": {n: v[masks[n]] for n, v in near(base, 1e-4).items()},
        "all positions": {n: Sparse.of(v, torch.ones_like(v, dtype=torch.bool)) for n, v in base.items()},
        "no positions": {n: Sparse.of(v, torch.zeros_like(v, dtype=torch.bool)) for n, v in base.items()},
        "zeros": {n: torch.zeros_like(v) for n, v in base.items()},
        "in subtrees, backwards": {"a": dict(reversed(mixed.items())), "b": {"small": base["small"]}, "n": 3.0},
        "other names and shapes": {"else": base["big"], "small": base["bias"], "k": torch.arange(9)},
    }


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("known", contexts())
@pytest.mark.parametrize("tree", trees())
def test_every_bit_survives_whatever_the_receiver_knows(tree: str, known: str, back_end: str) -> None:
    sent, context = trees()[tree], contexts()[known]
    assert same(sent, decode(encode(sent, context, back_end=back_end), contexts()[known]))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), special), min_size=64, max_size=90), st.integers(), st.booleans())
@pytest.mark.slow
def test_every_float_survives_beside_every_other(pairs: list[tuple[int, int]], chosen: int, swap: bool) -> None:
    x, base = floats([a for a, _ in pairs]), floats([b for _, b in pairs])
    x, base = (base, x) if swap else (x, base)
    mask = torch.tensor([bool(chosen >> i & 1) for i in range(len(x))], dtype=torch.bool)
    known = Known(Manifest.of({"x": x}), {"x": base}, {"x": mask}, finite=False)
    for tree in ({"x": x}, {"x": Sparse.of(x, mask)}, {"x": Sparse.of(x, ~mask)}, {"x": x[mask]}):
        assert same(tree, decode(encode(tree, known), known))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 3 * OWN), st.floats(0, 1), st.floats(0, 1), st.sampled_from(BACK_ENDS))
def test_every_size_and_density_survives(numel: int, density: float, churn: float, back_end: str) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    base = torch.where(torch.rand(numel, generator=torch.Generator().manual_seed(1)) < churn, x.flip(0), x)
    known = Known(Manifest.of({"x": x}), {"x": base})
    tree = {"x": Sparse.of(x, top(x, density)) if numel else x}
    assert same(tree, decode(encode(tree, known, back_end=back_end), known))


def test_a_known_mask_costs_nothing() -> None:
    mask = top(W, 0.05)
    tree = {"w": Sparse.of(W, mask)}
    values = size({"w": W[mask]})
    assert abs(size(tree, Known(Manifest.of(BASE), masks={"w": mask})) - values) < 64
    assert size(tree) > values + W.numel() * 0.28 / 8


def test_a_known_base_tells_most_of_the_mask_and_of_the_values() -> None:
    tree: Tree = {"w": Sparse.of(W, top(W, 0.05))}
    assert size(tree, Known(Manifest.of(BASE), BASE)) < 0.75 * size(tree)
    dense: Tree = {"w": W}
    assert size(dense, Known(Manifest.of(BASE), BASE)) < 0.75 * size(dense)


def test_the_base_itself_costs_next_to_nothing() -> None:
    known = Known(Manifest.of(BASE), BASE)
    assert size(BASE, known) < 200
    sparse = {"w": Sparse.of(BASE["w"], top(BASE["w"], 0.05))}
    assert size(sparse, known) < 0.02 * size(sparse)


def test_a_support_that_hardly_changes_is_sent_as_changes() -> None:
    held = torch.where(top(W, 0.05), W.flip(1), torch.zeros(()))
    now = held.clone()
    now.view(-1)[held.view(-1).nonzero()[::50, 0]] = 0
    tree = {"w": Sparse(torch.ones(k := int((now != 0).sum())), now.view(-1).nonzero()[:, 0], (512, 600))}
    assert size(tree, Known(Manifest.of(BASE), {"w": held})) < 0.2 * size(tree)
    assert k > 10_000


def test_names_and_shapes_of_a_manifest_are_not_sent() -> None:
    tree = {f"a.long.name.of.layer.{i}.weight": torch.randn(3, 4) for i in range(50)}
    # an entry is its head and its modes, two bytes; the digest, sixteen
    assert size(tree, Known(Manifest.of(tree))) <= size({str(i): v for i, v in tree.items()}) - 50 * (25 + 3) + 16


def test_zeros_of_a_dense_tensor_are_not_sent() -> None:
    sparse = torch.where(top(W, 0.05), W, torch.zeros(()))
    assert size({"w": sparse}) <= size({"w": Sparse.of(W, top(W, 0.05))}) + 300  # padding pays for what it unfolds to


def test_the_sign_of_what_is_never_negative_is_not_sent() -> None:
    assert size({"w": W.abs()}) < size({"w": W}) - W.numel() / 8 + 64


def test_unknown_values_and_back_ends_are_refused() -> None:
    with pytest.raises(WireError, match="f32, bf16, int8, int4"):
        encode({}, values="int2")
    with pytest.raises(WireError, match="int2"):
        rounded(W, "int2")
    with pytest.raises(WireError, match="lzma is not installed"):
        encode({}, back_end="lzma")


def test_a_mask_must_fit_its_base() -> None:
    for mask in (torch.ones(3), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="must be boolean"):
            Known(base={"w": torch.zeros(3)}, masks={"w": mask})


def test_where_pcodec_is_missing_zstandard_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsieve.wire import streams

    tree: Tree = {"w": Sparse.of(W, top(W, 0.05))}
    ours, zstd = encode(tree), encode(tree, back_end="zstd")
    monkeypatch.setattr(streams, "wrapped", None)
    assert encode(tree) == zstd
    assert same(tree, decode(zstd))
    assert len(zstd) < 1.15 * len(ours)
    with pytest.raises(WireError, match="pcodec, which is not installed"):
        decode(ours)
    monkeypatch.setattr(streams, "zstandard", None)
    with pytest.raises(WireError, match="pcodec or zstandard is not installed"):
        encode(tree)
    with pytest.raises(WireError, match="zstandard, which is not installed"):
        decode(zstd)


@pytest.mark.parametrize("many", [60, 700])
def test_what_is_alike_is_pooled(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of one name have one distribution, of another name another: apart they take less."""
    scales = {"running_var": 1e4, "running_mean": 1e-3, "bias": 1e-9, "weight": 1.0}
    generator = torch.Generator().manual_seed(0)
    tree = {
        f"bn{i}.{name}": scale * (1 + torch.rand(many, generator=generator))
        for i in range(40)
        for name, scale in scales.items()
    }
    known, plan = Known(Manifest.of(tree)), wire.plan
    message = encode(tree, known)
    assert same(tree, decode(message, known))
    assert message[4] & plan.BY_KIND
    with monkeypatch.context() as patch:
        patch.setattr(plan, "kind_of", lambda *_: "")
        patch.setattr(wire.encoder, "OWN_BY_KIND", OWN)
        together = encode(tree, known)
    assert not together[4] & plan.BY_KIND
    assert same(tree, decode(together, known))
    assert len(message) < 0.95 * len(together)


@pytest.mark.parametrize("density", [0.3, 0.05, 1.0])
@pytest.mark.parametrize("based", [False, True], ids=["alone", "base"])
def test_memory_stays_within_one_and_a_half_dense_models(density: float, based: bool) -> None:
    """Besides the message, or the tensors, that come out."""
    generator = torch.Generator().manual_seed(0)
    params = {f"{i}.weight": torch.randn(300, 500, generator=generator) for i in range(4)}
    base = {name: v * (1 + 0.02 * torch.randn(v.shape, generator=generator)) for name, v in params.items()}
    tree: Tree = {n: v if density == 1 else Sparse.of(v, top(v, density)) for n, v in params.items()}
    message = Message("", tree, context=Known(Manifest.of(params), base if based else {}))  # type: ignore[arg-type]
    row = measure_message(message, repeats=1)
    assert 0 < row.encode_memory < 1.5
    assert 0 < row.decode_memory < 1.5


@pytest.mark.parametrize("edge", [0, 1900, 2032, 2048])
def test_an_order_against_a_single_large_tensor_takes_at_most_twice_the_model(edge: int) -> None:
    """A hostile message may name any edge: half of the elements get an order, or it is refused."""
    base = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).abs()
    known = Known(Manifest.of({"x": base}), {"x": base})
    plan = leaf(3, (400_000,), 0, 4, varint(1) + varint(0) + varint(edge))
    data = message_of(plan, stream([1.0], "<f4"), b"", 3, known.manifest.digest + known.digest)  # type: ignore[union-attr]
    tracemalloc.start()
    with suppress(WireError):
        decode(data, known)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most <= 2 * 4 * 400_000
