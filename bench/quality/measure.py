"""All of the evaluation: every kind of question, every method, every setting, on one split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from finegrain_ops.tiny_llava import checkpoint
from finegrain_ops.tiny_llava.held_out import ask_about
from finegrain_ops.tiny_llava.questions import KINDS
from finegrain_ops.tiny_llava.scenes import DIFFICULTIES

from .cof import cof_answers
from .dualfocus import dualfocus_answers
from .plain import plain_answers
from .rows import Row

# Beside the settings that the model was trained on: colours and shapes where they are hard to see.
PARTS = (*(("plain", kind) for kind in KINDS), ("hard", "colour"), ("hard", "shape"), ("hard", "leftmost"))


@dataclass(frozen=True)
class Part:
    """Questions of one kind at one difficulty, which one process measures."""

    difficulty: str
    kind: str
    count: int
    split: str
    checkpoint: str


def measure_part(part: Part) -> list[Row]:
    torch.set_num_threads(1)
    model, processor = checkpoint.load(part.checkpoint)
    asked = ask_about(part.split, part.kind, part.count, DIFFICULTIES[part.difficulty])
    plain = plain_answers(model, processor, asked)
    others = chain(cof_answers(model, processor, asked), dualfocus_answers(model, processor, asked))
    return [
        Row.of(part.difficulty, part.kind, plain, None),
        *(Row.of(part.difficulty, part.kind, answers, plain) for answers in others),
    ]


def measure(parts: Sequence[Part], workers: int) -> Iterator[list[Row]]:
    """The rows of each part, in no order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure_part, part) for part in parts]
        for future in tqdm(as_completed(futures), "asking", len(futures), unit="kind"):
            yield future.result()


def write_rows(path: Path, rows: Iterable[Row], facts: dict) -> None:
    """One JSON object per line; the first one holds `facts` about the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [facts, *(row.as_json() for row in rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def read_rows(path: Path) -> tuple[list[Row], dict]:
    """Rows, and the facts."""
    facts, *rows = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    return [Row(**row) for row in rows], facts
