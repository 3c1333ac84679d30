"""Keeps off the terminal what Orbax and TensorStore print of a save, where `Checkpoints.failure` says it in a sentence.

Where one write of a save fails, Orbax closes its event loop while the others are still under way. Each of those then
prints a traceback, "Event loop is closed", from a thread of TensorStore's and at a moment of its own: in the middle of
a sentence for the user, too. Where too many files are open, no event loop can be opened, and Python prints a traceback
when it closes what is not there. Whatever is not of these kinds is shown as before.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import PurePath
from typing import Any


def silence() -> None:
    """For the rest of the process: a write may end after the checkpoints were closed."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # every directory that Orbax makes is a warning there
    logging.getLogger("asyncio").addFilter(_is_foreign)
    show = sys.unraisablehook

    def show_others(raised: sys.UnraisableHookArgs) -> None:
        if not (_is_late_write(raised) or _is_half_open_loop(raised)):
            show(raised)

    sys.unraisablehook = show_others


def _is_late_write(raised: Any) -> bool:
    """Whether a thread without any Python of its own found an event loop closed."""
    where = traceback.extract_tb(raised.exc_traceback)
    return raised.exc_type is RuntimeError and bool(where) and where[0].name == "call_soon_threadsafe"


def _is_half_open_loop(raised: Any) -> bool:
    """Whether Python discards an event loop whose making failed half-way; that failure is told by itself."""
    names = [frame.name for frame in traceback.extract_tb(raised.exc_traceback)]
    return raised.exc_type is AttributeError and names[:1] == ["__del__"] and names[-1:] == ["_close_self_pipe"]


def _is_foreign(record: logging.LogRecord) -> bool:
    """Whether a task that failed, and that nobody asked for its exception, is none of Orbax's."""
    where = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
    return not any("orbax" in PurePath(frame.filename).parts for frame in where)
