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

from fedsieve.engine.engines import Worker, run_client
from fedsieve.flower.engine.client_memory import ClientMemory
from fedsieve.flower.engine.messages import get_bytes, get_config, to_content
from fedsieve.flower.private import ErrorCode, get_flwr_home, restart_dead_actors
from fedsieve.types import InputError


@dataclass(frozen=True)
class NodeContext:
    """Where a client's function runs: the app's settings, the node's, and what the server tells of the run."""

    config: Mapping[str, Any]
    node: Mapping[str, Any]
    about: Mapping[str, Any]
    key: bytes | None
    """A simulation's; None in a deployment, where somebody must set one."""


WorkerFor: TypeAlias = Callable[[NodeContext], Worker]
"""Return the worker for a place: the same one as long as nothing changes."""


def make_client_app(worker_for: WorkerFor) -> ClientApp:
    """Return an app that is a client for a round when it is asked to train, and says who it is when queried."""
    restart_dead_actors()
    app = ClientApp()
    app.train()(partial(_or_error, partial(_train, worker_for)))
    app.query()(partial(_or_error, partial(_identify, worker_for)))
    return app


def simulation_key(run_id: int) -> bytes:
    """Return what a simulation's letters are sealed with: it guards nothing, since all of it is one user's."""
    return hashlib.sha256(f"fedsieve simulation {run_id}".encode()).digest()


def _or_error(do: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
    """Answer a message; what went wrong is told in one line, and printed here in full."""
    try:
        return do(message, context)
    except Exception as error:
        traceback.print_exc()
        what = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        line = f"{what}{' '.join(str(error).split())}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, line), reply_to=message)


def _train(worker_for: WorkerFor, message: Message, context: Context) -> Message:
    """Be a client for one round."""
    content = message.content
    payload, sent_memory = get_bytes(content, "letter"), get_bytes(content, "memory")
    config = get_config(content)
    t, client = int(config.pop("round")), int(config.pop("client"))
    if payload is None:
        raise ValueError("the server's message holds no letter")
    node = _place(context, config)
    if sent_memory is not None:
        reply, memory = run_client(worker_for(node), t, client, payload, sent_memory)
        return Message(to_content({"letter": reply, "memory": memory}), reply_to=message)
    if client != node.node.get("partition-id"):
        raise ValueError(f"asked to be client {client}, which this SuperNode is not")
    memories = ClientMemory(_folder(node), str(node.about.get("run")), client)
    reply, memory = run_client(worker_for(node), t, client, payload, memories.before(t))
    if memory:
        memories.keep(t, memory)
    return Message(to_content({"letter": reply}), reply_to=message)


def _identify(worker_for: WorkerFor, message: Message, context: Context) -> Message:
    """Say which client this SuperNode is and how many examples it has."""
    node = _place(context, get_config(message.content))
    client = node.node.get("partition-id")
    if not isinstance(client, int):
        raise InputError("no partition-id: start the SuperNode with --node-config 'partition-id=0' (or 1, 2, ...)")
    federation = worker_for(node).federation
    if not 0 <= client < federation.run.task.clients:
        raise InputError(f"partition-id {client}, but the run has {federation.run.task.clients} clients")
    return Message(to_content({}, {"client": client, "examples": federation.examples(client)}), reply_to=message)


def _place(context: Context, about: Mapping[str, Any]) -> NodeContext:
    return NodeContext(context.run_config, context.node_config, about, this_simulation_key(context.run_id))


def this_simulation_key(run_id: int) -> bytes | None:
    """Return the simulation's key if this is a Ray worker, else None."""
    ray = sys.modules.get("ray")
    return simulation_key(run_id) if ray is not None and ray.is_initialized() else None


def _folder(node: NodeContext) -> Path:
    """Return where this SuperNode's memories are: its ``memory``, else Flower's own folder."""
    return Path(str(node.node.get("memory") or get_flwr_home() / "fedsieve")).expanduser()
