"""Checkpoints of a run: the state, and beside it a little metadata. Orbax writes arrays and stays in this file.

`checkpoints/STEP/` holds what Orbax wrote, in `state/`, and `manifest.json`: the metadata, the shape of every array,
and size and sha256 of every file, under a sha256 of its own. All of it is written in a folder with another name and
renamed last, so a checkpoint is there whole or not at all, and whatever damages one afterwards is found before it is
used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from distil_jax.io import orbax_noise
from distil_jax.schema import InputError, build, require

orbax_noise.silence()

FORMAT = 2  # of the manifest; a reader refuses any other
_MANIFEST, _ARRAYS = "manifest.json", "state"
_STEP = re.compile("0|[1-9][0-9]{0,17}")  # the name of a checkpoint's folder
_LARGEST_MANIFEST = 64 * 2**20  # bytes; a real one has some thousand
_ROOM = 1.25  # free bytes that a save needs for each byte of its arrays
# How TensorStore begins what it says of its files; it raises ValueError for them, as a mistake in the program would.
_OF_TENSORSTORE = re.compile(r"[A-Z_]+: .*(in OCDBT database|at local file|os_error_code=)", re.DOTALL)
# Of an array that several devices hold, each writes a slice, and Orbax compiles a program for every one: before the
# first save of 80 small shapes on 8 devices that took 38 s, and 0.2 s where slices below this many bytes are not cut.
_LEAST_SLICE = 2**20


@dataclass(frozen=True)
class _File:
    path: str  # inside the checkpoint, with forward slashes
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        name = PurePosixPath(self.path)
        outside = name.is_absolute() or ".." in name.parts or "\0" in self.path
        require(not outside, f"{self.path!r} is no file of the checkpoint.")


@dataclass(frozen=True)
class _Manifest:
    format: int
    step: int
    score: float | None  # the criterion, the lower the better; on disk it has always been called so
    facts: dict  # the metadata, likewise
    arrays: dict  # path -> dtype and shape, see `_described`
    files: tuple[_File, ...]

    def __post_init__(self) -> None:
        require(all(isinstance(value, str) for value in self.arrays.values()), "arrays must hold texts.")


class Checkpoints:
    """The checkpoints of one run folder, by step.

    Of several processes, all make the same calls in the same order; the first one alone renames, seals and removes.

    Args:
      folder: made by the first save.
      keep: how many of the newest stay, and besides them the best; None: only to read, and nothing on disk changes.

    Attributes:
      failure: why the newest save did not succeed, or None.
    """

    def __init__(self, folder: str | Path, *, keep: int | None = None) -> None:
        self._folder, self._keep = Path(folder).absolute(), keep
        self._first = jax.process_index() == 0
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_SLICE)
        handlers = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers))
        self._sealer, self._sealing = ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), None
        self._found_damaged: set[int] = set()
        self.failure: str | None = None
        if keep is not None:
            if self._first:
                for left in (*self._folder.glob(".saving-*"), *self._folder.glob(".retired-*")):
                    shutil.rmtree(left)  # by a process that was killed
            self._meet("what a killed process left is gone")

    def steps(self) -> list[int]:
        """The steps that have a folder, whole or damaged, in order."""
        return sorted(int(path.name) for path in self._folder.glob("*") if path.is_dir() and _STEP.fullmatch(path.name))

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of `step`; these alone are read and checked.

        Raises:
          InputError: damaged, or not there.
        """
        return self._manifest(step).facts

    def verify(self, step: int) -> dict[str, Any]:
        """Reads every file of a checkpoint, compares it with its checksum, and returns the metadata.

        Raises:
          InputError: damaged, or not there.
        """
        manifest = self._manifest(step)
        for file in manifest.files:
            path = self._folder / str(step) / file.path
            try:
                same = path.stat().st_size == file.bytes and _sha256(path) == file.sha256
            except OSError as error:
                raise self._damaged(step, f"{file.path} cannot be read: {error.strerror}") from error
            if not same:
                raise self._damaged(step, f"{file.path} has changed since it was written")
        return manifest.facts

    def newest_valid(self) -> tuple[int | None, list[str]]:
        """The newest step that passes `verify`, and what is wrong with those that are newer.

        None where there is no checkpoint at all. Only the first process looks; it alone can say what is wrong.

        Raises:
          InputError: there are some, and none is valid.
        """
        found, problems, damaged = self._first_valid(reversed(self.steps()))
        if found is None and damaged:
            reason = " ".join(problems) or "The first process says why."
            raise InputError(
                f"None of the checkpoints in {self._folder} is valid: put a copy of one back, or name a new run folder "
                f"to begin again; nothing was changed. {reason}"
            )
        return found, problems

    def best_valid(self) -> tuple[int | None, list[str]]:
        """The step with the best criterion among those that pass `verify`, and what is wrong with better ones.

        None where no valid checkpoint has one. Only the first process looks, as for `newest_valid`.
        """
        criteria = self._criteria()
        found, problems, _ = self._first_valid(sorted(criteria, key=criteria.get))
        return found, problems

    def best(self) -> tuple[int | None, float]:
        """The step with the best criterion, and that, as the first process sees them; (None, inf) where there is none.

        A save that is under way counts: it is waited for. Files are not read; what `verify` has found damaged, or
        whose manifest is, does not count.
        """
        self.wait()
        criteria = self._criteria() if self._first else {}
        found = self._same(min(criteria, key=criteria.get, default=None))
        return found, math.inf if found is None else self._manifest(found).score

    def set_aside_after(self, step: int) -> list[str]:
        """Renames every checkpoint later than `step`, so that the run can write these steps again; the new names."""
        later, moved = [number for number in self.steps() if number > step], []
        self._meet("all have seen the checkpoints that are set aside")
        for number in later if self._first else ():
            moved.append(f"{number}.set-aside-{time.time_ns()}")
            (self._folder / str(number)).rename(self._folder / moved[-1])
        self._meet("later checkpoints are set aside")
        return moved

    def save(self, step: int, arrays: Any, metadata: dict[str, Any], *, criterion: float | None = None) -> None:
        """Starts a save and returns; it appears whole or not at all, and `failure` says if it does not.

        Args:
          step: its name; a step that is already there is left as it is.
          arrays: a tree of arrays.
          metadata: plain values.
          criterion: of the state, where it is known: the lower the better. The checkpoint with the best is never
            removed. One that is not finite is none.
        """
        self.wait()
        if step in self.steps():
            return
        draft = self._folder / f".saving-{step}"
        try:
            self._make(draft, sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)))
            self._checkpointer.save(draft / _ARRAYS, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            if not _is_of_disk(error):
                raise
            self._fail(step, error)
            return
        self._found_damaged.discard(step)  # that one has been set aside
        criterion = criterion if criterion is not None and math.isfinite(criterion) else None
        self._sealing = (step, self._sealer.submit(self._seal, step, metadata, _described(arrays), criterion))

    def saving(self) -> bool:
        """Whether a save that was started is not on disk yet; any thread may ask."""
        return any(self._folder.glob(".saving-*"))

    def check(self) -> None:
        """Takes note of a save that has ended meanwhile; call it at every step."""
        if self._sealing is not None and self._sealing[1].done():
            self.wait()

    def wait(self) -> None:
        """Until the save that was started is on disk, or has failed."""
        if self._sealing is None:
            return
        (step, future), self._sealing = self._sealing, None
        try:
            future.result()
            self.failure = None
        except Exception as error:
            if not _is_of_disk(error):
                raise
            self._fail(step, error)

    def restore(self, step: int, abstract: Any, *, partial: bool = False) -> Any:
        """The arrays of `step`, which should have passed `verify`.

        Args:
          step: one of `steps()`.
          abstract: a tree of `jax.ShapeDtypeStruct` with shardings: of any mesh, not only the one that saved.
          partial: whether `abstract` may lack some of what was saved, which is then not read.

        Raises:
          InputError: the checkpoint does not fit `abstract`, or is damaged.
        """
        saved, wanted = self._manifest(step).arrays, _described(abstract)
        if partial:
            saved = {name: described for name, described in saved.items() if name in wanted}
        if unlike := sorted(saved.items() ^ wanted.items()):
            name = unlike[0][0]
            raise InputError(
                f"Checkpoint {step} in {self._folder} does not fit this run: {name} is {saved.get(name, 'not there')} "
                f"and should be {wanted.get(name, 'absent')}: use the configuration it was written with."
            )
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        asked = ocp.args.PyTreeRestore(abstract, how, partial_restore=partial)
        try:
            return self._checkpointer.restore(self._folder / str(step) / _ARRAYS, args=asked)
        except Exception as error:
            if not _is_of_disk(error):
                raise
            raise self._damaged(step, " ".join(str(error).split())[:500]) from error

    def close(self) -> None:
        """Finishes what was started, and lets the folder go."""
        self.wait()
        self._sealer.shutdown()
        self._checkpointer.close()

    def _make(self, draft: Path, size: int) -> None:
        """The folder of a save, on a disk with room for it; where the first process refuses, all do."""
        refusal = None
        if self._first:
            try:
                draft.mkdir(parents=True)
                if shutil.disk_usage(draft).free < _ROOM * size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                refusal = error
        refused = refusal is not None
        if jax.process_count() > 1:
            refused = bool(multihost_utils.broadcast_one_to_all(np.array(refused)))
        if refused:
            raise refusal or OSError("the first process says why")

    def _seal(self, step: int, metadata: dict[str, Any], arrays: dict[str, str], criterion: float | None) -> None:
        """In a thread: once the arrays of all processes are written, the manifest, the name, and what is too old."""
        self._checkpointer.wait_until_finished()
        if not self._first:
            return
        draft = self._folder / f".saving-{step}"
        files = [
            {"path": path.relative_to(draft).as_posix(), "bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        ]
        body = {"format": FORMAT, "step": step, "score": criterion, "facts": metadata, "arrays": arrays, "files": files}
        with (draft / _MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump({"sha256": _digest(body), "body": body}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.rename(self._folder / str(step))
        self._retire()

    def _retire(self) -> None:
        """Removes what is neither among the newest nor the best; a damaged checkpoint counts for nothing and stays."""
        whole, criteria = self._whole(), self._criteria()
        best = min(criteria, key=criteria.get, default=None)
        for step in sorted(whole)[: -self._keep]:
            if step != best:
                shutil.rmtree((self._folder / str(step)).rename(self._folder / f".retired-{step}"))

    def _criteria(self) -> dict[int, float]:
        """The criterion of each whole checkpoint that has one, in order."""
        return {step: criterion for step, criterion in self._whole().items() if criterion is not None}

    def _whole(self) -> dict[int, float | None]:
        """The criteria of the checkpoints whose manifests are whole, and of which nothing was found to be damaged."""
        found = {}
        for step in self.steps():
            with contextlib.suppress(InputError):
                found[step] = self._manifest(step).score
        return {step: criterion for step, criterion in found.items() if step not in self._found_damaged}

    def _first_valid(self, steps: Iterable[int]) -> tuple[int | None, list[str], bool]:
        """The first of these steps that passes `verify`, what is wrong with those before, and whether there are any."""
        found, problems = None, []
        for step in steps if self._first else ():
            try:
                self.verify(step)
            except InputError as error:
                problems.append(str(error))
            else:
                found = step
                break
        return self._same(found), problems, self._same(1 if problems else None) is not None

    def _same(self, step: int | None) -> int | None:
        """The first process's, in every process."""
        if jax.process_count() == 1:
            return step
        told = int(multihost_utils.broadcast_one_to_all(np.array(-1 if step is None else step)))
        return None if told < 0 else told

    def _fail(self, step: int, error: Exception) -> None:
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        of_system = re.search(r"os_error_code='(\d+)'", said)  # at the end of a long story of TensorStore's
        reason = os.strerror(int(of_system[1])) if of_system else said[:300]
        self.failure = f"the checkpoint of step {step} could not be saved ({reason})"
        if self._first:  # half of one only fills the disk further
            shutil.rmtree(self._folder / f".saving-{step}", ignore_errors=True)

    def _manifest(self, step: int) -> _Manifest:
        """Checked in itself; the files that it lists are not."""
        path = self._folder / str(step) / _MANIFEST
        try:
            require(path.stat().st_size <= _LARGEST_MANIFEST, f"{path} is too large to be one.")
            whole = json.loads(path.read_text(encoding="utf-8"))
            manifest = build(_Manifest, _with_numbers(whole["body"]))
            intact = _digest(whole["body"]) == whole["sha256"] and (manifest.format, manifest.step) == (FORMAT, step)
        except OSError as error:
            raise self._damaged(step, f"{_MANIFEST} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(step, f"{_MANIFEST} is no manifest") from error
        if not intact:
            raise self._damaged(step, f"{_MANIFEST} has changed since it was written")
        return manifest

    def _damaged(self, step: int, reason: str) -> InputError:
        self._found_damaged.add(step)
        return InputError(f"Checkpoint {step} in {self._folder} is damaged ({reason}).")

    def _meet(self, where: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(where)


def _is_of_disk(error: BaseException) -> bool:
    """Whether a disk, its file system or TensorStore above them failed; anything else is a mistake in the program."""
    said = isinstance(error, ValueError) and _OF_TENSORSTORE.match(str(error))
    below = error.__cause__ is not None and _is_of_disk(error.__cause__)
    return isinstance(error, OSError) or bool(said) or below


def _described(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of every array, for people and for comparison."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _with_numbers(body: dict[str, Any]) -> dict[str, Any]:
    """A manifest's body, without a score that is no number: they were written down once."""
    score = body["score"]
    return body | {"score": None} if isinstance(score, float) and not math.isfinite(score) else body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
