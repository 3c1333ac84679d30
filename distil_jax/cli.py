"""The command line: finds the verb, parses its arguments, runs it, and turns its errors into an exit status.

0: done; 2: bad input; 3: the run diverged; 4: the machine failed; 75: stopped on request after saving a checkpoint, so
start it again to go on; 130 and 143: ended by Ctrl-C or SIGTERM, nothing was saved; 141: the reader of the output is
gone.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from distil_jax import __version__
from distil_jax.runtime import exit_codes, signals
from distil_jax.runtime.allocator import keep_freed_memory
from distil_jax.schema import InputError

# Each verb is a module of `distil_jax.commands` with add_arguments(parser) and run(arguments). Only the module that is
# needed is imported.
_VERBS = {
    "demo": "distil a small student on this machine, from an embedded teacher, in minutes",
    "prepare": "turn text into packed rows of tokens",
    "train": "train a student, or resume its run",
    "plan": "compile a run for TPUs without having one: does it fit, and how fast can it be?",
    "bench": "time the step, the loss, the data loader and the encoders, next to PyTorch if you like",
    "eval": "evaluate a run or a model folder on held-out text, or on a task",
    "export": "write a run's student as a folder that `transformers` opens",
    "finetune": "fine-tune an encoder on a task, with or without a fine-tuned teacher",
    "compare": "fine-tune a teacher and its students on tasks, and compare scores, size and speed",
    "report": "write report.md and report.html for runs",
    "doctor": "check the machine, and the files of a run",
}
_COMPLETION = "--print-completion"
# A full, broken or read-only disk, or too many open files: the machine is to blame, whatever the command was doing.
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE)
# With a file name: a path that the user gave cannot be used.
_PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status."""
    # We read models without PyTorch, so keep transformers from warning that it is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    chosen, rest = _split(list(sys.argv[1:] if arguments is None else arguments))
    command = importlib.import_module(f"distil_jax.commands.{chosen}")
    summary = _VERBS[chosen]
    parser = argparse.ArgumentParser(prog=f"distil-jax {chosen}", description=summary[0].upper() + summary[1:])
    command.add_arguments(parser)

    try:
        command.run(parser.parse_args(rest))
    except InputError as error:
        return _end(error, exit_codes.BAD_INPUT)
    except exit_codes.Diverged as error:
        return _end(error, exit_codes.DIVERGED)
    except exit_codes.MachineFailed as error:
        return _end(error, exit_codes.MACHINE_FAILED)
    except exit_codes.Stopped as error:
        return _end(error, exit_codes.STOPPED)
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS and not (error.filename and error.errno in _PATH_ERRORS):
            raise
        return _end_os_error(error)
    return 0


def program() -> NoReturn:
    """Runs `main` as the whole process, which Ctrl-C can end at any moment.

    If the machine failed, the process ends at once, because an orderly exit might wait for what failed.
    """
    signals.install()
    # Not for tokenising, where it would leave one memory arena, for which the tokenizer's threads would wait.
    if sys.argv[1:2] != ["prepare"] and sys.argv[1:3] != ["bench", "data"]:
        keep_freed_memory()
    try:
        try:
            status = main()
        finally:
            signals.wait_while_exiting()
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more on exit
        status = exit_codes.UNREAD
    if status == exit_codes.MACHINE_FAILED:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _is_unread(pipe: TextIO) -> bool:
    """Whether the reader has closed the pipe, as `head` does."""
    poll = select.poll()
    poll.register(pipe, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


class _CompletingParser(argparse.ArgumentParser):
    """A parser that says how to complete its arguments: as files, unless they are a choice or a number."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse, but shtab finds in the action how to complete it."""
        import shtab

        action = super().add_argument(*names, **settings)
        if action.nargs != 0 and action.choices is None and action.type is None and action.metavar != "KEY=VALUE":
            action.complete = shtab.FILE
        return action


class _PrintCompletion(argparse.Action):
    """Prints a script that completes verbs, flags and files in a shell, and exits. shtab makes it from all parsers."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: str, __: object = None) -> NoReturn:
        try:
            import shtab
        except ImportError:
            install = "needs shtab, which is not installed: pip install 'distil-jax[complete]'."
            parser.exit(exit_codes.BAD_INPUT, f"distil-jax: --print-completion {install}\n")
        whole = _CompletingParser(prog=parser.prog)
        verbs = whole.add_subparsers()
        for verb, summary in _VERBS.items():
            importlib.import_module(f"distil_jax.commands.{verb}").add_arguments(verbs.add_parser(verb, help=summary))
        print(shtab.complete(whole, shell))
        parser.exit()


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb and the arguments after it. Exits for --help, --version and an unknown verb."""
    width = max(map(len, _VERBS))
    parser = argparse.ArgumentParser(
        prog="distil-jax",
        usage="distil-jax [--version] [--help] [--print-completion SHELL] VERB ...",
        description="Distils BERT-like encoders into small, fast students with JAX.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:{width}}  {text}" for verb, text in _VERBS.items())
        + "\n\n`distil-jax VERB --help` shows a verb's arguments. For completion with the TAB key:\n"
        "  distil-jax --print-completion bash > ~/.distil-jax-completion\n"
        "  echo 'source ~/.distil-jax-completion' >> ~/.bashrc",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distil-jax {__version__}")
    shells = ("bash", "zsh", "fish", "tcsh")
    parser.add_argument(_COMPLETION, choices=shells, action=_PrintCompletion, help="print a script for TAB, and exit")
    parser.add_argument("verb", choices=list(_VERBS), metavar="VERB", help="what to do")
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(exit_codes.BAD_INPUT)
    chosen = parser.parse_args(arguments[: 2 if arguments[:1] == [_COMPLETION] else 1]).verb
    return chosen, arguments[1:]


def _end_os_error(error: OSError) -> int:
    if error.errno in _PATH_ERRORS:
        sentence = f"{error.filename} cannot be used ({error.strerror}): name another, or change its permissions."
        return _end(sentence, exit_codes.BAD_INPUT)
    where = f" at {error.filename}" if error.filename else ""
    return _end(f"The machine failed{where} ({error.strerror}): fix that and start again.", exit_codes.MACHINE_FAILED)


def _end(error: Exception | str, status: int) -> int:
    """Prints an error and returns the exit status."""
    signals.wait_while_exiting()
    exit_codes.print_error(error)
    return status
