"""Checks the tensors of a model folder against the name table, and turns parameters into such tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.io.config_json import BERT, DISTILBERT, SINUSOIDAL_KEY, from_json, model_type
from distil_jax.io.name_table import HEAD, IGNORED, IGNORED_UNDER_HEAD, LEGACY, TASK_HEAD, TIED, Leaf, leaves
from distil_jax.io.task_json import architecture, has_task_head, head_from_json
from distil_jax.io.tensors import Tensor, read_json
from distil_jax.schema import InputError
from distil_jax.structs import sinusoidal_table

Params = Mapping[str, Any]

_SAMPLE = "embeddings.word_embeddings.weight"  # every encoder has this one

# A stored position table counts as sinusoidal if it differs from the formula by no more than rounding.
_ROUNDING = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


def examine(folder: Path, opened: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Checks a folder without a task's head, and returns its architecture and its tensors by the table's names.

    Raises:
      InputError: see `huggingface.load`.
    """
    values = read_json(folder / "config.json")
    if has_task_head(values):
        raise InputError(
            f"{folder} is a model for a task, without the MLM head that predicts words: give the masked language model "
            "it was made from, or let a student learn this task from it with `distil-jax finetune --teacher`."
        )
    config = from_json(values, folder / "config.json")
    tensors = _plain_names(folder, opened, model_type(config), IGNORED)
    config = dataclasses.replace(
        config,
        mlm_head=any(name.startswith(HEAD) for name in tensors),
        pooler=model_type(config) == BERT and any(name.startswith("pooler.") for name in tensors),
    )
    copies = _take_copies(tensors)
    _check(folder, tensors, leaves(config), "encoder that its config.json describes, with or without MLM head")
    _check_tied(folder, tensors, copies)
    return _with_positions(config, values, tensors), tensors


def examine_task(folder: Path, opened: Mapping[str, Tensor]) -> tuple[ModelConfig, HeadConfig, dict[str, Tensor]]:
    """Checks a folder with a task's head, and returns its encoder, its head and the tensors of both.

    Raises:
      InputError: see `huggingface.load_task`.
    """
    path = folder / "config.json"
    values = read_json(path)
    config = from_json(values, path)
    head = head_from_json(values, path, config)
    config = head.encoder(config)
    ignored = IGNORED if head.kind == "sequence" else IGNORED + IGNORED_UNDER_HEAD
    tensors = _plain_names(folder, opened, model_type(config), ignored)
    _check(folder, tensors, leaves(config, head), f"{architecture(config, head)} that its config.json describes")
    return _with_positions(config, values, tensors), head, tensors


def _check(folder: Path, tensors: Mapping[str, Tensor], wanted: list[Leaf], what: str) -> None:
    expected = {name: leaf.file_shape for leaf in wanted for name in leaf.names}
    _check_wrapper(folder, tensors)
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
            f"The weights in {folder} are not those of the {what} ({_listing(problems)}): "
            "give a folder whose config.json and weights belong together."
        )


def _check_wrapper(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses names that all have a prefix, such as DataParallel's, instead of calling every tensor missing."""
    sample = next((name for name in tensors if name.endswith(f".{_SAMPLE}")), "")
    if not sample or _SAMPLE in tensors:
        return
    *front, body = sample.removesuffix(f".{_SAMPLE}").split(".")
    if not front or body not in (BERT, DISTILBERT):
        front.append(body)
    prefix = ".".join([*front, ""])
    raise InputError(
        f"The tensors in {folder} have {prefix!r} in front of their names, put there by a wrapper (DataParallel, "
        "torch.compile, Lightning) or another kind of model: save the model inside the wrapper, or rename the tensors."
    )


def _with_positions(config: ModelConfig, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The config, with sinusoidal positions if config.json says so and the stored table agrees with the formula."""
    if values.get(SINUSOIDAL_KEY) and config.hidden_size % 2 == 0:
        table = tensors["embeddings.position_embeddings.weight"]
        formula = sinusoidal_table(config.max_positions, config.hidden_size)
        if np.max(np.abs(table.read() - formula)) <= _ROUNDING[table.dtype]:
            config = dataclasses.replace(config, positions="sinusoidal")
    return config


def _plain_names(folder: Path, opened: Mapping[str, Tensor], kind: str, ignored: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors by the table's names: without the body's prefix and legacy names, and without ignored tensors."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in opened.items():
        plain = name.removeprefix(f"{kind}.")
        for old, new in LEGACY.items():
            if plain.endswith(old):
                plain = plain.removesuffix(old) + new
        if plain in tensors:
            raise InputError(f"{folder} holds {plain} under two names, one of them {name}: export the model again.")
        if plain not in ignored:
            tensors[plain] = tensor
    return tensors


def _take_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the copies of tied tensors and returns them; a copy replaces an original that the file lacks."""
    copies = {copy: tensors.pop(copy) for copy in TIED if copy in tensors}
    for copy, tensor in copies.items():
        tensors.setdefault(TIED[copy], tensor)
    return copies


def _check_tied(folder: Path, tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
    """Refuses copies that differ from their originals. Check the originals' shapes and dtypes first."""
    for copy, tensor in copies.items():
        kept = tensors[TIED[copy]]
        alike = kept.shape == tensor.shape and tensor.dtype in _ROUNDING
        if not alike or not np.array_equal(kept.read(), tensor.read(), equal_nan=True):
            raise InputError(
                f"In {folder} {copy} differs from {TIED[copy]}: an output layer that is not tied to the embedding is "
                "not supported, so give a model whose weights are tied."
            )


def file_tensors(
    config: ModelConfig, params: Params, dtype: str, head: HeadConfig | None = None
) -> dict[str, np.ndarray]:
    """The tensors of model.safetensors for these parameters: layers unstacked, padding removed, all contiguous.

    Raises:
      InputError: the parameters do not fit the config, or are not finite in `dtype`.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    shapes = {leaf.path: leaf.full_shape for leaf in leaves(config, head)}
    problems = [f"{path} is missing" for path in shapes if path not in flat]
    problems += [f"{path} is unexpected" for path in flat if path not in shapes]
    for path in shapes.keys() & flat.keys():
        if np.shape(flat[path]) != shapes[path]:
            problems.append(f"{path} is {list(np.shape(flat[path]))} and should be {list(shapes[path])}")
    if problems:
        raise InputError(
            f"The parameters do not fit their config ({_listing(problems)}): save a model with its own config."
        )

    if config.positions == "sinusoidal":  # transformers stores the table nevertheless
        flat["embeddings/position"] = sinusoidal_table(config.max_positions, config.hidden_size)
    tensors = {}
    for leaf in leaves(dataclasses.replace(config, positions="learned"), head):
        for name, array in leaf.write(flat[leaf.path]):
            with np.errstate(over="ignore"):  # an overflow gives infinity, which is refused below
                array = np.ascontiguousarray(array, dtype)  # safetensors would silently scramble a transposed view
            if not np.isfinite(array).all():
                raise InputError(
                    f"{leaf.path} holds numbers that are not finite in {dtype}, so the model is not saved: "
                    "take an earlier checkpoint, or another dtype."
                )
            prefixed = (config.mlm_head or head is not None) and not name.startswith(HEAD + TASK_HEAD)
            tensors[f"{model_type(config)}.{name}" if prefixed else name] = array
    return tensors


def _listing(problems: list[str]) -> str:
    """The first ten problems, and how many more there are."""
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "; ".join(sorted(problems)[:10]) + more
