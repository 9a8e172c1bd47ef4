"""The weights that a run starts from: of a file, a folder, a module or a ``state_dict``, as float32 on the CPU.

A folder is a run directory, an export or one of Hugging Face's: its ``model.safetensors``, or the parts that its
``model.safetensors.index.json`` names. Pickles (.pt, .bin) can run code and are never opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsieve.client.lora import A as LORA_A
from fedsieve.client.lora import B as LORA_B
from fedsieve.data.dataset import type_name
from fedsieve.data.storage import read_json, regular
from fedsieve.types import InputError, Params, Sparse
from fedsieve.wire import MAGIC, WireError, decode

DIGEST = 32
"""The bytes of a .fsv file's sha256."""
INDEX = "model.safetensors.index.json"
"""What names the parts of a large model's weights."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
WAYS = "name a .safetensors or .fsv file, or a folder with model.safetensors"


class InitialWeights:
    """Tensors by name, those of floats in float32, with a hash of what they hold."""

    def __init__(self, tensors: Mapping[str, Any], where: str):
        if not tensors:
            raise InputError(f"task.init: {where} holds no weights: {WAYS}")
        self.where = where
        self.tensors: Params = {name: _checked(name, value, where) for name, value in tensors.items()}
        digest = hashlib.sha256()
        hash_tensors(digest, sorted(self.tensors.items()))
        self.digest = digest.hexdigest()

    @classmethod
    def of(cls, source: object) -> InitialWeights:
        """Return the weights of a path, a module or a ``state_dict``. Raises InputError."""
        if isinstance(source, InitialWeights):
            return source
        if isinstance(source, str | Path):
            return cls(read_weights(Path(source)), str(source))
        if isinstance(source, nn.Module):
            return cls(source.state_dict(), f"the {type_name(source)}")
        if isinstance(source, Mapping):
            return cls(source, "the state_dict")
        raise InputError(f"task.init must be a path, a module or a state_dict, got {type_name(source)}: {WAYS}")

    def misfits(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Return the model's tensors that are not given here, by name, and what here does not fit the model, in words.

        One name of several that the model ties together is enough; BatchNorm's counters of batches may be missing.
        """
        state = model.state_dict(keep_vars=True)
        fitting = {id(state[name]) for name in self._fitting(state)}
        missing = [n for n, v in state.items() if id(v) not in fitting and not n.endswith("num_batches_tracked")]
        odd = list[str]()
        for name, value in self.tensors.items():
            ours = state.get(name)
            if ours is None:
                odd.append(f"the model has no {name}")
            elif ours.shape != value.shape:
                odd.append(f"{name} is {list(value.shape)}, the model's {list(ours.shape)}")
            elif ours.dtype != value.dtype:
                odd.append(f"{name} is of {value.dtype}, the model's of {ours.dtype}")
        return missing, odd

    def load_(self, model: nn.Module, partial: bool) -> nn.Module:
        """Give the model these weights, ``partial``: what of them fits. Raises InputError unless they fit."""
        missing, odd = self.misfits(model)
        state = model.state_dict(keep_vars=True)
        fitting = self._fitting(state)
        if (missing or odd) and not partial:
            lines = first_three([*odd, *(f"it has no {name}" for name in missing if name not in self.tensors)])
            raise InputError(
                f"task.init: {self.where} does not fit the model ({lines}): give the weights of this model, or start "
                "from those that fit, -s task.init_partial=true"
            )
        if not any(isinstance(state[name], nn.Parameter) for name in fitting):
            raise InputError(f"task.init: {self.where} has no weight that fits the model ({first_three(odd)})")
        owners = dict[int, str]()
        for name, value in fitting.items():
            other = owners.setdefault(id(state[name]), name)
            if not torch.equal(value, fitting[other]):
                raise InputError(f"task.init: the model ties {other} to {name}, which differ in {self.where}")
        model.load_state_dict(fitting, strict=False)
        return model

    def _fitting(self, state: Mapping[str, Tensor]) -> Params:
        return {
            name: value
            for name, value in self.tensors.items()
            if name in state and (state[name].shape, state[name].dtype) == (value.shape, value.dtype)
        }

    def remark(self, model: nn.Module) -> list[str]:
        """Return in a line what of the model does not start from these weights, and what of them is not used."""
        missing, odd = self.misfits(model)
        left = f"; not used: {first_three(odd)}" if odd else ""
        return [f"task.init leaves as drawn: {first_three(missing) or 'nothing'}{left}"] if missing or odd else []


def initial_weights(init: object, partial: bool, initialisation: str) -> InitialWeights | str:
    """Return what ``Task.init`` names, read; the empty text where it names nothing. Raises InputError."""
    if init == "":
        if partial:
            raise InputError("task.init_partial says how much of task.init is taken: name weights, task.init=...")
        return ""
    if initialisation != "model":
        raise InputError("task.init and task.initialisation are two beginnings: leave one out")
    return InitialWeights.of(init)


