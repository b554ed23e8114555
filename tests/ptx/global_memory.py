"""Global memory: one range of addresses for each tensor argument, far from all others.

What a GPU would let pass in silence is reported: accesses beyond a tensor, into the gaps between the rows of a view,
misaligned ones, and blocks that depend on one another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .report import Kind, Report

_SEGMENT_BITS = 44  # tensors lie 32 TiB apart: an offset that has overflowed 32 bits reaches none of them
_FIRST_SEGMENT = 17  # beyond the addresses of this process, which have 47 bits
_LONGEST_SHADOW = 1 << 28
_WORDS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)} | {16: np.dtype("V16")}


class Buffer(NamedTuple):
    """The memory of a tensor from its first to its last element, and how its elements lie in it."""

    data: np.ndarray  # bytes
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    itemsize: int
    address: int  # the real one


class Segment:
    """A buffer at an address of the kernel's."""

    def __init__(self, name: str, buffer: Buffer, base: int, is_unread: bool = False) -> None:
        self.name, self.data, self.base, self.itemsize = name, buffer.data, base, buffer.itemsize
        self.buffer = buffer
        self.is_unread = is_unread
        self.loads = self.stores = 0
        self.writers: np.ndarray | None = None  # 1 + the block that wrote a byte in this launch
        self._words: dict[int, np.ndarray] = {}
        lengths = sorted(
            ((st * buffer.itemsize, n) for st, n in zip(buffer.strides, buffer.shape) if st and n > 1), reverse=True
        )
        nested = all(outer >= n * inner for (outer, _), (inner, n) in itertools.pairwise(lengths))
        elements = int(np.prod([n for _, n in lengths], dtype=np.int64))
        has_gaps = buffer.data.size > buffer.itemsize * elements
        self._steps = lengths if nested and has_gaps else []  # views whose rows overlap are taken as a whole

    def words(self, size: int) -> np.ndarray:
        """Words of `size` bytes, one beginning at each byte."""
        if size not in self._words:
            count = max(self.data.size - size + 1, 0)
            self._words[size] = np.ndarray((count,), _WORDS[size], self.data, strides=(1,)) if count else np.empty(0)
        return self._words[size]

    def in_gap(self, offset: np.ndarray, size: int) -> np.ndarray | None:
        """Which of the accesses begin or end in bytes between the rows of a view, that are no part of it."""
        if not self._steps:
            return None
        return self._is_between(offset) | self._is_between(offset + (size - 1))

    def _is_between(self, offset: np.ndarray) -> np.ndarray:
        between, rest = np.zeros(offset.shape, bool), offset
        for stride, count in self._steps:
            between |= rest // stride >= count
            rest = rest % stride
        return between | (rest >= self.itemsize)


