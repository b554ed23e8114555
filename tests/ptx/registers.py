"""The registers of a block's threads: a row of each register's type, with one value for each thread."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from .parser import Address, Kernel

DTYPES = {
    **{f"{letter}{bits}": np.dtype(f"uint{bits}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "bf16": np.dtype("uint16"),
    **dict.fromkeys(("f16x2", "bf16x2"), np.dtype("uint32")),
    "pred": np.dtype(bool),
}
_PARAMETER_ALIGNMENT = 16
_SPECIAL = {
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid",
}


class OperandError(Exception):
    """Why an operand cannot be what it would have to be."""


class Registers:
    """Registers, special registers and kernel parameters; what the instructions take their operands from."""

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.kernel, self.threads = kernel, threads
        self._files: list[np.ndarray] = []
        self._rows: dict[str, np.ndarray] = {}
        self._special: dict[str, np.ndarray] = {}
        self._declare()
        self._parameter_at: dict[str, int] = {}
        end = 0
        for name, size in kernel.parameters.items():
            self._parameter_at[name] = end
            end += -(-size // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT
        self.parameters = np.zeros(end, np.uint8)

    def _declare(self) -> None:
        names_by_dtype: dict[np.dtype, list[str]] = defaultdict(list)
        for name, kind in self.kernel.registers.items():
            prefix, _, count = name.partition("<")
            names = [f"{prefix}{k}" for k in range(int(count.rstrip(">")))] if count else [name]
            dtype = DTYPES[kind] if kind == "pred" else np.dtype(f"uint{8 * DTYPES[kind].itemsize}")
            names_by_dtype[dtype] += names
        for dtype, names in names_by_dtype.items():
            file = np.zeros((len(names), self.threads), dtype)
            self._files.append(file)
            self._rows |= zip(names, file)

    def is_register(self, text: Any) -> bool:
        return isinstance(text, str) and text in self._rows

    def row(self, name: str) -> np.ndarray:
        """A register as it is declared: unsigned, or bool."""
        if name not in self._rows:
            raise OperandError(f"{name} is no register")
        return self._rows[name]

    def view(self, name: str, kind: str) -> np.ndarray:
        """A live view of a register as this type, which must be as wide."""
        row, dtype = self.row(name), DTYPES[kind]
        if row.dtype.itemsize != dtype.itemsize or (row.dtype == bool) != (kind == "pred"):
            raise OperandError(f"{name} has {8 * row.dtype.itemsize} bits and is used as .{kind}")
        return row if row.dtype == dtype else row.view(dtype)

    def low(self, name: str, kind: str) -> np.ndarray:
        """A live view of a register's low part, as ld, st and cvt take it."""
        row, dtype = self.row(name), DTYPES[kind]
        if row.dtype.itemsize < dtype.itemsize or row.dtype == bool:
            raise OperandError(f"{name} has {8 * row.dtype.itemsize} bits and is used as .{kind}")
        return row.view(dtype)[:: row.dtype.itemsize // dtype.itemsize]

    def extending(self, name: str, kind: str) -> np.ndarray:
        """A live view of the whole register, to which values of a narrower type are written; it extends their sign."""
        row, dtype = self.row(name), DTYPES[kind]
        if row.dtype.itemsize <= dtype.itemsize or row.dtype == bool:
            return self.view(name, kind)
        return row.view(f"{'i' if dtype.kind == 'i' else 'u'}{row.dtype.itemsize}")

    def source(self, text: str, kind: str, narrow: bool = False) -> Any:
        """A register's live view, or the value of an immediate, a symbol or a special register. `narrow`: the low part
        of a wider register will do.
        """
        if text in self._rows:
            return self.low(text, kind) if narrow else self.view(text, kind)
        if text in _SPECIAL:
            row = self._special.setdefault(text, np.zeros(self.threads, np.uint32))
            if DTYPES[kind].itemsize != row.itemsize:
                raise OperandError(f"{text} has 32 bits and is used as .{kind}")
            return row.view(DTYPES[kind])
        dtype = DTYPES[kind]
        for symbols in (self.kernel.shared, self._parameter_at):
            if text in symbols:
                return dtype.type(symbols[text])
        return _immediate(text, kind)

    def per_thread(self, text: str, kind: str) -> np.ndarray:
        """As `source`, and an array in any case; that of an immediate is not to be written."""
        return np.broadcast_to(self.source(text, kind), self.threads)

    def parameter(self, address: Address, dtype: np.dtype) -> np.ndarray:
        """A live view of one value of the kernel's parameters."""
        if address.base not in self._parameter_at:
            raise OperandError(f"{address.base} is no parameter")
        start, size = self._parameter_at[address.base], self.kernel.parameters[address.base]
        if address.offset < 0 or address.offset + dtype.itemsize > size:
            raise OperandError(f"{address.base} has {size} bytes, {address.offset} is none of them")
        at = start + address.offset
        return self.parameters[at : at + dtype.itemsize].view(dtype)

    def set_parameters(self, values: list[bytes]) -> None:
        for (name, size), value in zip(self.kernel.parameters.items(), values, strict=True):
            if len(value) != size:
                raise ValueError(f"parameter {name} has {size} bytes, {len(value)} are given")
            start = self._parameter_at[name]
            self.parameters[start : start + size] = np.frombuffer(value, np.uint8)

    def begin_block(self, grid: tuple[int, int, int], place: tuple[int, int, int]) -> None:
        """Another block: what it reads before it has written it is NaN, and far from any address."""
        for file in self._files:
            file.view(np.uint8).fill(0 if file.dtype == bool else 0xFF)
        thread = np.arange(self.threads)
        values: dict[str, Any] = {"%tid.x": thread, "%laneid": thread & 31, "%ntid.x": self.threads}
        values |= {"%ntid.y": 1, "%ntid.z": 1}
        for axis, size, index in zip("xyz", grid, place):
            values |= {f"%nctaid.{axis}": size, f"%ctaid.{axis}": index}
        for name, row in self._special.items():
            row[...] = values.get(name, 0)


def _immediate(text: str, kind: str) -> Any:
    dtype = DTYPES[kind]
    try:
        if text[:2] in ("0f", "0F", "0d", "0D"):
            is_single = text[1] in "fF"
            value = np.array(int(text[2:], 16), np.uint32 if is_single else np.uint64)
            number = value.view(np.float32 if is_single else np.float64)
            return number.view(dtype)[()] if number.itemsize == dtype.itemsize else number.astype(dtype)[()]
        number = int(text.rstrip("U"), 0)
    except ValueError:
        raise OperandError(f"{text} is no register, immediate or known symbol") from None
    if kind == "pred":
        return np.bool_(number != 0)
    return np.array(number & (2 ** (8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)[()]


def put(target: np.ndarray, value: Any, m: Any) -> None:
    """Writes a value for the threads of a mask, or for all where it is True."""
    if m is True:
        target[...] = value
    else:
        np.copyto(target, value, where=m, casting="unsafe")
