"""The table of answers: what was asked, what is true, and what each method said."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .asking import METHODS, TICK_AND_CROSS, Answers

METHODS_EXPLAINED = """\
CoF raises the attention to a box. DualFocus answers from the whole (macro) and from a crop (micro); the answer whose
perplexity is lower wins. Times are from image and text to text."""


def print_answers(answers: Sequence[Answers], title: str, console: Console, *, has_truth: bool = True) -> None:
    """Right answers are green with a tick, wrong ones red with a cross.

    Args:
        has_truth: show a column of what is true, with "?" where that is unknown.
    """
    marks = TICK_AND_CROSS if console.encoding.lower().startswith("utf") else ("right:", "wrong:")
    table = Table(title=title, title_justify="left")
    for column in ("question", *(["truth"] if has_truth else []), *METHODS):
        table.add_column(column, overflow="fold")
    for one in answers:
        truth = [Text(" or ".join(one.query.truths) or "?")] if has_truth else []
        table.add_row(_question(one), *truth, *(_answer(one, method, marks) for method in METHODS))
    console.print(table)


def tally(answers: Sequence[Answers]) -> str:
    """How many answers of each method are right, of those questions whose truth is known; "" without any."""
    known = [one for one in answers if one.query.truths]
    if not known:
        return ""
    right = {method: sum(bool(one.is_right(method)) for one in known) for method in METHODS}
    return f"Right, of {len(known)}: " + ", ".join(f"{method} {count}" for method, count in right.items()) + "."


def _question(one: Answers) -> Text:
    kind = ", ".join(part for part in (one.query.kind, "box given" if one.query.box else "") if part)
    return Text.assemble(one.query.text, (f"\n{kind}" if kind else "", "dim"))


def _answer(one: Answers, method: str, marks: tuple[str, str]) -> Text:
    style = {True: "green", False: "red", None: ""}[one.is_right(method)]
    facts = f"{one.seconds[method] * 1000:.0f} ms{_pathway(one) if method == 'DualFocus' else ''}"
    return Text.assemble((one.marked(method, marks), style), (f"\n{facts}", "dim"))


def _pathway(one: Answers) -> str:
    """Whose answer DualFocus chose, and why: its perplexity, and that of the other one."""
    macro, micro = one.dualfocus.macro, one.dualfocus.micro
    if micro is None:
        return ", macro (no box)"
    pair = [f"macro {macro.perplexity:.2f}", f"micro {micro.perplexity:.2f}"]
    chosen, other = pair if one.dualfocus.chosen == "macro" else pair[::-1]
    return f", {chosen} ({other})"