class GlobalMemory:
    """What one launch can reach."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.segments: dict[int, Segment] = {}
        self.escaped: list[Segment] = []  # at real addresses, which the host has written into tables
        self._shadows: dict[tuple[int, int], np.ndarray] = {}

    def bind(self, name: str, buffer: Buffer, is_unread: bool = False) -> int:
        """An address for the tensor, as much aligned as its real one. `is_unread`: no access to it is right."""
        number = 2 * len(self.segments) + _FIRST_SEGMENT  # between two tensors lies a range that belongs to none
        base = (number << _SEGMENT_BITS) + buffer.address % 256
        self.segments[number] = Segment(name, buffer, base, is_unread)
        return base

    def bind_real(self, name: str, buffer: Buffer) -> None:
        """Makes a tensor accessible at its real address."""
        self.escaped.append(Segment(name, buffer, buffer.address))

    def load(self, address: np.ndarray, size: int) -> np.ndarray:
        """A word of `size` bytes for each address; all bits are set, a NaN, where there is no tensor."""
        result = np.full(address.size, -1, np.int8).repeat(size).view(_WORDS[size])
        for segment, chosen, offset in self._find(address, size, "load"):
            segment.loads += 1
            if segment.writers is not None:
                others = segment.writers[offset[:, None] + np.arange(size)]
                if ((others != 0) & (others != self.report.block + 1)).any():
                    self.report.add(Kind.READ_OF_ANOTHER_BLOCK, segment.name)
            if chosen is None:
                return segment.words(size)[offset]
            result[chosen] = segment.words(size)[offset]
        return result

    def store(self, address: np.ndarray, words: np.ndarray) -> None:
        size = words.dtype.itemsize
        for segment, chosen, offset in self._find(address, size, "store"):
            segment.stores += 1
            self._note_writer(segment, offset, size)
            mine = words if chosen is None else words[chosen]
            memory = segment.words(size)
            memory[offset] = mine
            if (memory[offset].view(np.uint8) != mine.view(np.uint8)).any():
                self.report.add(Kind.DIFFERENT_VALUES, f"{segment.name}, {len(offset)} threads")

    def _note_writer(self, segment: Segment, offset: np.ndarray, size: int) -> None:
        if segment.writers is None:
            if segment.data.size >= _LONGEST_SHADOW:
                return
            # One and the same for all arguments that hold the same memory.
            key = (segment.buffer.address, segment.data.size)
            shadow = self._shadows.setdefault(key, np.zeros(segment.data.size, np.int32))
            for other in (*self.segments.values(), *self.escaped):
                if (other.buffer.address, other.data.size) == key:
                    other.writers = shadow
        me = self.report.block + 1
        bytes_at = offset[:, None] + np.arange(size)
        others = segment.writers[bytes_at]
        if ((others != 0) & (others != me)).any():
            self.report.add(Kind.TWO_BLOCKS_WRITE, f"{segment.name}, and block {int(others.max()) - 1}")
        segment.writers[bytes_at] = me

    def _find(
        self, address: np.ndarray, size: int, what: str
    ) -> Iterator[tuple[Segment, np.ndarray | None, np.ndarray]]:
        """The segments; which of the accesses lie in each (None: all), and their offsets there. Others are reported."""
        if (address & np.uint64(size - 1)).any():
            bad = int(address[address % np.uint64(size) != 0][0])
            self.report.add(Kind.GLOBAL_MISALIGNED, f"{what} of {size} bytes at {self.describe(bad)}")
        number = address >> np.uint64(_SEGMENT_BITS)
        if (number == number[0]).all() and (segment := self.segments.get(int(number[0]))) is not None:
            yield from self._inside(segment, None, address, size, what)
            return
        for n in map(int, np.unique(number)):
            chosen = np.flatnonzero(number == n)
            if n < _FIRST_SEGMENT - 1:
                yield from self._find_real(address, chosen, size, what)
            elif (segment := self.segments.get(n)) is not None:
                yield from self._inside(segment, chosen, address[chosen], size, what)
            else:
                self._report_outside(int(address[chosen[0]]), len(chosen), size, what)

    def _inside(
        self, segment: Segment, chosen: np.ndarray | None, address: np.ndarray, size: int, what: str
    ) -> Iterator[tuple[Segment, np.ndarray | None, np.ndarray]]:
        if segment.is_unread:
            self.report.add(Kind.UNREAD_POINTER, f"{what} of {size} bytes through {segment.name}")
        offset = (address - np.uint64(segment.base)).view(np.int64)
        last = segment.data.size - size
        if offset.min() < 0 or offset.max() > last:
            inside = (offset >= 0) & (offset <= last)
            self._report_outside(int(address[~inside][0]), int((~inside).sum()), size, what)
            chosen = np.flatnonzero(inside) if chosen is None else chosen[inside]
            offset = offset[inside]
            if not len(offset):
                return
        gap = segment.in_gap(offset, size)
        if gap is not None and gap.any():
            bad = segment.base + int(offset[gap][0])
            self.report.add(Kind.GLOBAL_GAP, f"{what} of {size} bytes at {self.describe(bad)}")
        yield segment, chosen, offset

    def _find_real(
        self, address: np.ndarray, chosen: np.ndarray, size: int, what: str
    ) -> Iterator[tuple[Segment, np.ndarray, np.ndarray]]:
        left = chosen
        for segment in self.escaped:
            offset = (address[left] - np.uint64(segment.base)).view(np.int64)
            inside = (offset >= 0) & (offset + size <= segment.data.size)
            if inside.any():
                yield from self._inside(segment, left[inside], address[left[inside]], size, what)
                left = left[~inside]
        if len(left):
            self._report_outside(int(address[left[0]]), len(left), size, what)

    def _report_outside(self, address: int, count: int, size: int, what: str) -> None:
        example = f"{what} of {size} bytes at {self.describe(address)}, {count} threads"
        self.report.add(Kind.GLOBAL_OUT_OF_BOUNDS, example)

    def describe(self, address: int) -> str:
        number = address >> _SEGMENT_BITS
        near = self.segments.get(number) or self.segments.get(number + 1) or self.segments.get(number - 1)
        if near is None:
            return f"address {address:#x}, far from every tensor"
        return f"byte {address - near.base} of {near.name} ({near.data.size} bytes)"
