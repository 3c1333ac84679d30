"""Hides tracebacks that Orbax and TensorStore print when a save fails: `Checkpoints.failure` already says why.

If one write of a save fails, Orbax closes its event loop while other writes are running. Each of these then prints a
traceback, "Event loop is closed", from a thread of TensorStore at any moment, even in the middle of another line. If
too many files are open, an event loop cannot be made, and Python prints a traceback when it discards the half-made
one. Everything else is printed as before.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import PurePath
from typing import Any


def silence() -> None:
    """Hides them for the rest of the process, because a write may end after the checkpoints were closed."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax warns there of every directory that it makes
    logging.getLogger("asyncio").addFilter(_is_not_orbax)
    show = sys.unraisablehook

    def show_others(raised: sys.UnraisableHookArgs) -> None:
        if not (_is_late_write(raised) or _is_half_open_loop(raised)):
            show(raised)

    sys.unraisablehook = show_others


def _is_late_write(raised: Any) -> bool:
    """Whether a thread without Python frames of its own, such as TensorStore's, met a closed event loop."""
    where = traceback.extract_tb(raised.exc_traceback)
    return raised.exc_type is RuntimeError and bool(where) and where[0].name == "call_soon_threadsafe"


def _is_half_open_loop(raised: Any) -> bool:
    """Whether Python discards a half-made event loop; the error that stopped its making is reported elsewhere."""
    names = [frame.name for frame in traceback.extract_tb(raised.exc_traceback)]
    return raised.exc_type is AttributeError and names[:1] == ["__del__"] and names[-1:] == ["_close_self_pipe"]


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Whether asyncio's record of a task's exception, which nobody retrieved, has nothing to do with Orbax."""
    where = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
    return not any("orbax" in PurePath(frame.filename).parts for frame in where)
