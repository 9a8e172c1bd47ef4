"""The client's function inside a ClientApp, and what a SuperNode's client remembers between rounds."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedsieve.data.storage import write
from fedsieve.engine.cache import LACKS, LOST, Cache, CacheEntry
from fedsieve.engine.messages import Messages
from fedsieve.engine.rollback import DEPTH
from fedsieve.engine.worker import Worker, run_client
from fedsieve.flower.engine.exchange import get_bytes, get_config, to_content
from fedsieve.flower.private import ErrorCode, get_flwr_home, in_simulation, restart_dead_actors
from fedsieve.types import InputError
from fedsieve.wire import WireError

VERSIONS = DEPTH + 2
"""Versions kept: of the rounds that a server may go back, the one before, and one to spare."""


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
    """Return what a simulation's messages are sealed with: it guards nothing, since all of it is one user's."""
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
    payload, memory = get_bytes(content, "message"), get_bytes(content, "memory")
    config = get_config(content)
    t, client = int(config.pop("round")), int(config.pop("client"))
    if payload is None:
        raise ValueError("the server's message has no payload")
    node = _place(context, config)
    if memory is not None:
        reply, memory = run_client(worker_for(node), t, client, payload, memory)
        return Message(to_content({"message": reply, "memory": memory}), reply_to=message)
    if client != node.node.get("partition-id"):
        raise ValueError(f"asked to be client {client}, which this SuperNode is not")
    folder = Path(str(node.node.get("memory") or get_flwr_home() / "fedsieve")).expanduser()
    memories, worker = ClientMemory(folder, str(node.about.get("run")), client), worker_for(node)
    memories.load_cache(worker.messages)
    reply, memory = run_client(worker, t, client, payload, memories.before(t))
    if reply == LACKS:
        return Message(to_content({"message": LOST}), reply_to=message)
    memories.keep_cache(worker.messages.cache)
    if memory:
        memories.keep(t, memory)
    return Message(to_content({"message": reply}), reply_to=message)


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
    """Return where a message is answered; the key is a simulation's in a worker of Ray's."""
    key = simulation_key(context.run_id) if in_simulation() else None
    return NodeContext(context.run_config, context.node_config, about, key)


class ClientMemory:
    """The memories of one client in one run, each after a round."""

    def __init__(self, folder: Path, run: str, client: int):
        if not re.fullmatch(r"[0-9a-f]{8,64}", run):
            raise ValueError("the server names no run: it is not FedSieve's, or of another version")
        self.folder = folder / run / str(client)

    def before(self, t: int) -> bytes:
        """Return what was kept before round ``t``, nothing at the beginning."""
        known = [r for r in self._rounds() if r < t]
        return self._path(known[-1]).read_bytes() if known else b""

    def keep(self, t: int, memory: bytes) -> None:
        """Keep a round's memory, forgetting what came after it in a run that was taken up again."""
        self._make_folder()
        write(self._path(t), memory, 0o600)
        rounds = self._rounds()
        for old in [r for r in rounds if r > t] + [r for r in rounds if r <= t][:-VERSIONS]:
            self._path(old).unlink(missing_ok=True)

    def load_cache(self, messages: Messages) -> None:
        """Read what was kept of earlier broadcasts, where this process has nothing; what is damaged is not there."""
        if messages.cache.newest is None and (paths := sorted(self.folder.glob("*.cache"))):
            with suppress(OSError, WireError, KeyError):
                messages.cache.put(CacheEntry.from_bytes(paths[-1].read_bytes(), messages.plain))

    def keep_cache(self, cache: Cache) -> None:
        """Write what is kept of the last broadcast, in place of what was there, if it has changed."""
        if (entry := cache.newest) is None:
            return
        path = self.folder / f"{b''.join(entry.digests).hex()}.cache"
        if path.exists():
            return
        self._make_folder()
        write(path, entry.to_bytes(), 0o600)
        for other in self.folder.glob("*.cache"):
            if other != path:
                other.unlink(missing_ok=True)

    def _make_folder(self) -> None:
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)

    def _path(self, t: int) -> Path:
        return self.folder / f"{t:06d}.bin"

    def _rounds(self) -> list[int]:
        return sorted(int(p.stem) for p in self.folder.glob("*.bin") if p.stem.removeprefix("-").isdecimal())
