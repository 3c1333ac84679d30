"""Tables that read well as Markdown and as plain text; needs nothing."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> list[str]:
    """A table whose columns line up; the first `texts` are left-aligned, the others, numbers, to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        places = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(cell.ljust(w) if i < texts else cell.rjust(w) for i, (cell, w) in places)} |"

    rule = "|".join("-" * (w + 2) if i < texts else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return [line(head), f"|{rule}|", *map(line, rows)]
