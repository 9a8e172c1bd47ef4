"""Where a page or a picture goes: a place that can take it, and a file that is whole or not there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fedsieve.types import InputError


def check_place(out: Path, example: str) -> None:
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


def save(out: Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that a failure leaves the old one."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        partial.replace(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): choose another place") from error
    finally:
        with suppress(OSError):
            partial.unlink()
