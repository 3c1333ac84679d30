"""How good a model is at a task: the task's metrics, from its logits for labelled examples."""

from __future__ import annotations

import itertools
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
from distil_jax.evaluation.baseline import best_constant, constant_scores
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

# For a model that learned nothing.
HOW_TO_LEARN = (
    "Try a higher learning rate (optimizer.learning_rate: 5e-5 suits base-size models, and smaller ones need more) or "
    "more epochs (train.epochs)."
)


@dataclass(frozen=True)
class TaskScores:
    """What a model reaches on a task, and what one answer for every example would.

    Attributes:
      splits: the metrics, as shares, and the mean loss, on "dev" and, where there are such examples, "test".
      largest_class: the same metrics, for each split, of `constant`.
      constant: the answer that suits the training labels best (see `best_constant`), as text.
      only_prediction: what the model predicts for every example of all splits, as text; None if its predictions differ,
        or if the labels are all the same.
    """

    splits: dict[str, dict[str, float]]
    largest_class: dict[str, dict[str, float]]
    constant: str
    only_prediction: str | None


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
        self._label_names = label_names
        self._eval = jit_eval(task_eval_step, mesh, abstract_state(step).replace(opt_state=None), None)

    def evaluate(
        self,
        params: Any,
        table: TaskTable,
        *,
        limit: int = 0,
        before_batch: Callable[[int], None] = lambda length: None,
    ) -> dict[str, float]:
        """The metrics, as shares, and the mean loss.

        Args:
          params: on the mesh.
          table: the examples.
          limit: only so many, see `evaluation_rows`; 0: all, as it must be of spans, whose examples have several rows.
          before_batch: called with the length of the rows of every batch.
        """
        predictions, labels, loss = self._predict(params, table, limit, before_batch)
        return {**score_predictions(self._task.metric_names, predictions, labels), **loss}

    def evaluate_splits(
        self, params: Any, data: TaskData, *, before_batch: Callable[[int], None] = lambda length: None
    ) -> TaskScores:
        """`evaluate` of the task's "dev" and, where there are such examples, "test", beside the largest class."""
        splits, predicted, true = {}, [], []
        for name, table in _judged_tables(data).items():
            predictions, labels, loss = self._predict(params, table, before_batch=before_batch)
            splits[name] = score_predictions(self._task.metric_names, predictions, labels) | loss
            predicted.extend(predictions)
            true.extend(labels)
        if self._task.kind == "tokens":
            predicted, true = (list(itertools.chain.from_iterable(names)) for names in (predicted, true))
        alike = all(each == predicted[0] for each in predicted) and any(each != true[0] for each in true)
        only = _text(self._task, predicted[0], self._label_names) if alike else None
        return TaskScores(splits, *self.largest_class(data), only)

    def largest_class(self, data: TaskData, *, limit: int = 0) -> tuple[dict[str, dict[str, float]], str]:
        """The metrics, for each split, of the one answer that suits the training labels best, and that answer as text.

        Args:
          data: the examples.
          limit: as in `evaluate`.
        """
        constant = best_constant(self._task, _labels(self._task, data.train, self._label_names))
        scores = {
            name: constant_scores(self._task, constant, _labels(self._task, table, self._label_names, limit))
            for name, table in _judged_tables(data).items()
        }
        return scores, _text(self._task, constant, self._label_names)

    def _predict(
        self,
        params: Any,
        table: TaskTable,
        limit: int = 0,
        before_batch: Callable[[int], None] = lambda length: None,
    ) -> tuple[Any, Any, dict[str, float]]:
        """Predictions and labels, as `score_predictions` takes them, and the mean loss; arguments as in `evaluate`."""
        state, sums, collected = eval_state(self._step, params), MetricSums(), []
        places = local_places(self._mesh, self._batch_rows)
        for batch in held_out_batches(table, batch_rows=self._batch_rows, limit=limit, places=places):
            before_batch(batch.input_ids.shape[1])
            metrics, logits = self._eval(state, None, put_rows(batch, self._mesh, batch_rows=self._batch_rows))
            sums.add(metrics)
            collected.append(logits)  # fetched at the end
        judged = evaluation_rows(len(table), limit)
        logits = [row for batch in jax.device_get(collected) for row in batch][: len(judged)]
        labels = _labels(self._task, table, self._label_names, limit)
        return self._predictions(logits, table, table.labels[judged]), labels, sums.means()

    def _predictions(self, logits: list[np.ndarray], table: TaskTable, labels: np.ndarray) -> Any:
        """Predictions as `score_predictions` takes them; `labels` say which tokens are words."""
        if self._task.kind == "regression":
            return np.array(logits)[:, 0]
        if self._task.kind == "sequence":
            return np.argmax(logits, axis=-1)
        if self._task.kind == "tokens":
            names = np.array(self._label_names)
            return [
                names[row.argmax(axis=-1)[truth[: len(row)] != IGNORED]].tolist()
                for row, truth in zip(logits, labels, strict=True)
            ]
        starts, ends = ([row[:, end] for row in logits] for end in (0, 1))
        return answers(table, starts, ends, self._task.max_answer)


