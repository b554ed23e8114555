"""Stored rows as tables for GitHub: the whole report, and the one table of the README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finegrain_ops.tiny_llava.questions import AMBIGUOUS, BOXED_KINDS, CHANCE, GLOBAL_KINDS, KINDS, LOCAL_KINDS

from .cof import BOXES as COF_BOXES
from .cof import WEIGHTS
from .dualfocus import ANSWERS, THRESHOLDS
from .dualfocus import BOXES as DUALFOCUS_BOXES
from .rows import Row, pooled

# What a reader asks of a method: the kinds that the whole image answers, those that a crop does.
GROUPS: Mapping[str, Sequence[str]] = {"global": GLOBAL_KINDS, "local": LOCAL_KINDS, "ambiguous": (AMBIGUOUS,)}
SETTLED = (*GLOBAL_KINDS, *LOCAL_KINDS)  # without a box too
SHOWN_WEIGHT = 2.0  # lambda of the README's table
COF_NAMES = {
    "predicted": "the model's box",
    "oracle": "true box",
    "wrong": "another card's box",
    "none": "no box: the whole image",
}


class Table:
    """The rows of a run, found by what they are of."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = list(rows)
        self.parts = list(dict.fromkeys((row.difficulty, row.kind) for row in self._rows))

    def find(self, difficulty: str, kind: str, method: str, **setting: Any) -> Row:
        """The one row of a part whose setting has all of these.

        Raises:
            LookupError: none has, or several.
        """
        found = [
            row
            for row in self._rows
            if (row.difficulty, row.kind, row.method) == (difficulty, kind, method)
            and all(row.setting.get(name) == value for name, value in setting.items())
        ]
        if len(found) != 1:
            raise LookupError(f"expected one row of {difficulty}, {kind}, {method}, {setting}, got {len(found)}")
        return found[0]

    def pool(self, kinds: Sequence[str], method: str, **setting: Any) -> Row:
        return pooled([self.find("plain", kind, method, **setting) for kind in kinds])


