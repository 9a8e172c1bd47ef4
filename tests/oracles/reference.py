"""A second, independent derivation of METHODS.md sections 1 to 4, in NumPy float64, on one tiny network.

FedAvg, FedAdam (Reddi et al. 2021), SWAT (Raihan & Aamodt 2020), ZeroFL (Qiu et al. 2022, Algorithm 1) and
Top-k after local training. Nothing here knows the package; the forward and backward passes are written by hand.

The network: conv1 (3x3, padding 1, bias) - ReLU - conv2 (3x3, stride 2, padding 1) - BatchNorm - ReLU - flatten
- fc1 - ReLU - fc2 - softmax cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Support: TypeAlias = NDArray[np.bool_]
State: TypeAlias = dict[str, Array]

LAYERS = ("conv1", "conv2", "fc1", "fc2")
"""Every convolution and linear layer, in the order of the network."""
RUNNING = ("bn.running_mean", "bn.running_var")
"""The part of the floating state that is not trained."""
STRIDE = {"conv1": 1, "conv2": 2}
EPS, BN_MOMENTUM = 1e-5, 0.1


# ---------------------------------------------------------------- top-k (METHODS, "Notation")


def density(sparsity: float, r_mask: float = 0.0) -> Fraction:
    """Return ``q = min(1, 1 - sp + r_mask)`` of the decimal numbers that were written, without binary rounding."""
    return min(Fraction(1), 1 - Fraction(str(sparsity)) + Fraction(str(r_mask)))


def top(x: Array, q: Fraction) -> Support:
    """Return ``top(x, q)``: the support of exactly the ``ceil(q * numel)`` largest ``|x|``, the earlier of equals."""
    support = np.zeros(x.size, dtype=bool)
    support[np.argsort(-np.abs(x).ravel(), kind="stable")[: math.ceil(q * x.size)]] = True
    return support.reshape(x.shape)


def gap(x: Array, support: Support) -> float:
    """Return how little rounding could turn the decision ``support = top(x, q)``; infinite if none could.

    The smallest ``|x|`` kept against the largest one cut. Equals across the cut (pixels that see a filter's bias
    alone) are so in every precision and fall by position: then it is the way to the next different value. Zeros kept
    are harmless, since they multiply to nothing wherever they are.
    """
    magnitude = np.abs(x)
    if support.all() or not support.any() or magnitude[support].min() == 0:
        return math.inf
    last = magnitude[support].min()
    return float(last - magnitude[~support].max()) or nearest(magnitude, last)


def nearest(magnitude: Array, threshold: float) -> float:
    """Return the distance of a threshold to the nearest magnitude that differs from it."""
    distance = np.abs(magnitude - threshold)
    return float(distance[distance > 0].min(initial=math.inf))


@dataclass
class Selector:
    """``top(., q)`` refreshed every ``period`` steps; between, what reaches the last threshold (METHODS sec. 2)."""

    q: Fraction
    period: int
    step: int = 0
    threshold: float = math.nan
    margin: float = math.inf
    """The narrowest decision so far: how little rounding could have turned it."""

    def __call__(self, x: Array) -> Support:
        """Return the support of one step."""
        if self.step % self.period == 0:
            support = top(x, self.q)
            self.threshold = float(np.abs(x)[support].min())
            self.margin = min(self.margin, gap(x, support))
        else:
            support = np.abs(x) >= self.threshold
            if self.threshold > 0:
                self.margin = min(self.margin, nearest(np.abs(x), self.threshold))
        self.step += 1
        return support


@dataclass
class Swat:
    """The selectors of one client's local training: weights and activations of each policy layer, counted afresh."""

    q: Fraction
    layers: Sequence[str]
    period: int = 1
    weights: dict[str, Selector] = field(init=False)
    inputs: dict[str, Selector] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = {name: Selector(self.q, self.period) for name in self.layers}
        self.inputs = {name: Selector(self.q, self.period) for name in self.layers}

    @property
    def margin(self) -> float:
        """The narrowest decision of all selectors."""
        return min(s.margin for s in (*self.weights.values(), *self.inputs.values()))


# ---------------------------------------------------------------- the layers, forward and backward


def shifted(x: Array, i: int, j: int, out: tuple[int, int], stride: int) -> Array:
    """Return what tap (i, j) of a kernel sees of the padded ``x``: a view [n, c, *out]."""
    return x[:, :, i : i + stride * out[0] : stride, j : j + stride * out[1] : stride]


