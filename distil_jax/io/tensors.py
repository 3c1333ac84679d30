"""Finds a model folder, here or on the hub, opens its weights safely, and reads them one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distil_jax.files import TOKENIZER_FILES
from distil_jax.schema import InputError, user_path

SINGLE, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"

# Files by which a folder is known not to be a model, and what to tell the user.
_NO_MODELS = {
    "adapter_config.json": "it is a PEFT adapter; merge it into its model (merge_and_unload) and save that",
    "manifest.json": "it holds prepared rows; name the model's folder",
    "config.toml": "it is a run; write its model with `distil-jax export`, and name that",
}
_WEIGHTS = (SINGLE, INDEX, PICKLE)
_POINTER = b"version https://git-lfs"  # how a Git LFS pointer file begins
_OTHER_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".ckpt", ".pt", ".pth", ".onnx")

_LARGEST_JSON = 64 * 2**20  # bytes; an index of a thousand files is smaller
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its shape and dtype are known, and its values are read on demand.

    Attributes:
      dtype: "float32", "float16", "bfloat16", or the file's own name for any other.
      read: returns the values as float32.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def local_folder(name: str | Path) -> Path:
    """The folder `name`, or the local copy of the hub's model of that name, which is downloaded if it is not cached.

    Raises:
      InputError: neither exists, the folder is not a model's, or the hub cannot be reached.
    """
    folder = user_path(name)
    if folder.is_dir():
        _check_model(folder)
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file: give the folder that holds config.json and the weights.")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: of whichever HTTP client it uses

    wanted = ["config.json", "model*.safetensors", INDEX, *TOKENIZER_FILES]
    try:
        copy = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=wanted))
        if not (copy / SINGLE).exists() and not (copy / INDEX).exists():  # only then are pickled weights downloaded
            copy = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=[*wanted, PICKLE]))
    except (OSError, HFValidationError, HTTPError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"There is no folder {folder}, and no model of that name came from the Hugging Face hub ({reason}): "
            "check the path, or the name and the network."
        ) from error
    return copy


def _check_model(folder: Path) -> None:
    """Refuses a folder without config.json. The message says what it is instead, or names a model inside it."""
    if (folder / "config.json").exists():
        return
    hints = [what for marker, what in _NO_MODELS.items() if (folder / marker).exists()]
    configs = (*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json"))
    inside = sorted(str(path.parent) for path in configs if any((path.parent / name).exists() for name in _WEIGHTS))
    hints += [f"give the one in it, {' or '.join(inside[:3])}"] if inside else ["name a folder that has"]
    raise InputError(f"{folder} has no config.json, so it is no model: {hints[0]}.")


def check_no_pointer(path: Path) -> None:
    """Refuses the small file that Git leaves in place of a large one that it has not fetched."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{path} is not the file itself but a pointer of Git LFS: run `git lfs pull` in its folder."
            )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      InputError: the file cannot be read, or is not a JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError("it is larger than any real one")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror}): is this the folder of a model?") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not text at all
        check_no_pointer(path)
        raise InputError(f"{path} is not valid JSON ({error}): download or export it again.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(values).__name__}: download or export it again.")
    return values


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Tensor]]:
    """All tensors of a model folder by name. They can be read until the context ends.

    The weights are one safetensors file, or several with an index, or a `pytorch_model.bin`. Only the last one needs
    torch; it is read with `weights_only`, so that it cannot run code.

    Raises:
      InputError: no weights, a damaged file, an index that names files outside the folder, or torch is missing.
    """
    with contextlib.ExitStack() as stack:
        if (folder / SINGLE).exists():
            yield _open_safetensors(folder / SINGLE, stack)
        elif (folder / INDEX).exists():
            yield _open_sharded(folder / INDEX, stack)
        elif (folder / PICKLE).exists():
            yield _open_pickle(folder / PICKLE)
        else:
            others = sorted(file.name for file in folder.iterdir() if file.suffix in _OTHER_WEIGHTS)
            raise InputError(
                f"{folder} holds no weights that are read here: it needs {SINGLE}, {INDEX} with its files, or {PICKLE}"
                + (f", and has {', '.join(others[:3])}: save it again with save_pretrained()." if others else ".")
            )


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    check_no_pointer(path)
    if zipfile.is_zipfile(path):
        raise InputError(f"{path} is a PyTorch file under another name: rename it to {PICKLE}.")
    try:
        file = stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): download or export it again.") from error

    def tensor(name: str) -> Tensor:
        header = file.get_slice(name)
        dtype = header.get_dtype()
        return Tensor(
            tuple(header.get_shape()),
            _FLOATS.get(dtype, dtype),
            lambda: np.asarray(file.get_tensor(name), np.float32),
        )

    names = file.keys()
    return {name: tensor(name) for name in names}


def _open_sharded(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(shard, str) for shard in files.values()):
        raise InputError(f"{path} has no weight_map from tensors to files: download or export it again.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(files.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(
                f"{path} names the file {shard!r}, but may only name safetensors files of its own folder: "
                "do not trust this folder; get it from its author again."
            )
        if not (path.parent / shard).is_file():
            raise InputError(f"{path} names {shard}, which is not there: download or copy it too.")
        opened = _open_safetensors(path.parent / shard, stack)
        if twice := sorted(tensors.keys() & opened.keys()):
            raise InputError(f"{twice[0]} is in several files of {path.parent}: download or export it again.")
        tensors |= opened
    if lost := sorted(files.keys() - tensors.keys()):
        raise InputError(f"{path} names {lost[0]}, which its file does not hold: download or export it again.")
    return tensors


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"Reading {path} needs PyTorch: install it (pip install torch), or convert the file to {SINGLE}."
        ) from error
    import pickle
    import struct

    check_no_pointer(path)
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":  # a safetensors file begins with 8 bytes of length and a header in JSON
            raise InputError(f"{path} is a safetensors file under another name: rename it to {SINGLE}.")
    # Truncated and altered files have made unpickling fail in each of these ways.
    damage = (pickle.UnpicklingError, struct.error, RuntimeError, OSError, EOFError, ValueError, LookupError)
    damage += (AssertionError, AttributeError, TypeError)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except damage as error:
        reason = f" ({str(error).strip().partition(chr(10))[0].rstrip('.')})"
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's message advises to load the file unsafely
            reason = ""
        raise InputError(
            f"{path} is damaged or holds more than weights, which is not read because it could run code{reason}: "
            f"get the model as {SINGLE}, or save its state_dict()."
        ) from error

    def ordinary(value: Any) -> bool:
        """Whether it is a tensor with all its values in memory; with strides of 0, a small file can claim any size."""
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        return dense and value.untyped_storage().nbytes() >= value.nbytes

    named = isinstance(values, dict) and all(isinstance(name, str) for name in values)
    if not named or not all(ordinary(value) for value in values.values()):
        raise InputError(f"{path} must hold one dictionary of tensors (a state_dict): save the model's state_dict().")

    def tensor(value: torch.Tensor) -> Tensor:
        return Tensor(
            tuple(value.shape),
            str(value.dtype).removeprefix("torch."),
            lambda: value.detach().to(torch.float32).numpy(),
        )

    return {name: tensor(value) for name, value in values.items()}
