"""Tables that read well as Markdown and as plain text, and formatting of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def mean_and_spread(numbers: Sequence[float], digits: int, unit: str = "") -> str:
    """The mean, with the standard deviation if there are several numbers; empty without any."""
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.{digits}f}{spread}{unit}" if numbers else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> list[str]:
    """A table whose columns line up; the first `texts` are left-aligned, the others, numbers, to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        places = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(cell.ljust(w) if i < texts else cell.rjust(w) for i, (cell, w) in places)} |"

    rule = "|".join("-" * (w + 2) if i < texts else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return [line(head), f"|{rule}|", *map(line, rows)]
