"""Where a page or a picture goes: a place that can take it, and a file that is whole or not there."""

from __future__ import annotations

from pathlib import Path

from fedsieve.data.storage import write
from fedsieve.types import InputError


def check_output(out: Path, example: str) -> None:
    """Raise InputError unless a file can be written at ``out``; ``example`` is a name that would do."""
    try:
        if out.is_dir():
            raise InputError(f"{out} is a directory: name a file, such as {out / example}")
        if out.exists() and not out.is_file():
            raise InputError(f"{out} is not a regular file: name one, or a new one, such as {example}")
        if not out.parent.is_dir():
            raise InputError(f"{out.parent} is not a folder: create it, or write {example} somewhere else")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): choose another place") from error


def write_output(out: Path, content: bytes) -> None:
    """Write a file so that a failure leaves the old one. Raises InputError."""
    try:
        write(out, content)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): choose another place") from error
