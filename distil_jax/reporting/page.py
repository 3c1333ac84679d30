"""Pages as lists of blocks, which can be written as Markdown and as a single HTML file.

All text in blocks is plain text. It may hold any characters, because names of runs and words of the data do, so both
writers escape it. Only the SVGs of `Curves` go into the HTML as they are; `curves.py` puts no such text into them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from distil_jax.reporting.markdown import table
from distil_jax.reporting.style import CSS


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str
    lead: str = ""  # text in bold before it


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    # How many columns, from the left, hold text; the others hold numbers. With more than one, a narrow screen shows the
    # cells of a row below each other.
    text_columns: int = 1


@dataclass(frozen=True)
class Curves:
    """Curves: one image with all panels for Markdown, and single panels for HTML, which wrap to the screen's width.

    Attributes:
      file: name of an image in the page's folder.
      panels: SVGs that are safe in HTML.
      legend: for each run, a line sample (SVG) and the run's name; empty if there is only one run.
    """

    file: str
    panels: tuple[str, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Code:
    language: str
    text: str


@dataclass(frozen=True)
class Fold:
    """A section that is collapsed until it is clicked."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Table | Curves | Code | Fold


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as GitHub-flavoured Markdown."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file. It loads nothing else, which its content security policy enforces."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_escape_html(title)}</title>",
            f"<style>\n{CSS}</style>",
            "</head>",
            "<body>",
            "<main>",
            *map(_html, blocks),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def panel_spans(count: int) -> list[int]:
    """How many sixths of the width each of so many panels takes: three or two stand in a row, and every row is full."""
    halves = {0: 0, 1: 4, 2: 2}[count % 3] if count > 1 else 0
    return [2] * (count - halves) + [3] * halves if count > 1 else [6]


def printable(text: str) -> str:
    """The text with control characters written as escapes, so that they cannot move a cursor or end a line."""
    kept = "\u00a0\u200c\u200d"  # the no-break space, and the joiners that Persian and Hindi need
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape_markdown(text)}"
        case Paragraph(text, lead):
            return (f"**{_escape_markdown(lead)}** " if lead else "") + _escape_markdown(text)
        case Table(head, rows, text_columns):
            cells = [[_escape_markdown(cell) for cell in row] for row in (head, *rows)]
            return "\n".join(table(cells[0], cells[1:], text_columns=text_columns))
        case Curves(file):
            return f"![curves]({file})"
        case Code(language, text):
            longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}{language}\n{text}{fence}"
        case Fold(summary, blocks):
            inner = "\n\n".join(map(_markdown, blocks))
            return f"<details><summary>{_escape_html(summary)}</summary>\n\n{inner}\n\n</details>"


def _escape_markdown(text: str) -> str:
    """Escapes text so that Markdown shows it unchanged; [MASK] and snake_case need no escapes."""
    text = re.sub(r"[\\`*<|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)", r"\\\g<0>", printable(text))
    return text.replace("](", r"]\(").replace("][", r"]\[")


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escape_html(text)}</h{level}>"
        case Paragraph(text, lead):
            return f"<p>{f'<strong>{_escape_html(lead)}</strong> ' if lead else ''}{_escape_html(text)}</p>"
        case Table():
            return _html_table(block)
        case Curves(_, panels, legend):
            names = "\n".join(f"<li>{line}<span>{_escape_html(name)}</span></li>" for line, name in legend)
            spans = panel_spans(len(panels)) if panels else []
            figures = "\n".join(
                f'<figure class="sixths-{span}">{panel}</figure>' for panel, span in zip(panels, spans, strict=True)
            )
            list_of_runs = f'<ul class="legend">\n{names}\n</ul>\n' if names else ""
            return f'{list_of_runs}<div class="curves">\n{figures}\n</div>'
        case Code(_, text):
            lines = "\n".join(map(_escape_html, text.split("\n")))  # escaped line by line, to keep the line ends
            return f"<pre><code>{lines}</code></pre>"
        case Fold(summary, blocks):
            inner = "\n".join(map(_html, blocks))
            return f"<details>\n<summary>{_escape_html(summary)}</summary>\n{inner}\n</details>"


def _html_table(block: Table) -> str:
    names = [_escape_html(name) for name in block.head]

    def attribute(column: int) -> str:
        return ' dir="auto"' if column < block.text_columns else ' class="number"'

    head = "".join(f"<th{attribute(i)}>{name}</th>" for i, name in enumerate(names))
    rows = [
        "".join(f'<td{attribute(i)} data-name="{names[i]}">{_escape_html(cell)}</td>' for i, cell in enumerate(row))
        for row in block.rows
    ]
    style = ' class="texts"' if block.text_columns > 1 else ""
    return "\n".join(
        [
            f'<div class="wide"><table{style}>',
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *(f"<tr>{row}</tr>" for row in rows),
            "</tbody>",
            "</table></div>",
        ]
    )


def _escape_html(text: str) -> str:
    return html.escape(printable(text))
