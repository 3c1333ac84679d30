"""The English that every installation has: paragraphs of the docstrings of its scientific packages.

It is read where it is installed and never redistributed; what an offline demonstration trains on.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

# Read where they are installed, in this order.
PACKAGES = (
    "numpy", "scipy", "jax", "flax", "optax", "orbax", "datasets", "huggingface_hub", "pandas", "transformers",
)  # fmt: skip
FIRST_WORDS = 60  # as many as tell two paragraphs apart
BLOCKS = ("body", "cases", "handlers", "orelse", "finalbody")  # the fields in which a statement holds others


@functools.cache  # half a minute of parsing for 11 MB, and training a vocabulary reads the text three times
def paragraphs() -> Mapping[str, frozenset[str]]:
    """Each paragraph once, with the last names (of functions, classes, modules) of the objects it is written under.

    Names matter because numpy, jax.numpy and pandas repeat each other, often with another comma, case or ending: what
    has the same first words is one paragraph, and the first of its kind stands for all. Nothing is imported to be read.
    """
    by_beginning: dict[str, tuple[str, set[str]]] = {}
    with _no_garbage_collection():
        for path in _files():
            for name, text in _docstrings(path):
                for paragraph in _english(text):
                    first_words = " ".join(words(paragraph)[:FIRST_WORDS])
                    by_beginning.setdefault(first_words, (paragraph, set()))[1].add(name)
    return {paragraph: frozenset(names) for paragraph, names in by_beginning.values()}


def words(paragraph: str) -> list[str]:
    """Its words and numbers, without case and punctuation."""
    return re.findall(r"[^\W_]+", paragraph.casefold())


def _files() -> Iterator[Path]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # finds without importing
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(Path(folder).rglob("*.py"))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees hold no cycles, and looking for some takes as long as parsing them."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The docstrings of a file, each with the last name of its object."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other people's escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # templates, and tests of broken files
            return
    nodes: list[ast.AST] = [tree]
    while nodes:  # statements only: `ast.walk` takes several times as long
        node = nodes.pop()
        nodes += reversed([child for block in BLOCKS for child in getattr(node, block, ())])
        if isinstance(node, ast.Module):
            name = path.parent.name if path.stem == "__init__" else path.stem
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name
        else:
            continue
        if text := ast.get_docstring(node):
            yield name, text


def _english(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if len(paragraph) < 80 or ">>>" in paragraph:
            continue
        prose = sum(character.isalpha() or character == " " for character in paragraph)
        if prose >= 0.85 * len(paragraph):
            yield paragraph
