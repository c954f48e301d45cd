"""Tables of plain text as Markdown and LaTeX."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Table", "latex", "markdown"]


@dataclass(frozen=True)
class Table:
    """One network's table, as plain text.

    Attributes:
        title: What it is of.
        head: Names of the columns.
        rows: A cell for each.
    """

    title: str
    head: list[str]
    rows: list[list[str]]


def markdown(tables: Iterable[Table]) -> str:
    """Return tables as Markdown."""
    parts = []
    for table in tables:
        lines = [table.head, ["---"] * len(table.head), *table.rows]
        parts.append("\n".join([f"**{table.title}**", "", *(f"| {' | '.join(cells)} |" for cells in lines)]))
    return "\n\n".join(parts)


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
}


def latex(tables: Iterable[Table]) -> str:
    """Return tables as LaTeX, for the package booktabs."""
    parts = []
    for table in tables:
        lines = [f"% {table.title}", rf"\begin{{tabular}}{{ll{'r' * (len(table.head) - 2)}}}", r"\toprule"]
        lines += [_latex_row(table.head), r"\midrule", *map(_latex_row, table.rows), r"\bottomrule", r"\end{tabular}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(_latex_text(cell) for cell in cells) + r" \\"


def _latex_text(text: str) -> str:
    escaped = re.sub(r"(?<!\S)-(?=\d)", "$-$", "".join(_LATEX.get(character, character) for character in text))
    return escaped.replace("E[theta]", r"$\mathrm{E}[\theta]$")
