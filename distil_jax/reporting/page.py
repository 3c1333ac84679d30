"""A page described once, as a list of blocks, and written twice: as Markdown and as one HTML file.

Every text in a block is plain: names of runs and words of anybody's text may hold anything, and both writers escape
them. The one thing that HTML takes as it is are the pictures, which `curves.py` draws without any such text in them.
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
    lead: str = ""  # in bold, before it


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    texts: int = 1  # so many columns hold text, the others numbers; where more than one does, a phone stacks them


@dataclass(frozen=True)
class Curves:
    """The same panels as one file for Markdown and one by one for HTML, where they wrap as the screen asks.

    Attributes:
      file: a picture beside the page.
      panels: SVG, safe to stand in HTML.
      legend: a drawn line (SVG) and the name of each run; empty where there is only one.
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
    """Details that few want to read: closed until they are clicked on."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Table | Curves | Code | Fold


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as GitHub's Markdown, which reads well as it is too."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one file that asks for nothing from anywhere, which its policy makes the browser enforce."""
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
            f"<title>{_escaped(title)}</title>",
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


def visible(text: str) -> str:
    """The text with every control character written out: none may move a cursor, turn the line or end it."""
    kept = "\u00a0\u200c\u200d"  # the space that does not break, and what joins letters in Persian and Hindi
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_literal(text)}"
        case Paragraph(text, lead):
            return (f"**{_literal(lead)}** " if lead else "") + _literal(text)
        case Table(head, rows, texts):
            return "\n".join(table(_literals(head), [_literals(row) for row in rows], texts=texts))
        case Curves(file):
            return f"![curves]({file})"
        case Code(language, text):
            longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}{language}\n{text}{fence}"
        case Fold(summary, blocks):
            inner = "\n\n".join(map(_markdown, blocks))
            return f"<details><summary>{_escaped(summary)}</summary>\n\n{inner}\n\n</details>"


def _literals(cells: Sequence[str]) -> list[str]:
    return [_literal(cell) for cell in cells]


def _literal(text: str) -> str:
    """Text that Markdown shows as it is. [MASK] and snake_case stay readable: alone they mean nothing to Markdown."""
    text = re.sub(r"[\\`*<|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)", r"\\\g<0>", visible(text))
    return text.replace("](", r"]\(").replace("][", r"]\[")


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escaped(text)}</h{level}>"
        case Paragraph(text, lead):
            return f"<p>{f'<strong>{_escaped(lead)}</strong> ' if lead else ''}{_escaped(text)}</p>"
        case Table():
            return _html_table(block)
        case Curves(_, panels, legend):
            names = "\n".join(f"<li>{line}<span>{_escaped(name)}</span></li>" for line, name in legend)
            figures = "\n".join(f"<figure>{panel}</figure>" for panel in panels)
            return (
                f'<ul class="legend">\n{names}\n</ul>\n' if names else ""
            ) + f'<div class="curves">\n{figures}\n</div>'
        case Code(_, text):
            # Of the characters that are not visible, a listing needs its line ends.
            lines = "\n".join(map(_escaped, text.split("\n")))
            return f"<pre><code>{lines}</code></pre>"
        case Fold(summary, blocks):
            inner = "\n".join(map(_html, blocks))
            return f"<details>\n<summary>{_escaped(summary)}</summary>\n{inner}\n</details>"


def _html_table(block: Table) -> str:
    names = [_escaped(name) for name in block.head]

    def kind(column: int) -> str:
        return ' dir="auto"' if column < block.texts else ' class="number"'

    head = "".join(f"<th{kind(i)}>{name}</th>" for i, name in enumerate(names))
    rows = [
        "".join(f'<td{kind(i)} data-name="{names[i]}">{_escaped(cell)}</td>' for i, cell in enumerate(row))
        for row in block.rows
    ]
    style = ' class="texts"' if block.texts > 1 else ""
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


def _escaped(text: str) -> str:
    return html.escape(visible(text))
