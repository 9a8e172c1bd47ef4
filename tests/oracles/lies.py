"""What a client may say that is not so; and engines whose clients say it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fedsieve import Sparse, local
from fedsieve.engine import Engine, Exchange, Federation
from fedsieve.engine.messages import Messages
from fedsieve.engine.rollback import Memory
from fedsieve.types import Tree

Reply = dict[str, Any]


Act = Callable[[int, int, Tree, Reply], Iterable[tuple[int, Tree]]]


def changed(act: Act, inner: Engine | None = None) -> Engine:
    """An engine that puts ``act(round, client, what it was sent, its reply)`` in place of every answer, sealed."""

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        codec = Messages(federation)
        with (inner or local())(federation, memory) as exchange:

            def answers(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes]]:
                for client, answer in exchange(t, messages):
                    down = codec.decode_broadcast(codec.unseal_broadcast(t, client, messages[client]))
                    known = codec.known(down)
                    reply: Reply = dict(codec.decode_reply(t, client, answer, known))
                    for author, changed in act(t, client, down, reply):
                        yield author, codec.encode_reply(t, author, changed, known)

            yield answers

    return engine


def largest(tree: Reply) -> str:
    """The entry with the most values."""
    sizes = {n: len(v.index) if isinstance(v, Sparse) else v.numel() for n, v in tree.items() if not is_number(v)}
    return max(sizes, key=lambda name: sizes[name])


def is_number(value: object) -> bool:
    return isinstance(value, float)


def values_of(value: Any) -> torch.Tensor:
    return (value.values if isinstance(value, Sparse) else value).view(-1)


def poison(number: float) -> Callable[[Reply, Any], Any]:
    def lie(reply: Reply, state: Any) -> Any:
        values_of(reply["tree"][largest(reply["tree"])])[0] = number
        return reply

    return lie


def says(part: str, value: Any) -> Callable[[Reply, Any], Any]:
    """Put a value at a path such as ``metrics/loss``."""

    def lie(reply: Reply, state: Any) -> Any:
        *path, last = part.split("/")
        node = reply
        for step in path:
            node = node[step]
        node[last] = value
        return reply

    return lie


def entry(change: Callable[[Any], Any]) -> Callable[[Reply, Any], Any]:
    """Change the largest entry of the tree."""

    def lie(reply: Reply, state: Any) -> Any:
        name = largest(reply["tree"])
        reply["tree"][name] = change(reply["tree"][name])
        return reply

    return lie


def longer(value: Any) -> Any:
    if isinstance(value, Sparse):
        return Sparse(value.values, value.index, (*value.shape[:-1], value.shape[-1] + 1))
    return torch.cat([value, value])


def other_type(value: Any) -> Any:
    to = torch.float32 if values_of(value).dtype == torch.float64 else torch.float64
    return Sparse(value.values.to(to), value.index, value.shape) if isinstance(value, Sparse) else value.to(to)


def integers(value: Any) -> Any:
    return Sparse(value.values.long(), value.index, value.shape) if isinstance(value, Sparse) else value.long()


def other_kind(value: Any) -> Any:
    return value.dense() if isinstance(value, Sparse) else Sparse.of(value, torch.ones_like(value, dtype=torch.bool))


def without(reply: Reply, state: Any) -> Any:
    del reply["tree"][largest(reply["tree"])]
    return reply


def without_last(reply: Reply, state: Any) -> Any:
    del reply["tree"][[*reply["tree"]][-1]]
    return reply


def swapped(reply: Reply, state: Any) -> Any:
    tree = reply["tree"]
    a = largest(tree)
    others = [n for n, v in tree.items() if not is_number(v) and tuple(v.shape) != tuple(tree[a].shape)]
    if not others:
        return NotImplemented
    tree[a], tree[others[0]] = tree[others[0]], tree[a]
    return reply


def flooded(reply: Reply, state: Any) -> Any:
    """Send everything where a part is allowed."""
    sparse = {n: v for n, v in reply["tree"].items() if isinstance(v, Sparse)}
    if not sparse:
        return NotImplemented
    for name, v in sparse.items():
        reply["tree"][name] = Sparse.of(v.dense() + 1e-6, torch.ones(v.shape, dtype=torch.bool))
    return reply


def one_more(reply: Reply, state: Any) -> Any:
    """Send one value more than is allowed."""
    for name, v in reply["tree"].items():
        if isinstance(v, Sparse) and len(v.index) < v.dense().numel():
            support = torch.zeros(v.dense().numel(), dtype=torch.bool).index_fill_(0, v.index, True)
            support[(~support).nonzero()[0]] = True
            reply["tree"][name] = Sparse.of(v.dense(), support.view(v.shape))
            return reply
    return NotImplemented


def on_the_mask(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Reply, Any], Any]:
    """Send ``change(values, whole weight)`` where the values on a mask are expected."""

    def lie(reply: Reply, state: Any) -> Any:
        for name, v in reply["tree"].items():
            whole = state.params.get(name)
            if isinstance(v, torch.Tensor) and whole is not None and v.shape != whole.shape:
                reply["tree"][name] = change(v, whole)
                return reply
        return NotImplemented

    return lie


def negative_variance(reply: Reply, state: Any) -> Any:
    if "bn.running_var" not in reply["tree"]:
        return NotImplemented
    reply["tree"]["bn.running_var"] = -state.params["bn.running_var"] - 1
    return reply


def other_tier(reply: Reply, state: Any) -> Any:
    if "tier" not in reply["tree"]:
        return NotImplemented
    reply["tree"]["tier"] = (reply["tree"]["tier"] + 1) % 3
    return reply


def sensed(number: float) -> Callable[[Reply, Any], Any]:
    def lie(reply: Reply, state: Any) -> Any:
        if "sensed" not in reply["tree"]:
            return NotImplemented
        reply["tree"]["sensed"].fill_(number)
        return reply

    return lie


LIES: dict[str, Callable[[Reply, Any], Any]] = {
    "nan": poison(float("nan")),
    "inf": poison(float("inf")),
    "-inf": poison(-float("inf")),
    "1e30": poison(1e30),
    "no examples": says("n", 0.0),
    "negative examples": says("n", -40.0),
    "1e12 examples": says("n", 1e12),
    "one example too many": says("n", 41.0),
    "half an example": says("n", 3.5),
    "nan examples": says("n", float("nan")),
    "infinite examples": says("n", float("inf")),
    "a tensor of examples": says("n", torch.tensor([3.0])),
    "longer": entry(longer),
    "one element": entry(lambda v: torch.zeros(1, dtype=values_of(v).dtype)),
    "one sparse element": entry(lambda v: Sparse(torch.zeros(1), torch.zeros(1, dtype=torch.int64), (1,))),
    "no element": entry(lambda v: torch.zeros(0)),
    "a scalar": entry(lambda v: torch.zeros((), dtype=values_of(v).dtype)),
    "other type": entry(other_type),
    "integers": entry(integers),
    "other kind": entry(other_kind),
    "a number for a tensor": entry(lambda v: 1.0),
    "a tree for a tensor": entry(lambda v: {"w": v}),
    "extra name": says("tree/extra", torch.zeros(3)),
    "extra number": says("tree/stage", 2.0),
    "long hostile name": says("tree/" + "[bold]\x1b[31m\n" * 99, torch.zeros(3)),
    "missing name": without,
    "last name missing": without_last,
    "nothing": says("tree", {}),
    "no tree": says("tree", 3.0),
    "swapped names": swapped,
    "extra part": says("more", torch.zeros(1000)),
    "flooded": flooded,
    "one value too many": one_more,
    "off the mask": on_the_mask(lambda values, whole: torch.ones_like(whole)),
    "one value off the mask": on_the_mask(lambda values, whole: torch.cat([values, torch.ones(1)])),
    "negative variance": negative_variance,
    "other tier": other_tier,
    "sensed everything": sensed(1.0),
    "sensed nothing": sensed(0.0),
    "sensed more than is": sensed(1.5),
}


BESIDE: dict[str, Callable[[Reply, Any], Any]] = {
    "extra metric": says("metrics/accuracy_of_others", 1.0),
    "a column as a metric": says("metrics/seconds", 1.0),
    "nan metric": says("metrics/loss", float("nan")),
    "huge metric": says("metrics/loss", 1e300),
    "a tensor as a metric": says("metrics/loss", torch.zeros(1)),
    "no metrics": says("metrics", 0.0),
    "a tensor of work": says("work/real", torch.zeros(3)),
    "nan work": says("work/real", float("nan")),
    "negative work": says("work/dense", -1.0),
    "extra work": says("work/more", 1.0),
    "half a step": says("notes/steps", 0.5),
    "endless training": says("notes/seconds", float("inf")),
    "two reasons": says("notes/why", {"a": 1.0, "b": 1.0}),
    "a tensor for a reason": says("notes/why", {"a": torch.zeros(1000)}),
    "a hostile reason": says("notes/why", {"a\x1b[2J": 1.0}),
    "a tensor for a flag": says("notes/sparse", torch.zeros(3)),
    "a tensor of steps": says("notes/steps", torch.zeros(3)),
    "extra note": says("notes/more", torch.zeros(1000)),
    "no finite metric": says("metrics/loss", float("inf")),
    "a million metrics": says("metrics", {f"m{i}": 1.0 for i in range(10**6)}),
    "a metric with a hostile name": says("metrics/" + "[bold]\x1b[31m\n" * 99, 1.0),
    "a tree for metrics": says("metrics", {"loss": {"loss": {"loss": 1.0}}}),
    "a metric in place of metrics": says("metrics", torch.zeros(1000)),
    "no work": lambda reply, state: {name: part for name, part in reply.items() if name != "work"},
    "empty work": says("work", {}),
    "endless work": says("work/real", float("inf")),
    "no notes": lambda reply, state: {name: part for name, part in reply.items() if name != "notes"},
    "a number for notes": says("notes", 3.0),
    "a long reason": says("notes/why", {"h.view(*h.shape[:-1], 4, 8)" * 99: 1.0}),
    "a reason that is none": says("notes/why", 3.0),
    "no metrics at all": lambda reply, state: {name: part for name, part in reply.items() if name != "metrics"},
}
"""What a client may say of its training that is not so: none of it costs its update."""


def flipped(times: float) -> Callable[[Tree, Reply], Reply]:
    """A dense model, its change turned round and multiplied."""

    def lie(sent: Tree, reply: Reply) -> Reply:
        tree, down = reply["tree"], dict[str, Any](sent)
        turned = {n: v if n.endswith("running_var") else down[n] - times * (v - down[n]) for n, v in tree.items()}
        return {**reply, "tree": turned}

    return lie
