"""The client's function inside a ClientApp."""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.utils import get_flwr_home

from fedsieve.engine.loop import Worker, answer
from fedsieve.flower.engine.client_memory import Shelf
from fedsieve.flower.engine.messages import order_of, packed, part_of
from fedsieve.types import InputError


@dataclass(frozen=True)
class Place:
    """Where a client's function runs: the app's settings, the node's, and what the server tells of the run."""

    config: Mapping[str, Any]
    node: Mapping[str, Any]
    about: Mapping[str, Any]
    key: bytes | None
    """A simulation's; None in a deployment, where somebody must set one."""


Opened: TypeAlias = Callable[[Place], Worker]
"""Return the worker for a place: the same one as long as nothing changes."""


def client_app(opened: Opened) -> ClientApp:
    """Return an app that is a client for a round when it is asked to train, and says who it is when queried."""
    _revive_workers()
    app = ClientApp()
    app.train()(partial(_told, partial(_train, opened)))
    app.query()(partial(_told, partial(_introduce, opened)))
    return app


def _revive_workers() -> None:
    """Let Ray start a worker anew that has died, and give it its client once more.

    Flower (1.42) hands work to the dead one again and again: the same few clients would be lost to every round. This is
    called in the simulation's process when it loads the app, before it makes its actors.
    """
    if "flwr.simulation.app" in sys.modules:
        from flwr.simulation.ray_transport.ray_actor import ClientAppActor

        options: dict[str, int] = getattr(ClientAppActor, "_default_options")  # noqa: B009 (Ray's, which mypy does not see)
        options |= {"max_restarts": -1, "max_task_retries": 1}


def simulation_key(run_id: int) -> bytes:
    """Return what a simulation's letters are sealed with: it guards nothing, since all of it is one user's."""
    return hashlib.sha256(f"fedsieve simulation {run_id}".encode()).digest()


def _told(do: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
    """Answer a message; what went wrong is told in one line, and printed here in full."""
    try:
        return do(message, context)
    except Exception as error:
        traceback.print_exc()
        what = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        line = f"{what}{' '.join(str(error).split())}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, line), reply_to=message)


def _train(opened: Opened, message: Message, context: Context) -> Message:
    """Be a client for one round."""
    content = message.content
    letter, carried = part_of(content, "letter"), part_of(content, "memory")
    order = order_of(content)
    t, client = int(order.pop("round")), int(order.pop("client"))
    if letter is None:
        raise ValueError("the server's message holds no letter")
    place = _place(context, order)
    if carried is not None:
        reply, kept = answer(opened(place), t, client, letter, carried)
        return Message(packed({"letter": reply, "memory": kept}), reply_to=message)
    if client != place.node.get("partition-id"):
        raise ValueError(f"asked to be client {client}, which this SuperNode is not")
    shelf = Shelf(_folder(place), str(place.about.get("run")), client)
    reply, kept = answer(opened(place), t, client, letter, shelf.before(t))
    if kept:
        shelf.keep(t, kept)
    return Message(packed({"letter": reply}), reply_to=message)


def _introduce(opened: Opened, message: Message, context: Context) -> Message:
    """Say which client this SuperNode is and how many examples it has."""
    place = _place(context, order_of(message.content))
    client = place.node.get("partition-id")
    if not isinstance(client, int):
        raise InputError("no partition-id: start the SuperNode with --node-config 'partition-id=0' (or 1, 2, ...)")
    federation = opened(place).federation
    if not 0 <= client < federation.run.task.clients:
        raise InputError(f"partition-id {client}, but the run has {federation.run.task.clients} clients")
    return Message(packed({}, {"client": client, "examples": federation.examples(client)}), reply_to=message)


def _place(context: Context, about: Mapping[str, Any]) -> Place:
    return Place(context.run_config, context.node_config, about, simulated(context.run_id))


def simulated(run_id: int) -> bytes | None:
    """Return the simulation's key if this is a Ray worker, else None."""
    ray = sys.modules.get("ray")
    return simulation_key(run_id) if ray is not None and ray.is_initialized() else None


def _folder(place: Place) -> Path:
    """Return where this SuperNode's memories are: its ``memory``, else Flower's own folder."""
    return Path(str(place.node.get("memory") or get_flwr_home() / "fedsieve")).expanduser()
