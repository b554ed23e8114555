"""A block's shared memory, which knows who has touched which bytes since the last barrier.

A granule is as many bytes as the narrowest access of the kernel has. A unit is as many threads as count as one: 32, to
find races between warps, which may run in any order, or 1, to find those between the threads of a warp too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .report import Kind, Report

_WORDS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)} | {16: np.dtype("V16")}
_PIECE = 16  # bytes that wgmma reads at a time
# Who has written a granule: nobody, somebody before the last barrier, or a unit since.
_NOBODY, _BEFORE, _FIRST_WRITER = 0, 1, 2
# Who has read it since the last barrier: nobody, a unit (1 + its number), or several.
_SEVERAL = -1
# All warps of a group read what a wgmma reads, at times of their own: a unit that has written nothing.
_WGMMA_UNIT = 30_000


class SharedMemory:
    """Bytes with checks. `tracks_proxies`: the kernel has wgmma, which needs fences."""

    def __init__(
        self, size: int, granule: int, unit: int, threads: int, report: Report, checked: bool, tracks_proxies: bool
    ) -> None:
        self.size, self.granule, self.report, self.checked = size, granule, report, checked
        self.tracks_proxies = tracks_proxies
        self.data = np.empty(-(-size // 16) * 16, np.uint8)
        self._words = {n: self.data.view(dtype) for n, dtype in _WORDS.items()}
        self._units = (np.arange(threads) // unit).astype(np.int16)
        count = self.data.size // granule
        self._writer, self._reader = np.zeros(count, np.int16), np.zeros(count, np.int16)
        self._pending = np.zeros(count, bool)  # bytes of a cp.async that has not been waited for
        self._unfenced = np.zeros(count, bool)  # written, and no fence.proxy.async since
        self._readers_in_flight = np.zeros(count, np.int16)  # wgmma
        self._num_in_flight = 0  # accesses of wgmma
        self._uncommitted: list[_Copy] = []
        self._committed: list[_Copy] = []
        self._steps = {n: np.arange(n // granule) for n in (1, 2, 4, 8, 16) if n >= granule}

    def begin_block(self) -> None:
        """Another block: nothing is written, and what is read all the same is NaN."""
        self.data.fill(0xFF)
        for shadow in (self._writer, self._reader, self._pending, self._unfenced, self._readers_in_flight):
            shadow.fill(0)
        self._num_in_flight = 0
        self._uncommitted, self._committed = [], []

    def barrier(self) -> None:
        """All threads have met."""
        np.minimum(self._writer, _BEFORE, out=self._writer)
        self._reader.fill(0)

    def load(self, threads: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        """A word of `size` bytes for each thread."""
        index = self._index(address, size, "load")
        if index is None:
            return np.full(address.size * size, 0xFF, np.uint8).view(_WORDS[size])
        if self.checked:
            self._check_read(self._units[threads], index, size)
        return self._words[size][index]

    def store(self, threads: np.ndarray, address: np.ndarray, words: np.ndarray, what: str = "store") -> None:
        size = words.dtype.itemsize
        index = self._index(address, size, what)
        if index is None:
            return
        memory = self._words[size]
        if not self.checked:
            memory[index] = words
            return
        new = words.view(np.uint8).reshape(len(index), size)
        changes = (memory[index].view(np.uint8).reshape(len(index), size) != new).any(1)
        self._check_write(self._units[threads], self._granules(index, size), changes, what)
        memory[index] = words
        if (memory[index].view(np.uint8).reshape(len(index), size) != new).any():
            self.report.add(Kind.DIFFERENT_VALUES, f"shared byte {int(address[0])}, {len(index)} threads")

    def copy_async(self, threads: np.ndarray, address: np.ndarray, words: np.ndarray) -> None:
        """Begins to write; the bytes are there after the wait, and until then nobody may touch them."""
        size = words.dtype.itemsize
        index = self._index(address, size, "cp.async")
        if index is None:
            return
        at = self._granules(index, size)
        if self.checked:
            self._check_write(self._units[threads], at, np.ones(len(at), bool), "cp.async", marks=False)
            self._pending[at] = True
        group = np.full(len(threads), -1, np.int64)
        self._uncommitted.append(_Copy(threads, address.copy(), words, at, group))  # registers change

    def commit(self, active: np.ndarray, group: np.ndarray) -> None:
        """Gives the copies that these threads have begun their group's number."""
        left = []
        for copy in self._uncommitted:
            mine = active[copy.threads] & (copy.group < 0)
            copy.group[mine] = group[copy.threads][mine]
            if (copy.group >= 0).all():
                self._committed.append(copy)
            else:
                left.append(copy)
        self._uncommitted = left

    def wait(self, active: np.ndarray, newest: np.ndarray) -> None:
        """Finishes the copies of these threads up to each one's group `newest`."""
        self._uncommitted = self._finish(self._uncommitted, active, newest)
        self._committed = self._finish(self._committed, active, newest)

    def _finish(self, copies: list[_Copy], active: np.ndarray, newest: np.ndarray) -> list[_Copy]:
        left = []
        for copy in copies:
            done = active[copy.threads] & (copy.group >= 0) & (copy.group <= newest[copy.threads])
            if done.any():
                if self.checked:
                    self._pending[copy.granules[done]] = False
                self.store(copy.threads[done], copy.address[done], copy.words[done], "cp.async, when it arrives,")
            if not done.all():
                left.append(copy.subset(~done))
        return left

    # wgmma, which belongs to the asynchronous proxy

    def fence(self, m: Any) -> None:
        """Orders writes before what wgmma reads: those of these threads, and those before the last barrier."""
        if m is True:
            self._unfenced.fill(False)
        elif self.checked:
            mine = np.isin(self._writer, self._units[m] + _FIRST_WRITER)
            self._unfenced[(self._writer <= _BEFORE) | mine] = False

    def begin_wgmma_read(self, address: np.ndarray) -> np.ndarray:
        """The pieces of 16 bytes at these addresses, which nobody may write until `finish_wgmma_read`."""
        index = self._index(address, _PIECE, "wgmma")
        if index is None:
            return np.full(address.size * _PIECE, 0xFF, np.uint8).view(_WORDS[_PIECE])
        if self.checked:
            at = self._granules(index, _PIECE)
            if self._unfenced[at].any():
                self.report.add(Kind.WGMMA_UNFENCED, self._example(at, self._unfenced[at]))
            self._check_read(np.full(len(index), _WGMMA_UNIT, np.int16), index, _PIECE, marks=False)
            np.add.at(self._readers_in_flight, at, 1)
            self._num_in_flight += 1
        return self._words[_PIECE][index]

    def finish_wgmma_read(self, address: np.ndarray) -> None:
        if not self.checked:
            return
        index = address.astype(np.int64) // _PIECE
        at = self._granules(index, _PIECE)
        np.subtract.at(self._readers_in_flight, at, 1)
        self._num_in_flight -= 1
        self._mark_read(np.full(len(index), _WGMMA_UNIT, np.int16), at)

    # Checks

    def _index(self, address: np.ndarray, size: int, what: str) -> np.ndarray | None:
        """Which words these are; None, and a finding, where one is none."""
        address = address.astype(np.int64)
        if (address & (size - 1)).any():
            bad = int(address[address % size != 0][0])
            self.report.add(Kind.SHARED_MISALIGNED, f"{what} of {size} bytes at byte {bad}")
            return None
        if int(address.max()) + size > self.size or int(address.min()) < 0:
            bad = int(address.max())
            self.report.add(Kind.SHARED_OUT_OF_BOUNDS, f"{what} of {size} bytes at byte {bad} of {self.size}")
            return None
        return address // size

    def _granules(self, index: np.ndarray, size: int) -> np.ndarray:
        """(accesses, granules of each)"""
        return (index * (size // self.granule))[:, None] + self._steps[size]

    def _check_read(self, units: np.ndarray, index: np.ndarray, size: int, marks: bool = True) -> None:
        """`marks`: the read is over at once."""
        at = self._granules(index, size)
        writer = self._writer[at]
        mine = units[:, None] + np.int16(_FIRST_WRITER)
        if not ((writer == _BEFORE) | (writer == mine)).all():
            if (writer == _NOBODY).any():
                kind = Kind.COPY_READ_EARLY if self._pending[at][writer == _NOBODY].all() else Kind.UNINITIALISED
                self.report.add(kind, self._example(at, writer == _NOBODY))
            race = (writer >= _FIRST_WRITER) & (writer != mine)
            if race.any():
                self.report.add(Kind.RACE_READ_AFTER_WRITE, self._example(at, race))
        if self._uncommitted or self._committed:
            pending = self._pending[at]
            if pending.any():
                self.report.add(Kind.COPY_READ_EARLY, self._example(at, pending))
        if marks:
            self._mark_read(units, at)

    def _mark_read(self, units: np.ndarray, at: np.ndarray) -> None:
        mine = (units + np.int16(1))[:, None]
        before = self._reader[at]
        now = np.where((before == 0) | (before == mine), mine, np.int16(_SEVERAL))
        self._reader[at] = now
        shared = self._reader[at] != now  # with another unit, in this very instruction
        if shared.any():
            self._reader[at[shared]] = _SEVERAL

    def _check_write(
        self, units: np.ndarray, at: np.ndarray, changes: np.ndarray, what: str, marks: bool = True
    ) -> None:
        """`changes`: the accesses that alter memory; warps may write the same value side by side. `marks`: the bytes
        are there at once.
        """
        mine = units[:, None] + np.int16(_FIRST_WRITER)
        if self._uncommitted or self._committed:
            pending = self._pending[at]
            if pending.any():
                self.report.add(Kind.COPY_OVERWRITTEN, f"{what}, {self._example(at, pending)}")
        reader, writer = self._reader[at], self._writer[at]
        race = (reader != 0) & (reader != mine - 1)
        if race.any() and (race := race & changes[:, None]).any():
            self.report.add(Kind.RACE_WRITE_AFTER_READ, f"{what}, {self._example(at, race)}")
        race = (writer >= _FIRST_WRITER) & (writer != mine)
        if race.any() and (race := race & changes[:, None]).any():
            self.report.add(Kind.RACE_WRITE_AFTER_WRITE, f"{what}, {self._example(at, race)}")
        if self._num_in_flight and (self._readers_in_flight[at] > 0).any():
            self.report.add(Kind.WGMMA_OVERWRITTEN, f"{what}, {self._example(at, self._readers_in_flight[at] > 0)}")
        if marks:
            self._writer[at] = mine
            if self.tracks_proxies:
                self._unfenced[at] = True

    def _example(self, at: np.ndarray, bad: np.ndarray) -> str:
        return f"shared byte {int(at[bad][0]) * self.granule}, {int(bad.any(1).sum())} accesses"


class _Copy:
    """What one cp.async instruction has begun."""

    def __init__(
        self, threads: np.ndarray, address: np.ndarray, words: np.ndarray, granules: np.ndarray, group: np.ndarray
    ) -> None:
        self.threads, self.address, self.words, self.granules, self.group = threads, address, words, granules, group

    def subset(self, chosen: np.ndarray) -> _Copy:
        if chosen.all():
            return self
        parts = (self.threads, self.address, self.words, self.granules, self.group)
        return _Copy(*(part[chosen] for part in parts))
