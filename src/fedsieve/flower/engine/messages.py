"""What a Flower message holds: FedSieve's, in a simulation the client's memory, and an order of plain numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict

STYPE = "fedsieve.bytes"
"""Our own serialization type: whatever of Flower's would open an Array refuses this one."""


def to_content(parts: Mapping[str, bytes], config: Mapping[str, int | str] | None = None) -> RecordDict:
    """Return the content of a message: bytes by name, and numbers or text beside them."""
    arrays = ArrayRecord({name: Array("uint8", (len(part),), STYPE, part) for name, part in parts.items()})
    return RecordDict({"bytes": arrays, "order": ConfigRecord({**(config or {})})})


def get_bytes(content: RecordDict, name: str) -> bytes | None:
    """Return the bytes of a name; None if there are none."""
    record = content.get("bytes")
    array = record.get(name) if isinstance(record, ArrayRecord) else None
    return array.data if array is not None and array.stype == STYPE and isinstance(array.data, bytes) else None


def get_config(content: RecordDict) -> dict[str, int | str]:
    """Return the numbers and texts beside the bytes."""
    record = content.get("order")
    return {n: v for n, v in record.items() if isinstance(v, int | str)} if isinstance(record, ConfigRecord) else {}


def error_line(error: Error) -> str:
    """Return why there is no answer, in one line: the last that a traceback has, or what a simulation wraps."""
    wrapped = re.fullmatch(r"<class '[\w.]*?(\w+)'>:<'(.*)'>", error.reason or "", re.S)
    text = f"{wrapped[1]}: {wrapped[2]}" if wrapped and "\n" not in wrapped[2].strip() else error.reason or ""
    lines = [line.strip() for line in text.splitlines() if line.strip(" '>\"\t")]
    return lines[-1] if lines else f"Flower's error {error.code}"
