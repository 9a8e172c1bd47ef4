"""What the command line prints when a test calls it in its own process: see the fixture ``fedsieve``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Printed:
    """What a command printed."""

    stdout: str
    stderr: str


CommandLine: TypeAlias = Callable[..., Printed]
"""Takes a command's words, and the exit code that is expected: ``fedsieve("run", "nowhere", code=2)``."""
