"""The checkpoints of a run directory: the server's state and the clients' memories after each of the last rounds.

checkpoints/000012.safetensors    state/..., memory/CLIENT, norms; in its header what it belongs to, and a sha256
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as packed
from torch import Tensor

from fedsieve.engine import Round
from fedsieve.engine.loop import Start
from fedsieve.expected import Norms
from fedsieve.files import write
from fedsieve.types import InputError, flatten

KEPT = 2


def save(out: Path, round: Round, about: Mapping[str, str]) -> None:
    """Save what a round left, and ``about`` the run; keep the last two."""
    tensors = {f"state/{name}": v.contiguous() for name, v in flatten(round.state).items()}
    for client, kept in round.memory.items():
        tensors[f"memory/{client}"] = torch.frombuffer(bytearray(kept), dtype=torch.uint8)
    if round.norms:
        tensors["norms"] = torch.tensor(round.norms, dtype=torch.float64)
    header = {**about, "round": str(round.t)}
    header["sha256"] = _digest(header, tensors)
    write(out / "checkpoints" / f"{round.t:06d}.safetensors", packed(tensors, header))
    for old in _paths(out)[:-KEPT]:
        old.unlink()


def newest(out: Path) -> tuple[Start, dict[str, str]] | None:
    """Return the newest checkpoint and what it says about its run, None where there is none.

    Raises InputError, naming the file and what to do, if it is damaged.
    """
    paths = _paths(out)
    if not paths:
        return None
    path, before = paths[-1], f"round {int(paths[-2].stem)}" if len(paths) > 1 else "the beginning"
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        damaged = about.pop("sha256", "") != _digest(about, tensors) or int(about["round"]) != int(path.stem)
        memory = {int(n.removeprefix("memory/")): v for n, v in tensors.items() if n.startswith("memory/")}
    except (SafetensorError, OSError, ValueError, KeyError):
        damaged = True
    if damaged:
        raise InputError(f"the checkpoint {path} is damaged: remove it to go on from {before}")
    state = {name.removeprefix("state/"): v for name, v in tensors.items() if name.startswith("state/")}
    kept = {client: v.numpy().tobytes() for client, v in memory.items()}
    return Start(int(about["round"]), state, kept, _norms(tensors)), about


def _paths(out: Path) -> list[Path]:
    """Return the checkpoints in the order of their rounds; other files there are none of ours."""
    named = [p for p in (out / "checkpoints").glob("*.safetensors") if p.stem.isdecimal()]
    return sorted(named, key=lambda p: int(p.stem))


def _norms(tensors: Mapping[str, Tensor]) -> tuple[Norms, ...]:
    return tuple((a, b, c, d) for a, b, c, d in tensors["norms"].tolist()) if "norms" in tensors else ()


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a header and of tensors, whatever their order."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
