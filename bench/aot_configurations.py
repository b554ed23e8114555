"""Which configurations of which kernels are compiled: every tile of kernels/tuning.py in each of its regimes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finegrain_ops.kernels.head_dim import split_head_dim
from finegrain_ops.kernels.tuning import TABLE, Row, Tile, row_for

from .aot_launches import Call, Launch, record, run_backward, run_decode, run_forward, run_map, run_map_backward
from .machine_code import MachineCode

COMPUTE_CAPABILITIES = (80, 90)  # which have rows of their own
MODEL_HEAD_DIMS = (80, 88, 96, 104)  # vision towers' and language models', each held in two or three parts


@dataclass(frozen=True)
class Job:
    """A kernel as one of the operations uses it."""

    row_of: str  # which rows of TABLE it takes
    run: Callable[[Call], None]
    kernel: str
    rows: int = 512
    group_size: int = 1


JOBS = {
    "forward": Job("forward", run_forward, "attention_forward_kernel"),
    "backward_query": Job("backward_query", run_backward, "attention_backward_query_kernel"),
    "backward_keys": Job("backward_keys", run_backward, "attention_backward_keys_kernel"),
    "map_rows": Job("map_rows", run_map, "attention_map_rows_kernel"),
    "map_columns": Job("map_columns", run_map, "attention_map_columns_kernel"),
    "map_backward_rows": Job("map_rows", run_map_backward, "attention_map_rows_kernel"),
    "map_backward_query": Job("map_backward_query", run_map_backward, "attention_backward_query_kernel"),
    "map_backward_keys": Job("backward_keys", run_map_backward, "attention_backward_keys_kernel"),
    "decode_16_rows": Job("decode", run_decode, "attention_decode_kernel", rows=1, group_size=16),
    "decode_64_rows": Job("decode_wide", run_decode, "attention_decode_kernel", rows=1, group_size=64),
}
PACKED_JOBS = ("forward", "backward_query", "backward_keys")

FEATURES: dict[str, dict] = {
    "no bias": {"has_bias": False},
    "bias": {},
    "bias, scale <= 0": {"scale": -0.1},
    "gate": {"has_gate": True},
    "gate, scale <= 0": {"has_gate": True, "scale": -0.1},
    "packed": {"is_packed": True},
    "packed, gate": {"is_packed": True, "has_gate": True},
}
# Of bfloat16, at the whole width of a row. The backward kernels' loops without a bias are also in the code with one.
_DEFAULT = {
    "forward": ("no bias", "bias", "bias, scale <= 0", "gate", "packed"),
    "backward_query": ("bias", "bias, scale <= 0", "gate", "packed"),
    "backward_keys": ("bias", "bias, scale <= 0", "gate", "packed"),
    "map_rows": ("bias", "gate"),
    "map_columns": ("bias", "gate"),
    "map_backward_rows": ("bias",),
    "map_backward_query": ("bias",),
    "map_backward_keys": ("bias",),
    "decode_16_rows": ("bias",),
    "decode_64_rows": ("no bias", "bias", "gate"),
}


@dataclass(frozen=True)
class Configuration:
    job: str
    compute_capability: int
    dtype: str
    head_dim: int
    features: str
    tile: Tile | None = None  # instead of the table's
    has_products = True

    def __str__(self) -> str:
        at_tile = f" at {self.tile.BLOCK_M}x{self.tile.BLOCK_N}" if self.tile else ""
        return f"{self.job} sm_{self.compute_capability} {self.dtype} d{self.head_dim} {self.features}{at_tile}"

    @property
    def order(self) -> tuple:
        features = list(FEATURES).index(self.features)
        return list(JOBS).index(self.job), self.compute_capability, self.dtype, self.head_dim, features

    @property
    def is_half_precision(self) -> bool:
        return self.dtype != "fp32"

    def launch(self) -> Launch:
        job = JOBS[self.job]
        call = Call(
            self.compute_capability,
            self.dtype,
            self.head_dim,
            rows=job.rows,
            group_size=job.group_size,
            tile=self.tile,
            **FEATURES[self.features],
        )
        return record(job.run, call)[job.kernel]

    def compile(self) -> tuple[Tile, MachineCode]:
        launch = self.launch()
        return launch.tile, launch.compile(self.compute_capability)


def configurations(every: bool = False) -> list[Configuration]:
    """Those of the committed table; with `every`, other features, dtypes and head dimensions of the same rows too."""
    return sorted(set(_configurations(every)), key=lambda configuration: configuration.order)


def _configurations(every: bool) -> Iterator[Configuration]:
    for name, job in JOBS.items():
        for capability in COMPUTE_CAPABILITIES:
            for row in _rows_in_use(job.row_of, capability):
                yield from _of_row(name, capability, row, every)
            if name in PACKED_JOBS:
                for head_dim in MODEL_HEAD_DIMS:
                    yield Configuration(name, capability, "bf16", head_dim, "bias")


def _of_row(name: str, capability: int, row: Row, every: bool) -> Iterator[Configuration]:
    dims = _head_dims(capability, row)
    if every:
        features = [f for f, values in FEATURES.items() if name in PACKED_JOBS or not values.get("is_packed")]
        for dtype in ("bf16", "fp16") if row.element_size == 2 else ("fp32",):
            for head_dim in dims:
                yield from (Configuration(name, capability, dtype, head_dim, f) for f in features)
        return
    shares_its_rows = name.startswith("map_backward")
    if row.element_size == 4:  # no tensor cores: the same code for either architecture, but for its encoding
        if row.compute_capability == capability and not shares_its_rows:
            yield Configuration(name, capability, "fp32", row.width, "bias")
        return
    yield from (Configuration(name, capability, "bf16", row.width, f) for f in _DEFAULT[name])
    for head_dim in dims[1:]:
        if not shares_its_rows:
            yield Configuration(name, capability, "bf16", head_dim, "bias")
        if name in PACKED_JOBS:  # the most that a row gate can be combined with
            yield Configuration(name, capability, "bf16", head_dim, "packed, gate")
    if name in PACKED_JOBS and row.width == 128:
        yield Configuration(name, capability, "bf16", row.width, "no bias")
        yield Configuration(name, capability, "fp16", row.width, "bias")


def _rows_in_use(kernel: str, capability: int) -> list[Row]:
    rows = [row for row in TABLE if row.kernel == kernel]
    return [row for row in rows if row_for(kernel, capability, row.element_size, row.width) is row]


def _head_dims(capability: int, row: Row) -> list[int]:
    """The whole width, and a head dimension that fills only part of its last tile."""
    partial = row.width - 8
    is_same_row = row_for(row.kernel, capability, row.element_size, sum(split_head_dim(partial))) is row
    return [row.width, partial] if is_same_row else [row.width]