def first_three(parts: list[str]) -> str:
    """Return a list in words: its first three, and how many more there are."""
    return ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")


def hash_tensors(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add names, types, shapes and bytes of tensors to a hash."""
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _checked(name: str, value: Any, where: str) -> Tensor:
    """Return a tensor as it is trained. Raises InputError for what is no number, or none that training starts from."""
    if not isinstance(value, Tensor) or value.is_quantized or value.is_meta or value.layout != torch.strided:
        raise InputError(f"task.init: {name} of {where} is no plain tensor (quantised?): save the float weights")
    value = value.detach().cpu()
    if value.dtype in (torch.float16, torch.bfloat16, torch.float64):
        value = value.float()
    if not bool(value.isfinite().all() if value.dtype == torch.float32 else True):
        raise InputError(f"task.init: {name} of {where} holds NaN or infinity: take weights from before they diverged")
    if value.dtype not in (torch.float32, torch.int64, torch.int32, torch.bool):
        kind = str(value.dtype).removeprefix("torch.")
        raise InputError(f"task.init: {name} of {where} is of {kind} (quantised?), save float weights")
    plain: Tensor = value.clone()
    return plain


def read_weights(path: Path) -> Params:
    """Return the tensors of a .safetensors or .fsv file, or of a folder with model.safetensors. Raises InputError."""
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise InputError(f"task.init: there is no {path}: {WAYS}")
    if path.suffix.lower() in PICKLES:
        raise _pickle(path)
    if path.suffix == ".fsv":
        return {n: v.dense() if isinstance(v, Sparse) else v for n, v in read_fsv(path)[1].items()}
    try:
        return load_file(regular(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"task.init: {path} cannot be read as safetensors ({error}): {WAYS}") from None


def _pickle(path: Path) -> InputError:
    how = "load it where you trust it, and save it by safetensors.torch.save_file"
    return InputError(f"task.init: {path} is a pickle, which can run code, and is not opened: {how}")


def _of_folder(folder: Path) -> Params:
    if (whole := folder / "model.safetensors").is_file():
        return _merged(read_weights(whole), folder)
    if (folder / INDEX).is_file():
        index = (read_json(folder / INDEX) or {}).get("weight_map")
        parts = sorted({str(part) for part in index.values()}) if isinstance(index, dict) else []
        if not parts or any(Path(part).name != part or not part.endswith(".safetensors") for part in parts):
            raise InputError(f"task.init: {folder / INDEX} names no parts of the weights: download the folder again")
        return {name: value for part in parts for name, value in read_weights(folder / part).items()}
    if pickles := sorted(p for p in folder.iterdir() if p.suffix.lower() in PICKLES):
        raise _pickle(pickles[0])
    raise InputError(f"task.init: {folder} has no model.safetensors: finish the run there, or name another folder")


def _merged(weights: Params, run: Path) -> Params:
    """Return the weights of a run that trained adapters with these merged, as its export has them; others as they are.

    Adapters that a run of a user's model had, such as peft's, are that model's own.
    """
    manifest: Any = read_json(run / "run.json") or {}
    fields = manifest.get("run", {}).get("task", {}).get("adapters")
    if not fields:
        return weights
    scale = fields["alpha"] / fields["rank"]
    plain = {name: value for name, value in weights.items() if not name.endswith((LORA_A, LORA_B))}
    for name, a in weights.items():
        if name.endswith(LORA_A):
            layer = name.removesuffix(LORA_A)
            plain[f"{layer}weight"] = weights[f"{layer}weight"] + scale * (weights[f"{layer}{LORA_B}"] @ a)
    return plain


def read_fsv(path: Path) -> tuple[bytes, dict[str, Tensor | Sparse]]:
    """Return the metadata, JSON, and the weights of a .fsv file, sparse ones as they are stored. Raises InputError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a run directory or a .fsv file") from None
    message = content[:-DIGEST]
    if content.startswith(b"FSV1"):
        raise InputError(f"{path} was written by an earlier FedSieve: export the model anew")
    if not content.startswith(MAGIC):
        raise InputError(f"{path} is no .fsv file: name a run directory, or what `fedsieve export -o model.fsv` wrote")
    if hashlib.sha256(message).digest() != content[-DIGEST:]:
        raise InputError(f"{path} is damaged or cut short (its checksum is wrong): copy it again, or export it anew")
    try:
        tree = decode(message)
        text, weights = tree["metadata"], tree["weights"]
        if not isinstance(text, Tensor) or not isinstance(weights, dict):
            raise TypeError
        return text.numpy().tobytes(), {n: v for n, v in weights.items() if isinstance(v, Tensor | Sparse)}
    except (WireError, KeyError, TypeError, ValueError, RecursionError):
        raise no_model(path) from None


def no_model(path: Path) -> InputError:
    """Return what is said of a .fsv file that holds something else."""
    return InputError(f"{path} holds no model: name what `fedsieve export -o model.fsv` wrote")
