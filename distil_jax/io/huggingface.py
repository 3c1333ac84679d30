"""Model folders as `transformers` writes and reads them, without PyTorch.

Nothing is guessed: every tensor is known by name and shape, from the one name table, read in both directions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import traverse_util

from distil_jax.config import ModelConfig
from distil_jax.io.config_json import BERT, SINUSOIDAL_KEY, from_json, model_type, to_json
from distil_jax.io.name_table import HEAD, IGNORED, LEGACY, TIED, leaves
from distil_jax.io.tensors import SINGLE, TOKENIZER_FILES, Tensor, local_folder, open_tensors, read_json
from distil_jax.schema import InputError
from distil_jax.structs import sinusoidal_table

Params = Mapping[str, Any]

# How near the formula a stored table must be to count as sinusoidal: rounding, and no more.
_ROUNDING = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


def load(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a BERT or DistilBERT, with or without its MLM head and pooler.

    Args:
      folder: a folder with config.json and weights, or a hub id.

    Returns:
      The architecture (`mlm_head` and `pooler` say what the file holds), and the parameters: float32 NumPy arrays,
      layers stacked, the vocabulary padded with zeros.

    Raises:
      InputError: not such a model, damaged, untied, or tensors missing, unexpected or of another shape.
    """
    folder = local_folder(folder)
    with open_tensors(folder) as opened:
        config, tensors = _examine(folder, opened)
        flat = {leaf.path: leaf.read(tensors) for leaf in leaves(config)}
    return config, traverse_util.unflatten_dict(flat, sep="/")


def read_config(folder: str | Path) -> ModelConfig:
    """The architecture that `load` would return, after the same checks, without the parameters."""
    folder = local_folder(folder)
    with open_tensors(folder) as opened:
        return _examine(folder, opened)[0]


