"""Checkpoints of a run: arrays, which Orbax writes, and a little metadata. Only this file knows of Orbax.

`checkpoints/STEP/` has two parts. `state/` is Orbax's. `manifest.json` holds the metadata, the dtype and shape of every
array, the size and SHA-256 of every file, and a SHA-256 of all this. A checkpoint is written under another name and
renamed last, so it appears complete or not at all. Damage done to it later is noticed before it is used.
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

FORMAT = 2  # the manifest's version; no other can be read
_MANIFEST, _ARRAYS = "manifest.json", "state"
_STEP = re.compile("0|[1-9][0-9]{0,17}")  # the name of a checkpoint's folder
_LARGEST_MANIFEST = 64 * 2**20  # bytes; a real one has some thousands
_ROOM = 1.25  # bytes that must be free on disk for each byte of arrays to save
# TensorStore's messages about files. It raises ValueError for them, as bugs do, so only the text tells them apart.
_TENSORSTORE_ERROR = re.compile(r"[A-Z_]+: .*(in OCDBT database|at local file|os_error_code=)", re.DOTALL)
# An array that several devices hold can be written in slices, one by each device. Orbax compiles a program for every
# shape of slice, which takes longer than the slices save if arrays are small. So slices have at least so many bytes.
_LEAST_SLICE = 2**20


@dataclass(frozen=True)
class _File:
    path: str  # inside the checkpoint, with forward slashes
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        name = PurePosixPath(self.path)
        outside = name.is_absolute() or ".." in name.parts or "\0" in self.path
        require(not outside, f"{self.path!r} is not a file of the checkpoint.")


@dataclass(frozen=True)
class _Manifest:
    format: int
    step: int
    score: float | None  # the criterion; this and the next are the names on disk
    facts: dict  # the metadata
    arrays: dict  # path -> dtype and shape, see `_described`
    files: tuple[_File, ...]

    def __post_init__(self) -> None:
        require(all(isinstance(value, str) for value in self.arrays.values()), "The values of arrays must be strings.")


class Checkpoints:
    """The checkpoints of one run folder, by step.

    A checkpoint may have a criterion, by which evaluations are compared: the lower the better. With several processes,
    all must make the same calls in the same order; only the first process renames and removes folders.

    Args:
      folder: made by the first save.
      keep: how many of the newest checkpoints stay, besides the best one. None: only for reading; nothing is removed.

    Attributes:
      failure: why the last save failed, or None.
    """

    def __init__(self, folder: str | Path, *, keep: int | None = None) -> None:
        self._folder, self._keep = Path(folder).absolute(), keep
        self._first = jax.process_index() == 0
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_SLICE)
        handlers = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers))
        self._sealer, self._sealing = ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), None
        self._damaged_steps: set[int] = set()
        self.failure: str | None = None
        if keep is not None:
            if self._first:  # a killed process may have left these
                for leftover in (*self._folder.glob(".saving-*"), *self._folder.glob(".retired-*")):
                    shutil.rmtree(leftover)
            self._barrier("leftovers of a killed process are removed")

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, damaged or not, in ascending order."""
        return sorted(int(path.name) for path in self._folder.glob("*") if path.is_dir() and _STEP.fullmatch(path.name))

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata saved with `step`. Only the manifest is read and checked.

        Raises:
          InputError: the manifest is damaged or missing.
        """
        return self._manifest(step).facts

    def verify(self, step: int) -> dict[str, Any]:
        """Compares every file of a checkpoint with its checksum, and returns the metadata.

        Raises:
          InputError: the checkpoint is damaged or missing.
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
        """The newest step that passes `verify`, and what is wrong with the newer ones.

        The step is None if there is no checkpoint at all. Only the first process reads the files and returns problems;
        every process gets the step.

        Raises:
          InputError: there are checkpoints, but none is valid.
        """
        newest, problems, damaged = self._first_valid(reversed(self.steps()))
        if newest is None and damaged:
            reason = " ".join(problems) or "The first process says why."
            raise InputError(
                f"None of the checkpoints in {self._folder} is valid: restore one from a copy, or name a new run "
                f"folder to begin again; nothing was changed. {reason}"
            )
        return newest, problems

    def best_valid(self) -> tuple[int | None, list[str]]:
        """The step with the best criterion among those that pass `verify`, and what is wrong with better ones.

        The step is None if no valid checkpoint has a criterion. Processes share the work as in `newest_valid`.
        """
        criteria = self._criteria()
        best, problems, _ = self._first_valid(sorted(criteria, key=criteria.get))
        return best, problems

    def best(self) -> tuple[int | None, float]:
        """The step with the best criterion, and that criterion; (None, inf) if no checkpoint has one.

        Waits for a running save. Reads manifests only, and leaves out the checkpoints that are already known to be
        damaged.
        """
        self.wait()
        criteria = self._criteria() if self._first else {}
        best = self._from_first(min(criteria, key=criteria.get, default=None))
        return best, math.inf if best is None else self._manifest(best).score

    def set_aside_after(self, step: int) -> list[str]:
        """Renames the checkpoints after `step`, so that the run can save these steps again.

        Returns:
          The new names, on the first process.
        """
        new_names = []
        later = [saved for saved in self.steps() if saved > step]
        self._barrier("all processes have listed the checkpoints to set aside")
        for saved in later if self._first else ():
            new_names.append(f"{saved}.set-aside-{time.time_ns()}")
            (self._folder / str(saved)).rename(self._folder / new_names[-1])
        self._barrier("later checkpoints are set aside")
        return new_names

    def save(self, step: int, arrays: Any, metadata: dict[str, Any], *, criterion: float | None = None) -> None:
        """Starts a save in the background. If it fails, `failure` says why, and there is no such checkpoint.

        Args:
          step: the step of the state; if it already has a checkpoint, nothing is saved.
          arrays: a tree of arrays.
          metadata: plain values, as JSON has them.
          criterion: of the state's evaluation, the lower the better; None if there was none. The checkpoint with the
            best criterion is never removed. A criterion that is not finite counts as None.
        """
        self.wait()
        if step in self.steps():
            return
        draft = self._folder / f".saving-{step}"
        try:
            self._make(draft, sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)))
            self._checkpointer.save(draft / _ARRAYS, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            if not _is_disk_error(error):
                raise
            self._fail(step, error)
            return
        self._damaged_steps.discard(step)  # a damaged checkpoint of this step was set aside
        criterion = criterion if criterion is not None and math.isfinite(criterion) else None
        self._sealing = (step, self._sealer.submit(self._seal, step, metadata, _described(arrays), criterion))

    def saving(self) -> bool:
        """Whether a save is still being written. Any thread may call this."""
        return any(self._folder.glob(".saving-*"))

    def check(self) -> None:
        """Updates `failure` if a save has ended, without waiting for one; call it at every step."""
        if self._sealing is not None and self._sealing[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save has ended, and updates `failure`."""
        if self._sealing is None:
            return
        (step, future), self._sealing = self._sealing, None
        try:
            future.result()
            self.failure = None
        except Exception as error:
            if not _is_disk_error(error):
                raise
            self._fail(step, error)

    def restore(self, step: int, abstract: Any, *, partial: bool = False) -> Any:
        """Reads the arrays of `step`. The files are not checked again: call `verify` first.

        Args:
          step: one of `steps()`.
          abstract: a tree of `jax.ShapeDtypeStruct` with shardings, on the mesh that saved the arrays or another one.
          partial: whether `abstract` may lack some of the saved arrays, which are then not read.

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
                f"and should be {wanted.get(name, 'absent')}: use the configuration it was saved with."
            )
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        request = ocp.args.PyTreeRestore(abstract, restore_args, partial_restore=partial)
        try:
            return self._checkpointer.restore(self._folder / str(step) / _ARRAYS, args=request)
        except Exception as error:
            if not _is_disk_error(error):
                raise
            raise self._damaged(step, " ".join(str(error).split())[:500]) from error

    def close(self) -> None:
        """Waits for the last save and frees Orbax's threads."""
        self.wait()
        self._sealer.shutdown()
        self._checkpointer.close()

    def _make(self, draft: Path, size: int) -> None:
        """Makes the folder for a save of `size` bytes.

        Raises:
          OSError: on every process, if the first one cannot make it or the disk has too little room.
        """
        failure = None
        if self._first:
            try:
                draft.mkdir(parents=True)
                if shutil.disk_usage(draft).free < _ROOM * size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                failure = error
        if self._from_first(int(failure is not None)):
            raise failure or OSError("the first process says why")

    def _seal(self, step: int, metadata: dict[str, Any], arrays: dict[str, str], criterion: float | None) -> None:
        """In a thread: waits for every process's arrays, writes the manifest, renames the folder, removes old ones."""
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
        """Removes checkpoints that are neither the best nor among the newest. Damaged ones stay and do not count."""
        whole, criteria = self._whole(), self._criteria()
        best = min(criteria, key=criteria.get, default=None)
        for step in sorted(whole)[: -self._keep]:
            if step != best:
                shutil.rmtree((self._folder / str(step)).rename(self._folder / f".retired-{step}"))

    def _criteria(self) -> dict[int, float]:
        """Step -> criterion, of the undamaged checkpoints that have one, in ascending order of steps."""
        return {step: criterion for step, criterion in self._whole().items() if criterion is not None}

    def _whole(self) -> dict[int, float | None]:
        """Step -> criterion or None, of the checkpoints with an intact manifest that are not known to be damaged."""
        criteria = {}
        for step in self.steps():
            with contextlib.suppress(InputError):
                criteria[step] = self._manifest(step).score
        return {step: criterion for step, criterion in criteria.items() if step not in self._damaged_steps}

    def _first_valid(self, steps: Iterable[int]) -> tuple[int | None, list[str], bool]:
        """The first of these steps that passes `verify`, the problems of those before it, and whether any has one.

        Only the first process verifies and returns problems; the other two results are the same on all of them.
        """
        valid, problems = None, []
        for step in steps if self._first else ():
            try:
                self.verify(step)
            except InputError as error:
                problems.append(str(error))
            else:
                valid = step
                break
        return self._from_first(valid), problems, bool(self._from_first(len(problems)))

    def _from_first(self, number: int | None) -> int | None:
        """The first process's number, on every process; it is not negative, or None."""
        if jax.process_count() == 1:
            return number
        first = int(multihost_utils.broadcast_one_to_all(np.array(-1 if number is None else number)))
        return None if first < 0 else first

    def _fail(self, step: int, error: Exception) -> None:
        message = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        os_error = re.search(r"os_error_code='(\d+)'", message)  # at the end of TensorStore's long messages
        reason = os.strerror(int(os_error[1])) if os_error else message[:300]
        self.failure = f"the checkpoint of step {step} could not be saved ({reason})"
        if self._first:  # an unfinished checkpoint only takes up space
            shutil.rmtree(self._folder / f".saving-{step}", ignore_errors=True)

    def _manifest(self, step: int) -> _Manifest:
        """The manifest of `step`, checked against its own checksum. The files that it lists are not read.

        Raises:
          InputError: it is missing or damaged.
        """
        path = self._folder / str(step) / _MANIFEST
        try:
            require(path.stat().st_size <= _LARGEST_MANIFEST, f"{path} is too large to be a manifest.")
            whole = json.loads(path.read_text(encoding="utf-8"))
            manifest = build(_Manifest, _with_finite_score(whole["body"]))
            intact = _digest(whole["body"]) == whole["sha256"] and (manifest.format, manifest.step) == (FORMAT, step)
        except OSError as error:
            raise self._damaged(step, f"{_MANIFEST} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(step, f"{_MANIFEST} is not a manifest") from error
        if not intact:
            raise self._damaged(step, f"{_MANIFEST} has changed since it was written")
        return manifest

    def _damaged(self, step: int, reason: str) -> InputError:
        """Notes that a checkpoint is damaged, and returns the error to raise."""
        self._damaged_steps.add(step)
        return InputError(f"Checkpoint {step} in {self._folder} is damaged ({reason}).")

    def _barrier(self, name: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)


def _is_disk_error(error: BaseException) -> bool:
    """Whether the disk, the file system or TensorStore failed; anything else is a bug."""
    from_tensorstore = isinstance(error, ValueError) and _TENSORSTORE_ERROR.match(str(error))
    has_such_cause = error.__cause__ is not None and _is_disk_error(error.__cause__)
    return isinstance(error, OSError) or bool(from_tensorstore) or has_such_cause


def _described(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of every array, such as "float32[2, 3]"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _with_finite_score(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a manifest, with None for a score that is not finite, as earlier versions wrote it."""
    score = body["score"]
    return body | {"score": None} if isinstance(score, float) and not math.isfinite(score) else body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
