"""The names of Flower's that its documentation does not promise: all that FedSieve uses, tried with 1.41 and 1.42.

The range in ``pyproject.toml`` says the same. Whoever widens it runs ``pytest tests/flower`` and looks here first.
"""

from __future__ import annotations

import sys

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import get_flwr_home

__all__ = [
    "ErrorCode",
    "FlowerRun",
    "get_flwr_home",
    "give_identity",
    "in_simulation",
    "is_simulated",
    "restart_dead_actors",
    "set_reply_to",
]


def restart_dead_actors() -> None:
    """Let Ray restart an actor of Flower's simulation that has died, and give it the client that it had once more.

    Flower hands work to the dead one again and again: the same few clients would be lost to every round. To be called
    in the simulation's process before it makes its actors, as it is when it loads the app; elsewhere it does nothing.
    """
    if "flwr.simulation.app" in sys.modules:
        from flwr.simulation.ray_transport.ray_actor import ClientAppActor

        options: dict[str, int] = getattr(ClientAppActor, "_default_options")  # noqa: B009 (Ray's, which mypy does not see)
        options |= {"max_restarts": -1, "max_task_retries": 1}


def give_identity() -> None:
    """Let messages be made in a process that Flower has not started: they ask it for a run and a node."""
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def in_simulation() -> bool:
    """Return whether this process is a worker of Ray's, in which Flower simulates clients."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def is_simulated(grid: object) -> bool:
    """Return whether a ServerApp's grid is that of a simulation on this machine."""
    from flwr.superlink.grid import InMemoryGrid

    return isinstance(grid, InMemoryGrid)


def set_reply_to(answer: Message, message_id: str) -> None:
    """Let an answer be to another message than the one that brought it."""
    answer.metadata.__dict__["_reply_to_message_id"] = message_id
