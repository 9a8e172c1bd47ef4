"""The checkpoints of a run directory: the server's state and the clients' memories after each of the last rounds.

checkpoints/000012.safetensors    state/..., memory/CLIENT, norms, lengths; in its header what it belongs to, how often
                                  the run has gone back and what it leaves out for that, and a sha256
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsieve.data.storage import regular, sync, write
from fedsieve.engine import Round
from fedsieve.engine.rollback import DEPTH, Checkpoint, Exclusion, Rollbacks
from fedsieve.runs.schema import CHECKPOINTS
from fedsieve.types import InputError, clone_shared, flatten

COUNT = DEPTH
"""As many as a run may go back to: one that is finite, but poisoned, is never the only one."""


def save_checkpoint(out: Path, round: Round, about: Mapping[str, str]) -> None:
    """Save what a round left, and ``about`` the run; keep the last ones."""
    tensors = clone_shared({f"state/{name}": v for name, v in flatten(round.state).items()})
    for client, content in round.memory.items():
        tensors[f"memory/{client}"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if round.norms:
        tensors["norms"] = torch.tensor(round.norms, dtype=torch.float64)
    if round.lengths:
        rows = [(float(client), *norms) for client, norms in round.lengths.items()]
        tensors["lengths"] = torch.tensor(rows, dtype=torch.float64)
    header = {**about, "round": str(round.t), "rollbacks": json.dumps(asdict(round.rollbacks))}
    header["sha256"] = _digest(header, tensors)
    write(out / CHECKPOINTS / f"{round.t:06d}.safetensors", save(tensors, header))
    for old in _paths(out)[:-COUNT]:
        old.unlink()


def remove_after(out: Path, after: int) -> None:
    """Remove the checkpoints of rounds that a run has gone back over, the newest first: a crash leaves no gap."""
    for path in reversed(_paths(out)):
        if int(path.stem) > after:
            path.unlink()
            sync(path.parent)


def load_newest(out: Path) -> tuple[Checkpoint, dict[str, str]] | None:
    """Return the newest checkpoint and what it says about its run, None where there is none.

    Raises InputError, naming the file and what to do, if it is damaged; so does what reads the ``earlier`` ones.
    """
    paths = _paths(out)
    if not paths:
        return None
    start, about = _load(paths[-1], paths[-2] if len(paths) > 1 else None)
    return replace(start, earlier=tuple(partial(_start, path) for path in paths[:-1])), about


def _start(path: Path) -> Checkpoint:
    return _load(path, None)[0]


def _load(path: Path, before: Path | None) -> tuple[Checkpoint, dict[str, str]]:
    """Return a checkpoint; ``before`` is the one that a run goes on from without it."""
    try:
        with safe_open(regular(path), "pt") as file:
            about: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        damaged = about.pop("sha256", "") != _digest(about, tensors) or int(about["round"]) != int(path.stem)
        memory = {int(n.removeprefix("memory/")): v for n, v in tensors.items() if n.startswith("memory/")}
        rollbacks = _rollbacks(about.pop("rollbacks"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        damaged = True
    if damaged:
        where = f"round {int(before.stem)}" if before else "the beginning"
        raise InputError(f"the checkpoint {path} is damaged: remove it to go on from {where}")
    state = {name.removeprefix("state/"): v for name, v in tensors.items() if name.startswith("state/")}
    contents = {client: v.numpy().tobytes() for client, v in memory.items()}
    lengths = {int(client): (a, b, c, d) for client, a, b, c, d in _rows(tensors, "lengths")}
    norms = tuple((a, b, c, d) for a, b, c, d in _rows(tensors, "norms"))
    return Checkpoint(int(about["round"]), state, contents, norms, lengths, rollbacks), about


def _rollbacks(text: str) -> Rollbacks:
    values = json.loads(text)
    return Rollbacks(values["count"], tuple(Exclusion(**one) for one in values["left_out"]))


def _rows(tensors: Mapping[str, Tensor], name: str) -> list[list[float]]:
    rows: list[list[float]] = tensors[name].tolist() if name in tensors else []
    return rows


def _paths(out: Path) -> list[Path]:
    """Return the checkpoints in the order of their rounds; other files there are none of ours."""
    named = [p for p in (out / CHECKPOINTS).glob("*.safetensors") if p.stem.isdecimal()]
    return sorted(named, key=lambda p: int(p.stem))


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a header and of tensors, whatever their order."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