def summary(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The README's table."""
    table = Table(rows)
    columns = {
        "plain": ("plain", {}),
        f"CoF, λ = {SHOWN_WEIGHT:g}": ("cof", {"boxes": "predicted", "weight": SHOWN_WEIGHT}),
        "DualFocus: macro": ("dualfocus", _chosen("macro")),
        "micro": ("dualfocus", _chosen("micro")),
        "chosen": ("dualfocus", _chosen("chosen")),
        "CoF, λ = 22, true box": ("cof", {"boxes": "oracle", "weight": 22.0}),
        "DualFocus, true box": ("dualfocus", _chosen("chosen", "oracle")),
    }
    lines = [_line(["question", "chance", *columns]), _line(["---", *["---:"] * (1 + len(columns))])]
    for difficulty, kind in table.parts:
        found = [table.find(difficulty, kind, method, **setting) for method, setting in columns.values()]
        chance = f"{CHANCE[kind]:.0%}" if difficulty == "plain" else ""
        lines.append(_line([_kind(difficulty, kind), chance, *map(_share, found)]))
    return "\n".join([*lines, "", _footnote(rows, facts)])


def report(rows: Sequence[Row], facts: Mapping[str, Any], images: Mapping[str, str]) -> str:
    """Everything. `images`: the file of each plot, by what it shows."""
    table = Table(rows)
    sections = [
        "# What the methods do to answers",
        _footnote(rows, facts),
        "Shares of right answers with 95 % intervals (Wilson). +g -l: answers to the same questions that are right "
        "here and wrong plainly, and the other way. Written by `python -m bench.quality` (docs/tiny_llava.md).",
        "## By kind of question",
        summary(rows, facts).partition("\n\n")[0],
        _image(images, "kinds"),
        "## Boxes",
        _boxes(table),
        "## CoF: grounding and reweighting (the analogue of CoF's Table II)",
        f"At λ = {SHOWN_WEIGHT:g}.",
        _cof_ablation(table, SHOWN_WEIGHT),
        "And at λ = 22, where a wrong box does its harm.",
        _cof_ablation(table, 22.0),
        "## CoF: λ",
        *(_cof_sweep(table, which) for which in COF_BOXES),
        _image(images, "cof"),
        "## DualFocus: pathways (the analogue of DualFocus's Table 3)",
        _pathways(table),
        "## DualFocus: other boxes (the analogue of Table 5)",
        "Boxes moved by so many pixels of a picture of 640 pixels; the share of right answers that was chosen.",
        _other_boxes(table),
        _image(images, "boxes"),
        "## DualFocus: thresholds (the analogue of Table 9)",
        "On the scale of Eq. 7: the micro pass is skipped where the macro answer's perplexity is below.",
        _thresholds(table),
        _image(images, "thresholds"),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# --- tables ---


def _boxes(table: Table) -> str:
    lines = [_line(["question", "DualFocus: IoU ≥ 0.5", "mean IoU", "CoF: IoU ≥ 0.5", "mean IoU"]), _rule(5)]
    for difficulty, kind in table.parts:
        if kind in BOXED_KINDS:
            rows = (
                table.find(difficulty, kind, "dualfocus", **_chosen("chosen")),
                table.find(difficulty, kind, "cof", boxes="predicted", weight=1.0),
            )
            cells = [text for row in rows for text in (f"{row.facts['iou50']:.1%}", f"{row.facts['iou']:.2f}")]
            lines.append(_line([_kind(difficulty, kind), *cells]))
    return "\n".join(lines)


def _cof_ablation(table: Table, weight: float) -> str:
    lines = [_line(["", *GROUPS, *(_kind(*part) for part in _hard(table))]), _rule(1 + len(GROUPS) + len(_hard(table)))]
    settings: dict[str, tuple[str, dict[str, Any]]] = {"plain": ("plain", {})}
    for which in ("none", "predicted", "oracle", "wrong"):
        settings[f"reweighted, {COF_NAMES[which]}"] = ("cof", {"boxes": which, "weight": weight})
    for name, (method, setting) in settings.items():
        found = [table.pool(kinds, method, **setting) for kinds in GROUPS.values()]
        found += [table.find(*part, method, **setting) for part in _hard(table)]
        lines.append(_line([name, *map(_with_pairs, found)]))
    return "\n".join(lines)


def _cof_sweep(table: Table, which: str) -> str:
    lines = [_line([COF_NAMES[which], *(f"λ = {weight:g}" for weight in WEIGHTS)]), _rule(1 + len(WEIGHTS))]
    for difficulty, kind in table.parts:
        found = [table.find(difficulty, kind, "cof", boxes=which, weight=weight) for weight in WEIGHTS]
        lines.append(_line([_kind(difficulty, kind), *map(_share, found)]))
    return "\n".join(lines)


def _pathways(table: Table) -> str:
    lines = [_line(["question", *ANSWERS, "micro chosen", "perplexity macro", "micro"]), _rule(8)]
    for difficulty, kind in table.parts:
        found = [table.find(difficulty, kind, "dualfocus", **_chosen(answer)) for answer in ANSWERS]
        facts = found[0].facts
        cells = [*map(_share, found), f"{facts['chose_micro']:.0%}"]
        cells += [f"{facts[name]:.2f}" for name in ("macro_perplexity", "micro_perplexity")]
        lines.append(_line([_kind(difficulty, kind), *cells]))
    found = [table.pool(KINDS, "dualfocus", **_chosen(answer)) for answer in ANSWERS]
    facts = found[0].facts
    lines.append(
        _line(
            ["all of the above that are not hard", *map(_share, found), f"{facts['chose_micro']:.0%}"]
            + [f"{facts[name]:.2f}" for name in ("macro_perplexity", "micro_perplexity")]
        )
    )
    return "\n".join(lines)


def _other_boxes(table: Table) -> str:
    lines = [_line(["question", "macro", *DUALFOCUS_BOXES]), _rule(2 + len(DUALFOCUS_BOXES))]
    for difficulty, kind in table.parts:
        found = [table.find(difficulty, kind, "dualfocus", **_chosen("macro"))]
        found += [table.find(difficulty, kind, "dualfocus", **_chosen("chosen", which)) for which in DUALFOCUS_BOXES]
        lines.append(_line([_kind(difficulty, kind), *map(_share, found)]))
    return "\n".join(lines)


def _thresholds(table: Table) -> str:
    columns = ["0"] + [f"{threshold:g}" for threshold in THRESHOLDS]
    lines = [_line(["question", *columns]), _rule(1 + len(columns))]
    parts: list[tuple[str, Sequence[tuple[str, str]]]] = [(_kind(*part), [part]) for part in table.parts]
    parts.append(("all that are not hard, but the ambiguous", [("plain", kind) for kind in SETTLED]))
    for name, of_part in parts:
        cells = []
        for threshold in (0.0, *THRESHOLDS):
            setting = {**_chosen("chosen"), "threshold": threshold}
            row = pooled([table.find(*part, "dualfocus", **setting) for part in of_part])
            cells.append(f"{row.accuracy:.1%}, {row.facts.get('skipped', 0.0):.0%} skipped")
        lines.append(_line([name, *cells]))
    return "\n".join(lines)


# --- how ---


def _chosen(answer: str, boxes: str = "predicted") -> dict[str, Any]:
    return {"answer": answer, "boxes": boxes, "threshold": 0.0}


def _hard(table: Table) -> list[tuple[str, str]]:
    return [part for part in table.parts if part[0] != "plain"]


def _kind(difficulty: str, kind: str) -> str:
    name = kind.replace("_", " ")
    return name if difficulty == "plain" else f"{name}, {difficulty}"


def _share(row: Row) -> str:
    low, high = row.interval
    return f"{row.accuracy:.1%} ({low:.1%} to {high:.1%})"


def _with_pairs(row: Row) -> str:
    return _share(row) + ("" if row.gained is None else f" +{row.gained} -{row.lost}")


def _footnote(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    counts = sorted({row.count for row in rows})
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return (
        f"{' or '.join(map(str, counts))} questions of each kind, each about a scene of its own of the split "
        f"{facts['split']!r}; weights {facts['weights'][:12]}; {facts['name']}, {versions}, commit {facts['commit']}, "
        f"{facts['date'][:10]}. `{facts['command']}`"
    )


def _image(images: Mapping[str, str], name: str) -> str:
    return f"![{name}]({images[name]})" if name in images else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return _line(["---", *["---:"] * (columns - 1)])