def save(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: str | Path | None = None,
    card: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Writes a folder that `transformers` opens with nothing missing, unexpected or untied.

    No table of token types makes it a DistilBERT, otherwise it is a BERT. `BertForMaskedLM` has no pooler, so a BERT
    with an MLM head is written without its pooler. A BERT with neither is written as a `BertModel`, and
    `transformers` opens it completely with `add_pooling_layer=False`.

    Args:
      folder: must not exist, or be empty; it appears whole or not at all.
      params: as `load` returns them, NumPy or jax arrays.
      tokenizer: a folder whose tokenizer files are copied.
      card: the text of README.md.
      dtype: of the numbers on disk.

    Raises:
      InputError: the folder is in use, `transformers` has no such model, the parameters do not fit the config, numbers
        are not finite (in `dtype`), or there is no tokenizer where one is said to be.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another folder, or remove it first.")
    if dtype not in ("float32", "float16"):
        raise InputError(f'Models are saved in "float32" or "float16", not in {dtype!r}: choose one of these.')
    if config.mlm_head and config.pooler:
        config = dataclasses.replace(config, pooler=False)
        params = {name: tree for name, tree in params.items() if name != "pooler"}
    values = to_json(config, dtype)
    tensors = _file_tensors(config, params, dtype)
    copies = _tokenizer_files(Path(tokenizer)) if tokenizer is not None else []

    from safetensors.numpy import save_file

    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"Cannot write {folder}: {error.strerror}.") from error
    try:
        save_file(tensors, draft / SINGLE, metadata={"format": "pt"})
        (draft / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(draft / "config.json", draft / SINGLE)  # safetensors makes its file private
        if card is not None:
            (draft / "README.md").write_text(card, encoding="utf-8")
        for file in copies:
            shutil.copyfile(file, draft / file.name)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def fingerprint(params: Params) -> str:
    """The SHA-256 of all parameters: paths, types, shapes and bytes, in the order of the paths."""
    digest = hashlib.sha256()
    for path, value in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _examine(folder: Path, opened: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The architecture, and the tensors under the names of the table, after every check."""
    values = read_json(folder / "config.json")
    config = from_json(values, folder / "config.json")
    tensors = _plain_names(folder, opened, model_type(config))
    config = dataclasses.replace(
        config,
        mlm_head=any(name.startswith(HEAD) for name in tensors),
        pooler=model_type(config) == BERT and any(name.startswith("pooler.") for name in tensors),
    )
    copies = _take_copies(tensors)

    expected = {name: leaf.file_shape for leaf in leaves(config) for name in leaf.names}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        tensor = tensors[name]
        if tensor.shape != expected[name]:
            problems.append(f"{name} is {list(tensor.shape)} where config.json means {list(expected[name])}")
        elif tensor.dtype not in _ROUNDING:
            problems.append(f"{name} is {tensor.dtype} where a float of 16 or 32 bits belongs")
    if problems:
        raise InputError(
            f"The weights in {folder} are not those of the encoder that its config.json describes, with or without MLM "
            f"head ({_listing(problems)}): give a folder whose config.json and weights belong together."
        )

    _check_tied(folder, tensors, copies)

    if values.get(SINUSOIDAL_KEY) and config.hidden_size % 2 == 0:
        table = tensors["embeddings.position_embeddings.weight"]
        formula = sinusoidal_table(config.max_positions, config.hidden_size)
        if np.max(np.abs(table.read() - formula)) <= _ROUNDING[table.dtype]:
            config = dataclasses.replace(config, positions="sinusoidal")
    return config, tensors


def _plain_names(folder: Path, opened: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors without the body's prefix, legacy names and what is ignored."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in opened.items():
        plain = name.removeprefix(f"{kind}.")
        for old, new in LEGACY.items():
            if plain.endswith(old):
                plain = plain.removesuffix(old) + new
        if plain in tensors:
            raise InputError(f"{folder} holds {plain} under two names, one of them {name}: export the model again.")
        if plain not in IGNORED:
            tensors[plain] = tensor
    return tensors


def _take_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes out the copies of tied tensors; a copy stands in for an original that was not written."""
    copies = {copy: tensors.pop(copy) for copy in TIED if copy in tensors}
    for copy, tensor in copies.items():
        tensors.setdefault(TIED[copy], tensor)
    return copies


def _check_tied(folder: Path, tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
    """Refuses copies unlike their originals, whose shapes and types must have been checked: this reads them."""
    for copy, tensor in copies.items():
        kept = tensors[TIED[copy]]
        alike = kept.shape == tensor.shape and tensor.dtype in _ROUNDING
        if not alike or not np.array_equal(kept.read(), tensor.read(), equal_nan=True):
            raise InputError(
                f"In {folder} {copy} differs from {TIED[copy]}: an output layer that is not tied to the embedding is "
                "not supported, so give a model whose weights are tied."
            )


def _file_tensors(config: ModelConfig, params: Params, dtype: str) -> dict[str, np.ndarray]:
    """The tensors of model.safetensors: checked, unstacked, unpadded, contiguous."""
    flat = traverse_util.flatten_dict(params, sep="/")
    shapes = {leaf.path: leaf.full_shape for leaf in leaves(config)}
    problems = [f"{path} is missing" for path in shapes if path not in flat]
    problems += [f"{path} is unexpected" for path in flat if path not in shapes]
    for path in shapes.keys() & flat.keys():
        if np.shape(flat[path]) != shapes[path]:
            problems.append(f"{path} is {list(np.shape(flat[path]))} and should be {list(shapes[path])}")
    if problems:
        raise InputError(
            f"The parameters are not those of their config ({_listing(problems)}): save a model with its own config."
        )

    if config.positions == "sinusoidal":  # transformers stores the table all the same
        flat["embeddings/position"] = sinusoidal_table(config.max_positions, config.hidden_size)
    tensors = {}
    for leaf in leaves(dataclasses.replace(config, positions="learned")):
        for name, array in leaf.write(flat[leaf.path]):
            with np.errstate(over="ignore"):  # an overflow gives an infinity, which is refused
                array = np.ascontiguousarray(array, dtype)  # safetensors scrambles a transposed view, in silence
            if not np.isfinite(array).all():
                raise InputError(
                    f"{leaf.path} holds numbers that are not finite in {dtype}, so the model is not saved: "
                    "take an earlier checkpoint, or another dtype."
                )
            prefixed = config.mlm_head and not name.startswith(HEAD)
            tensors[f"{model_type(config)}.{name}" if prefixed else name] = array
    return tensors


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {"tokenizer.json", "vocab.txt"} & {file.name for file in files}:
        raise InputError(f"{folder} holds no tokenizer: give a folder with tokenizer.json or vocab.txt.")
    return files


def _listing(problems: list[str]) -> str:
    """The first ten, and how many more."""
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "; ".join(sorted(problems)[:10]) + more