def _judged_tables(data: TaskData) -> dict[str, TaskTable]:
    tables = {"dev": data.dev, "test": data.test}
    return {name: table for name, table in tables.items() if table is not None}


def _labels(task: TaskConfig, table: TaskTable, label_names: tuple[str, ...], limit: int = 0) -> Any:
    """The labels of a table's `evaluation_rows`, as `score_predictions` takes them."""
    if task.kind == "spans":
        return table.references
    labels = table.labels[evaluation_rows(len(table), limit)]
    if task.kind != "tokens":
        return labels
    names = np.array(label_names)
    return [names[of_tokens[of_tokens != IGNORED]].tolist() for of_tokens in labels]


def _text(task: TaskConfig, prediction: Any, label_names: tuple[str, ...]) -> str:
    """A prediction as people read it."""
    if task.kind == "regression":
        return f"{prediction:.4g}"
    if task.kind == "sequence":
        return label_names[prediction]
    return prediction or "no answer"


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

    def evaluate(self, state: TrainState, before_batch: Callable[[int], None]) -> dict[str, float]:
        """`TaskEvaluator.evaluate` of the state's parameters."""
        return self.evaluator.evaluate(state.params, self.table, limit=self.limit, before_batch=before_batch)

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


def evaluate_task(
    model: Model, task: TaskConfig, data: TaskData, *, before_batch: Callable[[int], None] = lambda length: None
) -> TaskScores:
    """The scores of a model with a task's head on the task's "dev" and, where there are such, "test"."""
    length = min(task.max_length, model.config.max_positions)
    mesh, compute = make_mesh(MeshConfig()), resolve_compute(ComputeConfig())
    student = with_compute(model.config, compute)
    step = StepConfig(student, optimizer=OptimizerConfig(steps=1), head=model.head)
    step, _ = resolve_attention(step, "auto", mesh, length)
    params = put_params(model.params, shardings_of(abstract_state(step).replace(opt_state=None), mesh).params)
    judge = TaskEvaluator(task, step, mesh, data.label_names, rows_per_call(mesh, length))
    return judge.evaluate_splits(params, data, before_batch=before_batch)


def constant_name(task: TaskConfig) -> str:
    """What `TaskScores.constant` is called."""
    names = {"regression": "mean of the training labels", "spans": "most frequent answer"}
    return names.get(task.kind, "largest class")


def format_scores(scores: TaskScores, task: TaskConfig) -> str:
    """The scores as text: two lines for each split, and a sentence if nothing was learned."""
    lines = []
    for split, metrics in scores.splits.items():
        of_constant = scores.largest_class[split]
        for who, numbers in ((split, metrics), (f"{split}, {constant_name(task)} ({scores.constant})", of_constant)):
            lines.append(f"{who}: " + ", ".join(f"{name} {value:z.4f}" for name, value in numbers.items()))
    if sentence := nothing_learned(scores.splits, scores.largest_class, scores.only_prediction):
        lines.append(sentence)
    return "\n".join(lines)


def nothing_learned(
    splits: dict[str, dict[str, float]], largest_class: dict[str, dict[str, float]], only_prediction: str | None
) -> str:
    """A sentence about a model that is no better than one answer for every example; empty about a better one.

    Args:
      splits, largest_class, only_prediction: as in `TaskScores`. The first metric counts.
    """
    metric = next(iter(splits["dev"]))
    if only_prediction is not None:
        why = f'Every prediction is "{only_prediction}", so the model learned nothing'
    elif all(splits[split][metric] <= scores[metric] < 1 for split, scores in largest_class.items()):
        why = f"By its {metric} the model is no better than one answer for every example: it learned nothing that helps"
    else:
        return ""
    return f"{why}. {HOW_TO_LEARN}"
