"""Distils BERT-like encoders on TPUs and GPUs. `public.py` lists the names that research code may import from here."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distil_jax.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports `public.py` when a public name is first used, so that the command line can start without JAX."""
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is None:
        names = vars(importlib.import_module(f"{__name__}.public"))
        if name in names:
            return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *vars(importlib.import_module(f"{__name__}.public"))]
