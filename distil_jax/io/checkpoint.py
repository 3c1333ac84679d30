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
# How TensorStore's messages about files begin; it raises ValueError for them, as a bug would.
_TENSORSTORE_ERROR = re.compile(r"[A-Z_]+: .*(in OCDBT database|at local file|os_error_code=)", re.DOTALL)
# Each device writes a slice of an array that several hold, and Orbax compiles a program for every slice shape. Slices
# below so many bytes are not cut, because compiling took most of the time of a first save of many small arrays.
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

    With several processes, all make the same calls in the same order; only the first renames, seals and removes.

    Args:
      folder: the first save makes it.
      keep: how many of the newest stay, besides the best; None: only for reading, nothing on disk changes.

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
            self._barrier("what a killed process left is gone")

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, whole or damaged, in ascending order."""
        return sorted(int(path.name) for path in self._folder.glob("*") if path.is_dir() and _STEP.fullmatch(path.name))

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata saved with `step`; only the manifest is read and checked.

        Raises:
          InputError: the checkpoint is damaged or missing.
        """
        return self._manifest(step).facts

    def verify(self, step: int) -> dict[str, Any]:
        """Reads every file of a checkpoint, compares it with its checksum, and returns the metadata.

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
        """The newest step that passes `verify`, and the problems of newer ones.

        None if there is no checkpoint at all. Only the first process reads files, and only it returns problems.

        Raises:
          InputError: there are checkpoints, and none is valid.
        """
        newest, problems, damaged = self._first_valid(reversed(self.steps()))
        if newest is None and damaged:
            reason = " ".join(problems) or "The first process says why."
            raise InputError(
                f"None of the checkpoints in {self._folder} is valid: put a copy of one back, or name a new run folder "
                f"to begin again; nothing was changed. {reason}"
            )
        return newest, problems

    def best_valid(self) -> tuple[int | None, list[str]]:
        """The step with the best criterion that passes `verify`, and the problems of better ones.

        None if no valid checkpoint has a criterion. Only the first process reads files, as for `newest_valid`.
        """
        criteria = self._criteria()
        best, problems, _ = self._first_valid(sorted(criteria, key=criteria.get))
        return best, problems

    def best(self) -> tuple[int | None, float]:
        """The step with the best criterion, and that criterion, on every process; (None, inf) without any.

        Waits for a save that is under way. Reads manifests only: checkpoints with a damaged one, or that `verify` has
        found damaged, do not count.
        """
        self.wait()
        criteria = self._criteria() if self._first else {}
        best = self._same(min(criteria, key=criteria.get, default=None))
        return best, math.inf if best is None else self._manifest(best).score

    def set_aside_after(self, step: int) -> list[str]:
        """Renames checkpoints later than `step`, so that the run can save these steps again; returns the new names."""
        later, moved = [number for number in self.steps() if number > step], []
        self._barrier("all have seen the checkpoints that are set aside")
        for number in later if self._first else ():
            moved.append(f"{number}.set-aside-{time.time_ns()}")
            (self._folder / str(number)).rename(self._folder / moved[-1])
        self._barrier("later checkpoints are set aside")
        return moved

    def save(self, step: int, arrays: Any, metadata: dict[str, Any], *, criterion: float | None = None) -> None:
        """Starts a save and returns; the checkpoint appears whole or not at all, and `failure` says why if it does not.

        Args:
          step: names the checkpoint; an existing one is left as it is.
          arrays: a tree of arrays.
          metadata: plain values.
          criterion: of the state, if it was evaluated: the lower the better. The checkpoint with the best one is never
            removed. A criterion that is not finite is ignored.
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
        self._found_damaged.discard(step)  # the damaged one has been set aside
        criterion = criterion if criterion is not None and math.isfinite(criterion) else None
        self._sealing = (step, self._sealer.submit(self._seal, step, metadata, _described(arrays), criterion))

    def saving(self) -> bool:
        """Whether a save is still being written; any thread may ask."""
        return any(self._folder.glob(".saving-*"))

    def check(self) -> None:
        """Updates `failure` if a save has ended; call it at every step."""
        if self._sealing is not None and self._sealing[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk, or has failed."""
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
          abstract: a tree of `jax.ShapeDtypeStruct` with shardings on any mesh, not only the one that saved.
          partial: whether `abstract` may lack arrays that were saved; those are not read.

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
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        request = ocp.args.PyTreeRestore(abstract, restore_args, partial_restore=partial)
        try:
            return self._checkpointer.restore(self._folder / str(step) / _ARRAYS, args=request)
        except Exception as error:
            if not _is_of_disk(error):
                raise
            raise self._damaged(step, " ".join(str(error).split())[:500]) from error

    def close(self) -> None:
        """Waits for the last save and frees Orbax's threads."""
        self.wait()
        self._sealer.shutdown()
        self._checkpointer.close()

    def _make(self, draft: Path, size: int) -> None:
        """Makes the folder of a save if the disk has room; if the first process cannot, all processes raise."""
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
        """In a thread: waits for the arrays of all processes, writes the manifest, renames, removes old checkpoints."""
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
        """Removes checkpoints that are neither among the newest nor the best; damaged ones stay and do not count."""
        whole, criteria = self._whole(), self._criteria()
        best = min(criteria, key=criteria.get, default=None)
        for step in sorted(whole)[: -self._keep]:
            if step != best:
                shutil.rmtree((self._folder / str(step)).rename(self._folder / f".retired-{step}"))

    def _criteria(self) -> dict[int, float]:
        """Step -> criterion of the checkpoints that are whole and have one, in ascending order."""
        return {step: criterion for step, criterion in self._whole().items() if criterion is not None}

    def _whole(self) -> dict[int, float | None]:
        """Step -> criterion or None, of checkpoints with a whole manifest that `verify` has not found damaged."""
        criteria = {}
        for step in self.steps():
            with contextlib.suppress(InputError):
                criteria[step] = self._manifest(step).score
        return {step: criterion for step, criterion in criteria.items() if step not in self._found_damaged}

    def _first_valid(self, steps: Iterable[int]) -> tuple[int | None, list[str], bool]:
        """The first of these steps that passes `verify`, the problems of those before it, and whether there are any."""
        valid, problems = None, []
        for step in steps if self._first else ():
            try:
                self.verify(step)
            except InputError as error:
                problems.append(str(error))
            else:
                valid = step
                break
        return self._same(valid), problems, self._same(1 if problems else None) is not None

    def _same(self, step: int | None) -> int | None:
        """The first process's step, on every process."""
        if jax.process_count() == 1:
            return step
        first = int(multihost_utils.broadcast_one_to_all(np.array(-1 if step is None else step)))
        return None if first < 0 else first

    def _fail(self, step: int, error: Exception) -> None:
        message = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        of_system = re.search(r"os_error_code='(\d+)'", message)  # at the end of a long message of TensorStore's
        reason = os.strerror(int(of_system[1])) if of_system else message[:300]
        self.failure = f"the checkpoint of step {step} could not be saved ({reason})"
        if self._first:  # half a checkpoint only fills the disk
            shutil.rmtree(self._folder / f".saving-{step}", ignore_errors=True)

    def _manifest(self, step: int) -> _Manifest:
        """The manifest of `step`, checked against its own checksum; the files that it lists are not read."""
        path = self._folder / str(step) / _MANIFEST
        try:
            require(path.stat().st_size <= _LARGEST_MANIFEST, f"{path} is too large to be one.")
            whole = json.loads(path.read_text(encoding="utf-8"))
            manifest = build(_Manifest, _with_finite_score(whole["body"]))
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

    def _barrier(self, where: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(where)


def _is_of_disk(error: BaseException) -> bool:
    """Whether the disk, its file system or TensorStore failed; anything else is a bug."""
    from_tensorstore = isinstance(error, ValueError) and _TENSORSTORE_ERROR.match(str(error))
    below = error.__cause__ is not None and _is_of_disk(error.__cause__)
    return isinstance(error, OSError) or bool(from_tensorstore) or below


def _described(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of every array, for people and for comparison."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _with_finite_score(body: dict[str, Any]) -> dict[str, Any]:
    """A manifest's body without a score that is not finite, which earlier versions wrote."""
    score = body["score"]
    return body | {"score": None} if isinstance(score, float) and not math.isfinite(score) else body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
