"""The memory of a program's maps: one arena, in which a room's place is another's once its last reader is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsieve.kernels.cuts import huge
from fedsieve.kernels.program import WORDS, Map, Program, Step, at

LINE = 64
"""Bytes of a cache line: maps begin at its multiples."""


@dataclass(eq=False)
class Room:
    """A map's place: its shape, when it is needed (from step ``first`` to ``last``), and where it lies in the arena."""

    channels: int
    blocks: int
    height: int
    width: int
    halo: int = 0
    first: int = -1
    last: int = -1
    offset: int = -1

    @property
    def line(self) -> int:
        """Words from one row of positions to the next."""
        return (self.width + 2 * self.halo) * WORDS

    @property
    def channel(self) -> int:
        """Words from one channel to the next."""
        return self.line * (self.height + 2 * self.halo) * self.blocks

    @property
    def words(self) -> int:
        """Words in all."""
        return self.channel * self.channels


@dataclass
class Arena:
    """Rooms, and the operations that will use them, in order."""

    packed: bool
    lean: bool = False
    """The least memory: all rooms may take over from one another, not only those of maps of one size, in which each
    thread has the same places. What another core wrote is slow to write."""
    slack: int = 0
    """Words before and behind all rooms, for those who read beyond one."""
    waiting: list[tuple[Callable[[], Step], tuple[Room, ...]]] = field(default_factory=list)
    rooms: list[Room] = field(default_factory=list)
    memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    def step(self, make: Callable[[], Step], *rooms: Room) -> None:
        """Add an operation that uses ``rooms``; it is made once they have their places."""
        for room in rooms:
            if room.first < 0:
                room.first = len(self.waiting)
                self.rooms.append(room)
            room.last = len(self.waiting)
        self.waiting.append((make, rooms))

    def settle(self) -> Program:
        """Give every room its place, and return the program."""
        size, sizes = 0, dict[int, list[Room]]()
        for room in self.rooms:
            sizes.setdefault(0 if self.lean else room.channel, []).append(room)
        for rooms in sizes.values():
            size += _placed(rooms, size)
        self.memory = huge(size + LINE // 4 + 2 * self.slack)
        program = Program(keep=[self.memory])
        program.steps = [make() for make, _ in self.waiting]
        return program

    def map(self, room: Room) -> Map:
        """Return a settled room as the kernels read it."""
        aligned = -(self.memory.data_ptr() + 4 * self.slack) % LINE // 4 + self.slack
        return Map(
            at(self.memory, aligned + room.offset),
            room.channels,
            room.blocks,
            room.height,
            room.width,
            room.halo,
            int(self.packed),
        )


def _placed(rooms: list[Room], start: int) -> int:
    """Place rooms so that those that meet in time do not overlap; return the words taken.

    Those needed longest come first, or those needed last; each as low as can be, or in the tightest gap: the
    least counts.
    """
    orders: list[Callable[[Room], int]] = [lambda r: r.first - r.last, lambda r: -r.last]
    found = [_offsets(sorted(rooms, key=order), tight) for order in orders for tight in (False, True)]
    size, offsets = min(found, key=lambda one: one[0])
    for room, offset in offsets.items():
        room.offset = start + offset
    return size


def _offsets(rooms: list[Room], tight: bool) -> tuple[int, dict[Room, int]]:
    """Place rooms one by one: return the words taken in all, and the offsets."""
    offsets: dict[Room, int] = {}
    for room in rooms:
        met = [(start, r.words) for r, start in offsets.items() if r.first <= room.last and room.first <= r.last]
        gaps, end = list[tuple[int, int]](), 0  # (words too many, offset)
        for start, words in sorted(met):
            if end + room.words <= start:
                gaps.append((start - end - room.words, end))
            end = max(end, start + words)
        offsets[room] = (min(gaps)[1] if tight else gaps[0][1]) if gaps else end
    return max(start + room.words for room, start in offsets.items()), offsets
