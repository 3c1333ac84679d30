"""Reads and writes model folders in the format of `transformers`, without PyTorch.

Nothing is guessed: `name_table.py` gives the name and shape of every tensor.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.files import check_free, tokenizer_files, whole_folder
from distil_jax.io.config_json import to_json
from distil_jax.io.model_tensors import Params, examine, examine_task, file_tensors
from distil_jax.io.name_table import leaves
from distil_jax.io.task_json import has_task_head, head_to_json
from distil_jax.io.tensors import SINGLE, check_no_pointer, local_folder, open_tensors, read_json
from distil_jax.schema import InputError

# Keys of a tokenizer_config.json with a path of the machine that wrote it. Nothing reads them.
_ORIGINS = ("name_or_path", "special_tokens_map_file", "tokenizer_file")


def load(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a BERT or DistilBERT, with or without its MLM head and pooler.

    Args:
      folder: a folder with config.json and weights, or a hub id.

    Returns:
      The architecture (`mlm_head` and `pooler` say what the file has), and the parameters: float32 NumPy arrays, layers
      stacked, the vocabulary padded with zeros. `jax.device_put` them once: a compiled step that gets NumPy arrays
      sends them to the device at every call.

    Raises:
      InputError: another kind of model, a damaged file, weights that are not tied, or tensors that are missing,
        unexpected or of another shape.
    """
    folder = local_folder(folder)
    with open_tensors(folder) as opened:
        config, tensors = examine(folder, opened)
        flat = {leaf.path: leaf.read(tensors) for leaf in leaves(config)}
    return config, traverse_util.unflatten_dict(flat, sep="/")


def load_task(folder: str | Path) -> tuple[ModelConfig, HeadConfig, dict[str, Any]]:
    """Reads a BERT or DistilBERT with a head for sequences, tokens or spans.

    Args:
      folder: a folder with config.json and weights, or a hub id, of a `...ForSequenceClassification`,
        `...ForTokenClassification` or `...ForQuestionAnswering`.

    Returns:
      The encoder, the head on it, and the parameters of their `TaskModel`: float32 NumPy arrays as from `load`.

    Raises:
      InputError: as `load`; or another kind of head, or a config.json that contradicts itself.
    """
    folder = local_folder(folder)
    with open_tensors(folder) as opened:
        config, head, tensors = examine_task(folder, opened)
        flat = {leaf.path: leaf.read(tensors) for leaf in leaves(config, head)}
    return config, head, traverse_util.unflatten_dict(flat, sep="/")


def has_task(folder: str | Path) -> bool:
    """Whether the config.json of a folder or hub id names a model with a task's head."""
    folder = local_folder(folder)
    return has_task_head(read_json(folder / "config.json"))


def read_config(folder: str | Path) -> ModelConfig:
    """The architecture that `load` would return, after the same checks, without the parameters."""
    folder = local_folder(folder)
    with open_tensors(folder) as opened:
        return examine(folder, opened)[0]


def save(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: str | Path | None = None,
    card: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Writes a folder that `transformers` opens with no tensor missing, unexpected or untied.

    A model without token types is written as a DistilBERT, and any other as a BERT. `BertForMaskedLM` has no pooler, so
    a BERT with an MLM head is written without its pooler. A BERT with neither is written as a `BertModel`, which
    `transformers` opens completely with `add_pooling_layer=False`.

    Args:
      folder: must not exist, or be empty; it appears complete or not at all.
      config: the architecture.
      params: as `load` returns them, NumPy or jax arrays.
      tokenizer: a folder whose tokenizer files are copied; its `model_max_length` becomes at most the positions.
      card: the text of README.md.
      dtype: of the parameters on disk.

    Raises:
      InputError: the folder is not empty, `transformers` has no such model, the parameters do not fit the config, some
        are not finite in `dtype`, or the tokenizer's folder has no tokenizer.
    """
    _check_target(folder, dtype)
    if config.mlm_head and config.pooler:
        config = dataclasses.replace(config, pooler=False)
        params = {name: tree for name, tree in params.items() if name != "pooler"}
    values = to_json(config, dtype)
    _write(Path(folder), values, file_tensors(config, params, dtype), tokenizer, card)


def save_task(
    folder: str | Path,
    config: ModelConfig,
    head: HeadConfig,
    params: Params,
    *,
    tokenizer: str | Path | None = None,
    card: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Writes a folder that `transformers` and its pipelines open with no tensor missing or unexpected.

    The head's dropout is written if config.json has a key for it. It has none for tokens on a DistilBERT and for spans
    on a BERT.

    Args:
      folder: must not exist, or be empty; it appears complete or not at all.
      config: the encoder's architecture; its `mlm_head` and `pooler` do not matter.
      head: the task's head.
      params: of their `TaskModel`, NumPy or jax arrays.
      tokenizer, card, dtype: as in `save`.

    Raises:
      InputError: as `save`.
    """
    _check_target(folder, dtype)
    config = head.encoder(config)
    values = to_json(config, dtype) | head_to_json(config, head)
    _write(Path(folder), values, file_tensors(config, params, dtype, head), tokenizer, card)


def fingerprint(params: Params) -> str:
    """The SHA-256 of all parameters: their paths, dtypes, shapes and bytes, in the order of the paths."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    for path, value in sorted(by_path.items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _tokenizer_class(folder: Path) -> dict[str, str]:
    """The `tokenizer_class` of a config.json, which alone says so if a BERT has a tokenizer of another family."""
    path = folder / "config.json"
    values = read_json(path) if path.exists() else {}
    return {name: value for name, value in values.items() if name == "tokenizer_class" and isinstance(value, str)}


def _tokenizer_config(folder: Path, positions: int) -> str | None:
    """The text of a tokenizer_config.json with which a tokenizer truncates texts to what its model can take.

    Args:
      folder: of the tokenizer. Without a tokenizer_config.json, `transformers` would truncate nothing.
      positions: of the model.

    Returns:
      None if the file can stay as it is.
    """
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.exists() else {}
    # `transformers` writes here where it loaded a tokenizer from, and other machines have no such place.
    shared = {name: value for name, value in values.items() if name not in _ORIGINS}
    limit = values.get("model_max_length")
    if not isinstance(limit, int | float) or limit > positions:
        shared["model_max_length"] = positions
    return None if shared == values else json.dumps(shared, indent=2, ensure_ascii=False) + "\n"


def _check_target(folder: str | Path, dtype: str) -> None:
    check_free(folder)
    if dtype not in ("float32", "float16"):
        raise InputError(f'Models are saved in "float32" or "float16", not in {dtype!r}: choose one of these.')


def _write(
    folder: Path,
    values: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    tokenizer: str | Path | None,
    card: str | None,
) -> None:
    copies = tokenizer_files(Path(tokenizer)) if tokenizer is not None else []
    for file in copies:
        check_no_pointer(file)
    tokenizer_text = None
    if tokenizer is not None:
        values = values | _tokenizer_class(Path(tokenizer))
        tokenizer_text = _tokenizer_config(Path(tokenizer), values["max_position_embeddings"])

    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with whole_folder(folder) as draft:
        try:
            save_file(tensors, draft / SINGLE, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, with a message of its own
            raise OSError(errno.EIO, str(error), str(folder)) from error
        (draft / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(draft / "config.json", draft / SINGLE)  # safetensors makes a file that only its owner can read
        if card is not None:
            (draft / "README.md").write_text(card, encoding="utf-8")
        for file in copies:
            shutil.copyfile(file, draft / file.name)
        if tokenizer_text is not None:
            (draft / "tokenizer_config.json").write_text(tokenizer_text, encoding="utf-8")
