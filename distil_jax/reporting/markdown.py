"""Markdown tables that are also readable as plain text, and the formatting of their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def mean_and_spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    """The mean of values, with their standard deviation if there are several; an empty text if there are none."""
    finite = all(map(math.isfinite, values))
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and finite else ""
    return f"{fmean(values):.{digits}f}{spread}{unit}" if values else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> list[str]:
    """A Markdown table with aligned columns, line by line.

    Args:
      head: the column names.
      rows: a cell for each column.
      text_columns: how many columns, from the left, hold text and are left-aligned; the others are right-aligned.
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rules = ["-" * (width + 2) if i < text_columns else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    return [line(head), f"|{'|'.join(rules)}|", *map(line, rows)]
