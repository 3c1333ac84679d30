"""How well a masked language model predicts held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from distil_jax.config.objective import LossConfig, MaskingConfig
from distil_jax.config.run import ComputeConfig, MeshConfig
from distil_jax.config.step import OptimizerConfig, StepConfig
from distil_jax.data.loader import RowTable, held_out_batches, open_rows
from distil_jax.data.manifest import read_manifest
from distil_jax.io.metrics import MetricSums, perplexity
from distil_jax.models.encoder import abstract_params
from distil_jax.runtime.assemble import check_tokenizer, resolve_compute, token_weights, with_compute
from distil_jax.runtime.attention import resolve_attention
from distil_jax.runtime.run_folder import Model
from distil_jax.schema import InputError
from distil_jax.training.sharding import (
    jit_eval,
    local_places,
    make_mesh,
    put_params,
    put_rows,
    replicate,
    shardings_of,
)
from distil_jax.training.state import TrainState, abstract_state, eval_state
from distil_jax.training.step import mask_and_eval_step

_BATCH_TOKENS = 8192  # per device and call; the metrics do not depend on it


def evaluate(
    model: Model,
    data: str | Path,
    *,
    teacher: Model | None = None,
    limit: int = 0,
    before_batch: Callable[[int], None] = lambda length: None,
) -> dict[str, float]:
    """Held-out metrics of any masked language model.

    Args:
      model: the one to judge.
      data: a folder of prepared rows.
      teacher: adds kl and agreement with it.
      limit: judge only so many rows, see `evaluation_rows`; 0: all.
      before_batch: called with the length of the rows of every batch; a new length makes XLA compile.

    Raises:
      InputError: a model without an MLM head, or rows of another tokenizer.
    """
    manifest, table = read_manifest(data), open_rows(data, "held_out")
    compute = resolve_compute(ComputeConfig())
    for each in (model, teacher):
        if each is not None:
            check_tokenizer(each.tokenizer, each.config, data, manifest)
            if not each.config.mlm_head:
                raise InputError(f"{each.tokenizer} has no MLM head, so it predicts no words: train one first.")
            if manifest.sequence_length > each.config.max_positions:
                raise InputError(
                    f"The rows are {manifest.sequence_length} long and {each.tokenizer} has "
                    f"{each.config.max_positions} positions: prepare shorter rows."
                )
    if not len(table):
        raise InputError(f"{data} has no held-out rows: prepare it with --held-out above 0.")
    config = StepConfig(
        student=with_compute(model.config, compute),
        teacher=with_compute(teacher.config, compute) if teacher else None,
        loss=LossConfig(kl=0, cosine=0),
        masking=MaskingConfig(mask_token_id=manifest.mask_id),
        optimizer=OptimizerConfig(steps=1),
    )
    mesh = make_mesh(MeshConfig())
    config, _ = resolve_attention(config, "auto", mesh, manifest.sequence_length)
    shapes = abstract_state(config).replace(opt_state=None)
    params = put_params(model.params, shardings_of(shapes, mesh).params)
    teacher_shapes = abstract_params(config.teacher) if teacher else None
    evaluator = HeldOutEvaluator(
        step=jit_eval(mask_and_eval_step, mesh, shapes, teacher_shapes),
        teacher_params=put_params(teacher.params, shardings_of(teacher_shapes, mesh)) if teacher else None,
        open_table=lambda: table,
        weights=replicate(token_weights(data, manifest, model.config, smoothing=0.0), mesh),
        mesh=mesh,
        batch_rows=rows_per_call(mesh, manifest.sequence_length),
        limit=limit,
    )
    return evaluator.evaluate(eval_state(config, params), before_batch)


@dataclass(frozen=True, eq=False)
class HeldOutEvaluator:
    """Judges students on held-out rows; the masks of a row are always the same.

    Attributes:
      step: `mask_and_eval_step` or `mask_and_eval_teacher_step`, compiled with `jit_eval`.
      teacher_params: the teacher's tree on the mesh, or None.
      open_table: opens the held-out rows.
      weights: [V], on the mesh.
      mesh: where the rows go.
      batch_rows: rows per call of `step`.
      limit: judge only so many rows, see `evaluation_rows`; 0: all.
    """

    step: Callable
    teacher_params: Any
    open_table: Callable[[], RowTable]
    weights: jax.Array
    mesh: Mesh
    batch_rows: int
    limit: int

    def evaluate(
        self, state: TrainState, before_batch: Callable[[int], None] = lambda length: None
    ) -> dict[str, float]:
        """Means over the rows: mlm, perplexity, accuracy, and kl and agreement with a teacher.

        Those of the teacher itself if `step` is `mask_and_eval_teacher_step`; then {} if it predicts no words.

        Args:
          state: of the student.
          before_batch: as for `evaluate`.
        """
        sums, places = MetricSums(), local_places(self.mesh, self.batch_rows)
        table = self.open_table()
        for rows in held_out_batches(table, batch_rows=self.batch_rows, limit=self.limit, places=places):
            before_batch(rows.input_ids.shape[1])
            batch = put_rows(rows, self.mesh, batch_rows=self.batch_rows)
            sums.add(self.step(state, self.teacher_params, batch, self.weights))
        metrics = sums.means()
        if not metrics:
            return {}
        mlm = metrics.pop("mlm")
        return {"mlm": mlm, "perplexity": perplexity(mlm), **metrics}

    def criterion(self, metrics: Mapping[str, Any]) -> float:
        """The MLM loss."""
        return metrics["mlm"]


def rows_per_call(mesh: Mesh, length: int) -> int:
    """How many rows of `length` tokens are judged at a time; the metrics do not depend on it."""
    return mesh.size * max(1, _BATCH_TOKENS // length)
