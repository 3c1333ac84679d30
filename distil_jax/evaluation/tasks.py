"""How good a model is at a task: the task's metrics, from its logits for labelled examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distil_jax.config.run import ComputeConfig, MeshConfig
from distil_jax.config.step import OptimizerConfig, StepConfig
from distil_jax.config.task import StartConfig, TaskConfig, check_head, head_of
from distil_jax.data.loader import evaluation_rows, held_out_batches
from distil_jax.data.spans import answers
from distil_jax.data.task_table import TaskTable
from distil_jax.data.tasks import TaskData, read_task
from distil_jax.evaluation.held_out import rows_per_call
from distil_jax.evaluation.task_metrics import score_predictions
from distil_jax.io.metrics import MetricSums
from distil_jax.runtime.assemble import resolve_compute, with_compute
from distil_jax.runtime.attention import resolve_attention
from distil_jax.runtime.run_folder import Model
from distil_jax.schema import InputError
from distil_jax.structs import IGNORED
from distil_jax.training.sharding import jit_eval, local_places, make_mesh, put_params, put_rows, shardings_of
from distil_jax.training.state import TrainState, abstract_state, eval_state
from distil_jax.training.step import task_eval_step


class TaskEvaluator:
    """Judges parameters on the examples of a task.

    Args:
      task: its metrics are taken.
      step: the models; its head is the task's.
      mesh: where the examples go.
      label_names: in the order of the logits.
      batch_rows: examples at a time.
    """

    def __init__(
        self, task: TaskConfig, step: StepConfig, mesh: Mesh, label_names: tuple[str, ...], batch_rows: int
    ) -> None:
        self._task, self._step, self._mesh, self._batch_rows = task, step, mesh, batch_rows
        self._label_names = np.array(label_names)
        self._eval = jit_eval(task_eval_step, mesh, abstract_state(step).replace(opt_state=None), None)

    def evaluate(
        self, params: Any, table: TaskTable, *, limit: int = 0, alive: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """The metrics, as shares, and the mean loss.

        Args:
          params: on the mesh.
          table: the examples.
          limit: only so many, see `evaluation_rows`; 0: all, as it must be of spans, whose examples have several rows.
          alive: called with every batch.
        """
        state, sums, collected = eval_state(self._step, params), MetricSums(), []
        places = local_places(self._mesh, self._batch_rows)
        for batch in held_out_batches(table, batch_rows=self._batch_rows, limit=limit, places=places):
            alive()
            metrics, logits = self._eval(state, None, put_rows(batch, self._mesh, batch_rows=self._batch_rows))
            sums.add(metrics)
            collected.append(logits)  # fetched at the end
        judged = evaluation_rows(len(table), limit)
        logits = [row for batch in jax.device_get(collected) for row in batch][: len(judged)]
        return {**self._scores(logits, table, table.labels[judged]), **sums.means()}

    def evaluate_splits(self, params: Any, data: TaskData) -> dict[str, dict[str, float]]:
        """`evaluate` of the task's "dev" and, where there are such examples, "test"."""
        tables = {"dev": data.dev, "test": data.test}
        return {name: self.evaluate(params, table) for name, table in tables.items() if table is not None}

    def _scores(self, logits: list[np.ndarray], table: TaskTable, labels: np.ndarray) -> dict[str, float]:
        metrics = self._task.metric_names
        if self._task.kind == "regression":
            return score_predictions(metrics, np.array(logits)[:, 0], labels)
        if self._task.kind == "sequence":
            return score_predictions(metrics, np.argmax(logits, axis=-1), labels)
        if self._task.kind == "tokens":
            predicted, true = [], []
            for row, truth in zip(logits, labels, strict=True):
                truth = truth[: len(row)]
                labelled = truth != IGNORED
                predicted.append(self._label_names[row.argmax(axis=-1)[labelled]].tolist())
                true.append(self._label_names[truth[labelled]].tolist())
            return score_predictions(metrics, predicted, true)
        starts, ends = ([row[:, end] for row in logits] for end in (0, 1))
        return score_predictions(metrics, answers(table, starts, ends, self._task.max_answer), table.references)


@dataclass(frozen=True, eq=False)
class DevEvaluator:
    """Judges the states of a fine-tuning run on the task's dev examples.

    Attributes:
      evaluator: of the task.
      table: the examples.
      limit: only so many, see `evaluation_rows`; 0: all.
      metric: decides which state is best.
    """

    evaluator: TaskEvaluator
    table: TaskTable
    limit: int
    metric: str

    def evaluate(self, state: TrainState, alive: Callable[[], None]) -> dict[str, float]:
        """`TaskEvaluator.evaluate` of the state's parameters."""
        return self.evaluator.evaluate(state.params, self.table, limit=self.limit, alive=alive)

    def criterion(self, metrics: Mapping[str, Any]) -> float:
        """The negative of the first metric, of which more is better."""
        return -metrics[self.metric]


def examples_for(model: Model, task: TaskConfig) -> TaskData:
    """Reads a task's examples for a model with a head; the model's order of labels wins if the task names none.

    Raises:
      InputError: a model without a head or with that of another task, or examples that cannot be read.
    """
    if model.head is None:
        path = model.run or model.tokenizer
        raise InputError(f"{path} has no head for a task: fine-tune it first, with `distil-jax finetune`.")
    length = min(task.max_length, model.config.max_positions)
    data = read_task(task, model.tokenizer, vocab_size=model.config.vocab_size, max_length=length)
    if not task.label_names and sorted(data.label_names) == sorted(model.head.label_names):
        data = data.with_labels(model.head.label_names)
    wanted = head_of(task, StartConfig(), model.config, data.label_names)
    check_head(model.head, wanted, f"The model {model.run or model.tokenizer}")
    return data


def evaluate_task(model: Model, task: TaskConfig, data: TaskData) -> dict[str, dict[str, float]]:
    """The metrics of a model with a task's head, as shares, on the task's "dev" and, where there are such, "test"."""
    length = min(task.max_length, model.config.max_positions)
    mesh, compute = make_mesh(MeshConfig()), resolve_compute(ComputeConfig())
    student = with_compute(model.config, compute)
    step = StepConfig(student, optimizer=OptimizerConfig(steps=1), head=model.head)
    step, _ = resolve_attention(step, "auto", mesh, length)
    params = put_params(model.params, shardings_of(abstract_state(step).replace(opt_state=None), mesh).params)
    judge = TaskEvaluator(task, step, mesh, data.label_names, rows_per_call(mesh, length))
    return judge.evaluate_splits(params, data)


def format_metrics(splits: dict[str, dict[str, float]]) -> str:
    """The metrics of `TaskEvaluator.evaluate_splits` as text, one line for each split."""
    return "\n".join(
        f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        for split, metrics in splits.items()
    )
