"""English text that every installation has: the paragraphs in the docstrings of installed Python packages.

An offline demonstration trains on it. The text is read from the installed packages and never redistributed.
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

# Packages whose docstrings are read, in this order. Those that are not installed are skipped.
PACKAGES = (
    "numpy", "scipy", "jax", "flax", "optax", "orbax", "datasets", "huggingface_hub", "pandas", "transformers",
)  # fmt: skip
FIRST_WORDS = 60  # paragraphs with the same first words count as one
BLOCKS = ("body", "cases", "handlers", "orelse", "finalbody")  # the fields of a syntax node that contain statements


@functools.cache  # parsing 11 MB takes half a minute, and training a vocabulary reads the text three times
def paragraphs() -> Mapping[str, frozenset[str]]:
    """Each distinct paragraph, with the names of the functions, classes and modules in whose docstrings it occurs.

    numpy, jax.numpy and pandas repeat each other's docstrings, often with another comma, case or ending. So paragraphs
    with the same first words are one, in the form in which it comes first. The packages are parsed, not imported.
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
    """The words and numbers of a paragraph, case-folded and without punctuation."""
    return re.findall(r"[^\W_]+", paragraph.casefold())


def _files() -> Iterator[Path]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # does not import the package
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(Path(folder).rglob("*.py"))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turns off the garbage collector: syntax trees have no cycles, and it takes as long as parsing the files."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Name and docstring of every module, class and function in a file. The name is unqualified."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in other people's code
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # some packages contain templates and broken files for tests
            return
    nodes: list[ast.AST] = [tree]
    while nodes:  # visits statements only, because `ast.walk` takes several times as long
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
    """The paragraphs of a docstring that are prose, not code or tables."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if len(paragraph) < 80 or ">>>" in paragraph:
            continue
        prose = sum(character.isalpha() or character == " " for character in paragraph)
        if prose >= 0.85 * len(paragraph):
            yield paragraph