def pad(x: Array) -> Array:
    """Return ``x`` [n, c, h, w] with one zero all round."""
    return np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))


def conv(x: Array, w: Array, stride: int) -> Array:
    """Return the 3x3 cross-correlation, padding 1 (ZeroFL's forward pass)."""
    out = ((x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    padded, y = pad(x), np.zeros((len(x), len(w), *out))
    for i, j in np.ndindex(3, 3):
        y += np.einsum("ncyx,oc->noyx", shifted(padded, i, j, out, stride), w[:, :, i, j])
    return y


def conv_grad_in(g: Array, w: Array, shape: tuple[int, ...], stride: int) -> Array:
    """Return the gradient of the input, of ``shape``, from that of the output (ZeroFL eq. 1)."""
    padded = pad(np.zeros(shape))
    for i, j in np.ndindex(3, 3):
        shifted(padded, i, j, g.shape[2:], stride)[...] += np.einsum("noyx,oc->ncyx", g, w[:, :, i, j])
    return padded[:, :, 1:-1, 1:-1]


def conv_grad_w(g: Array, x: Array, stride: int) -> Array:
    """Return the gradient of the weight from that of the output and the layer input (ZeroFL eq. 2)."""
    padded, grad = pad(x), np.zeros((g.shape[1], x.shape[1], 3, 3))
    for i, j in np.ndindex(3, 3):
        grad[:, :, i, j] = np.einsum("noyx,ncyx->oc", g, shifted(padded, i, j, g.shape[2:], stride))
    return grad


def apply(name: str, x: Array, w: Array) -> Array:
    """Return the layer's output without its bias."""
    return conv(x, w, STRIDE[name]) if name in STRIDE else x @ w.T


def over_channels(v: Array) -> Array:
    """Return a per-channel vector in a shape that broadcasts against [n, c, h, w]."""
    return v[None, :, None, None]


@dataclass
class Pass:
    """One batch's way through the network, with what its backward pass needs."""

    state: State
    swat: Swat | None = None
    used: State = field(default_factory=dict)
    """The weights that the forward pass used, by layer."""
    kept: State = field(default_factory=dict)
    """The input saved for grad_w, by layer."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    positive: dict[str, Support] = field(default_factory=dict)
    running: State = field(default_factory=dict)
    """The running statistics after this batch."""
    probe: Mapping[str, Array] = field(default_factory=dict)
    """For checking: a weight change by layer that sees only the kept input, which is what SWAT's grad_w is about."""

    def layer(self, name: str, x: Array) -> Array:
        """Run a conv or linear layer: ``w * top(w, d)`` on the dense input; keep ``top(a, d)`` (METHODS sec. 2)."""
        w, kept = self.state[f"{name}.weight"], x
        if self.swat is not None and name in self.swat.layers:
            w = w * self.swat.weights[name](w)
            kept = x * self.swat.inputs[name](x)
        self.used[name], self.kept[name], self.shapes[name] = w, kept, x.shape
        y = apply(name, x, w)
        return y + apply(name, kept, self.probe[name]) if name in self.probe else y

    def layer_back(self, name: str, g: Array, grads: State) -> Array:
        """Return grad_in from the sparse weights; add grad_w, dense, from the sparse input (ZeroFL eq. 1, 2)."""
        if name in STRIDE:
            grads[f"{name}.weight"] = conv_grad_w(g, self.kept[name], STRIDE[name])
            return conv_grad_in(g, self.used[name], self.shapes[name], STRIDE[name])
        grads[f"{name}.weight"] = g.T @ self.kept[name]
        return g @ self.used[name]

    def relu(self, name: str, x: Array) -> Array:
        """Clip below at zero."""
        self.positive[name] = x > 0
        return x * self.positive[name]

    def norm(self, x: Array) -> Array:
        """Normalise with the batch's own mean and (biased) variance; move the running ones, variance unbiased."""
        s, n = self.state, x.size // x.shape[1]
        mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
        for name, value in zip(RUNNING, (mean, var * n / (n - 1)), strict=True):
            self.running[name] = (1 - BN_MOMENTUM) * s[name] + BN_MOMENTUM * value
        self.scale = 1 / np.sqrt(var + EPS)
        self.normed = (x - over_channels(mean)) * over_channels(self.scale)
        return self.normed * over_channels(s["bn.weight"]) + over_channels(s["bn.bias"])

    def norm_back(self, g: Array, grads: State) -> Array:
        """Go back through ``norm``: the gradient loses its mean and its component along the normalised input."""
        axes = (0, 2, 3)
        grads["bn.weight"], grads["bn.bias"] = (g * self.normed).sum(axes), g.sum(axes)
        g = g * over_channels(self.state["bn.weight"])
        along = over_channels((g * self.normed).mean(axes))
        return over_channels(self.scale) * (g - over_channels(g.mean(axes)) - self.normed * along)

    def forward(self, x: Array) -> Array:
        """Return the logits [n, classes] of a batch [n, 1, h, w]."""
        s = self.state
        h = self.relu("conv1", self.layer("conv1", x) + over_channels(s["conv1.bias"]))
        h = self.relu("conv2", self.norm(self.layer("conv2", h)))
        self.maps = h.shape
        h = self.relu("fc1", self.layer("fc1", h.reshape(len(h), -1)) + s["fc1.bias"])
        return self.layer("fc2", h) + s["fc2.bias"]

    def backward(self, g: Array) -> State:
        """Return the gradient of every trained tensor from that of the logits."""
        grads: State = {"fc2.bias": g.sum(axis=0)}
        g = self.layer_back("fc2", g, grads) * self.positive["fc1"]
        grads["fc1.bias"] = g.sum(axis=0)
        g = self.layer_back("fc1", g, grads).reshape(self.maps) * self.positive["conv2"]
        g = self.layer_back("conv2", self.norm_back(g, grads), grads) * self.positive["conv1"]
        grads["conv1.bias"] = g.sum(axis=(0, 2, 3))
        self.layer_back("conv1", g, grads)
        return grads


def cross_entropy(logits: Array, y: NDArray[np.int64]) -> tuple[float, Array]:
    """Return softmax cross-entropy, the mean over the batch, and its gradient by the logits."""
    shifted_logits = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted_logits - np.log(np.exp(shifted_logits).sum(axis=1, keepdims=True))
    hot = np.eye(logits.shape[1])[y]
    return float(-(log_p * hot).sum() / len(y)), (np.exp(log_p) - hot) / len(y)


# ---------------------------------------------------------------- a client


def learning_rate(t: int, rounds: int, first: float, last: float) -> float:
    """Return ``lr0 * exp(t/T * log(lrT/lr0))`` (METHODS sec. 1): t = 0 .. T-1 in ZeroFL, 1 .. T in the others."""
    return first * math.exp(t / rounds * math.log(last / first))


def descend(step: Pass, x: Array, y: NDArray[np.int64], lr: float, weight_decay: float = 0.0) -> State:
    """Return what one step of plain SGD on one batch makes of the state of ``step``."""
    _, g = cross_entropy(step.forward(x), y)
    grads, state = step.backward(g), step.state
    trained = {name: state[name] - lr * (grads[name] + weight_decay * state[name]) for name in grads}
    return {name: (trained | step.running)[name] for name in state}


def train(
    state: State,
    x: Array,
    y: NDArray[np.int64],
    batches: Sequence[NDArray[np.int64]],
    lr: float,
    weight_decay: float = 0.0,
    swat: Swat | None = None,
) -> State:
    """Return what plain SGD over ``batches`` (index arrays, all epochs) makes of ``state``; master weights dense."""
    for index in batches:
        state = descend(Pass(state, swat), x[index], y[index], lr, weight_decay)
    return state


# ---------------------------------------------------------------- uploads (METHODS sec. 3 and 4)


DIFFERENCES = ("diff_of_top", "top_diff")
"""The uploads that send ``d_k = w_k - w_t``."""


def upload(kind: str, after: State, before: State, q: Fraction, layers: Sequence[str]) -> tuple[State, float]:
    """Return what a client sends (ZeroFL Algorithm 1) and the narrowest decision taken; other layers go dense."""
    difference = {name: after[name] - before[name] for name in after}
    sent = dict(difference if kind in DIFFERENCES else after)
    margin = math.inf
    for name in [] if kind == "full" else [f"{layer}.weight" for layer in layers]:
        judged = difference[name] if kind == "top_diff" else after[name]
        support = top(judged, q)
        sent[name] = sent[name] * support
        margin = min(margin, gap(judged, support))
    return sent, margin


def global_top(state: State, q: Fraction, layers: Sequence[str]) -> tuple[State, float]:
    """Return the state cut by one magnitude top-k over the layers' weights together (METHODS sec. 4), and the gap."""
    names = [f"{layer}.weight" for layer in layers]
    flat = np.concatenate([state[name].ravel() for name in names])
    support = top(flat, q)
    parts = np.split(flat * support, np.cumsum([state[name].size for name in names])[:-1])
    cut = {name: part.reshape(state[name].shape) for name, part in zip(names, parts, strict=True)}
    return state | cut, gap(flat, support)


def deploy(state: State, q: Fraction, layers: Sequence[str]) -> State:
    """Return the model that SWAT and ZeroFL evaluate: per-layer ``top(w, d)``."""
    return state | {f"{layer}.weight": (w := state[f"{layer}.weight"]) * top(w, q) for layer in layers}


# ---------------------------------------------------------------- the server


def mean(states: Sequence[State], counts: Sequence[int]) -> State:
    """Return the mean of every tensor, weighted by ``n_k / sum(n_k)`` of the sampled clients (METHODS sec. 1)."""
    total = sum(counts)
    parts = [{name: (n / total) * v for name, v in s.items()} for n, s in zip(counts, states, strict=True)]
    return {name: np.sum([part[name] for part in parts], axis=0) for name in states[0]}


@dataclass
class Adam:
    """FedAdam: ``m = b1 m + (1-b1) D``, ``v = b2 v + (1-b2) D^2``, ``w += eta m / (sqrt(v) + tau)``, no correction."""

    eta: float = 0.01
    b1: float = 0.9
    b2: float = 0.99
    tau: float = 1e-3
    m: State = field(default_factory=dict)
    v: State = field(default_factory=dict)

    def step(self, name: str, change: Array) -> Array:
        """Return the step for one tensor's pseudo-gradient."""
        self.m[name] = self.b1 * self.m.get(name, np.zeros_like(change)) + (1 - self.b1) * change
        self.v[name] = self.b2 * self.v.get(name, np.zeros_like(change)) + (1 - self.b2) * change**2
        return self.eta * self.m[name] / (np.sqrt(self.v[name]) + self.tau)


def aggregate(state: State, sent: State, differences: bool, adam: Adam | None) -> State:
    """Return the server's next state from the mean of what was sent; running statistics take the plain mean."""
    change = sent if differences else {name: sent[name] - state[name] for name in state}
    if adam is None:
        return {name: state[name] + change[name] for name in state}
    return {name: state[name] + (d if name in RUNNING else adam.step(name, d)) for name, d in change.items()}


# ---------------------------------------------------------------- a federation


@dataclass
class Answer:
    """What one client of a round works on: its data, its batches in order, and the round's orders."""

    x: Array
    y: NDArray[np.int64]
    batches: Sequence[NDArray[np.int64]]
    lr: float
    weight_decay: float = 0.0


@dataclass
class Federation:
    """A server and the rule its clients follow. ``upload``: "full", one of ZeroFL's three, or "global" (Top-k)."""

    state: State
    upload: str = "full"
    sparsity: float = 0.0
    r_mask: float = 0.0
    layers: Sequence[str] = ()
    """The layers of the policy."""
    swat: bool = False
    period: int = 1
    adam: Adam | None = None
    margin: float = math.inf
    """The narrowest top-k decision so far, to tell rounding from disagreement."""

    def client(self, a: Answer) -> State:
        """Return what a client sends after its local training."""
        swat = Swat(density(self.sparsity), self.layers, self.period) if self.swat else None
        after = train(self.state, a.x, a.y, a.batches, a.lr, a.weight_decay, swat)
        if self.upload == "global":
            sent, margin = global_top(after, density(self.sparsity), self.layers)
        else:
            sent, margin = upload(self.upload, after, self.state, density(self.sparsity, self.r_mask), self.layers)
        self.margin = min(self.margin, margin, swat.margin if swat else math.inf)
        return sent

    def round(self, answers: Sequence[Answer]) -> None:
        """Run one round over the sampled clients."""
        sent = mean([self.client(a) for a in answers], [len(a.y) for a in answers])
        self.state = aggregate(self.state, sent, self.upload in DIFFERENCES, self.adam)

    def deployed(self) -> State:
        """Return the model that is evaluated: SWAT and ZeroFL cut each layer, the others ship the aggregate."""
        return deploy(self.state, density(self.sparsity), self.layers) if self.swat else self.state
