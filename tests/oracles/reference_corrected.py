"""FedProx and SCAFFOLD in NumPy float64, on the network of ``reference.py``; nothing here knows the package.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2; Karimireddy et al. 2020, "SCAFFOLD:
Stochastic Controlled Averaging for Federated Learning", Algorithm 1 with option II.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from oracles import reference as ref
from oracles.reference import State


def zeros(state: State) -> State:
    """Return a control variate of 0: running statistics, which are not learned, have none."""
    return {name: np.zeros_like(v) for name, v in state.items() if name not in ref.RUNNING}


def descend(start: State, a: ref.Answer, extra: State, mu: float = 0.0, momentum: float = 0.0) -> State:
    """Return a client's state after all its steps, along ``g + extra + mu (w - start)``, g with weight decay."""
    state, velocity = start, zeros(start)
    for index in a.batches:
        step = ref.Pass(state)
        grads = step.backward(ref.cross_entropy(step.forward(a.x[index]), a.y[index])[1])
        for name in velocity:
            full = grads[name] + a.weight_decay * state[name] + extra[name] + mu * (state[name] - start[name])
            velocity[name] = momentum * velocity[name] + full
        moved = {name: state[name] - a.lr * v for name, v in velocity.items()}
        state = {name: (moved | step.running)[name] for name in start}
    return state


def prox_round(state: State, answers: Sequence[ref.Answer], mu: float) -> State:
    """Return the mean, by n_k, of what clients reach that are drawn to ``state``."""
    return ref.mean([descend(state, a, zeros(state), mu) for a in answers], [len(a.y) for a in answers])


def counted(steps: int, momentum: float) -> float:
    """Return how often steps of a gradient of 1 add it up: each lives on in all the velocities after it."""
    return sum(momentum**age for j in range(steps) for age in range(steps - j))


@dataclass
class Scaffold:
    """A server's x and c, and the clients' c_i."""

    state: State
    clients: int
    momentum: float = 0.0
    by_samples: bool = False
    from_model: bool = False
    """Whether c starts at x, and c_i at the x that the client is first sent (Flower's public code)."""
    own: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.control = {name: v + self.state[name] * self.from_model for name, v in zeros(self.state).items()}

    def round(self, answers: Mapping[int, ref.Answer]) -> None:
        """Run one round over some clients."""
        x, c, models, changes = self.state, self.control, [], []
        for client, a in answers.items():
            first = {name: x[name] * self.from_model for name in c}
            own = self.own.get(client, first)
            y = descend(x, a, {name: c[name] - own[name] for name in c}, momentum=self.momentum)
            k_lr = counted(len(a.batches), self.momentum) * a.lr
            new = {name: own[name] - c[name] + (x[name] - y[name]) / k_lr for name in c}
            models.append(y)
            changes.append({name: new[name] - own[name] for name in c})
            self.own[client] = new
        counts = [len(a.y) if self.by_samples else 1 for a in answers.values()]
        self.state, change = ref.mean(models, counts), ref.mean(changes, counts)
        self.control = {name: c[name] + len(answers) / self.clients * change[name] for name in c}
