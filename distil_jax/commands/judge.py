"""How good a model is at a task: its logits for labelled examples, and the task's metrics of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distil_jax.config import StepConfig
from distil_jax.data.spans import answers
from distil_jax.data.tasks import TaskTable, task_eval_batches
from distil_jax.objective.scores import scores
from distil_jax.structs import IGNORED
from distil_jax.task_config import TaskConfig
from distil_jax.training.sharding import jit_eval, local_places, put_rows
from distil_jax.training.state import TrainState, abstract_state
from distil_jax.training.step import task_eval_step


class Judge:
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

    def numbers(self, params: Any, table: TaskTable, *, limit: int = 0) -> dict[str, float]:
        """The metrics, as shares, and the mean loss.

        Args:
          params: on the mesh.
          table: the examples.
          limit: only so many; 0: all, and always all of spans, whose examples have several rows.
        """
        limit = 0 if self._task.kind == "spans" else limit
        zero, key = jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(0))
        state = TrainState(step=zero, skipped=zero, params=params, opt_state=None, key=key, config=self._step)
        sums, found = None, []
        places = local_places(self._mesh, self._batch_rows)
        for batch in task_eval_batches(table, batch_rows=self._batch_rows, limit=limit, places=places):
            metrics, logits = self._eval(state, None, put_rows(batch, self._mesh, batch_rows=self._batch_rows))
            sums = metrics if sums is None else jax.tree.map(jnp.add, sums, metrics)
            found.append(logits)  # fetched at the end: the host waits once
        rows = min(limit or len(table), len(table))
        logits = [row for batch in jax.device_get(found) for row in batch][:rows]
        return {**self._scores(logits, table), "loss": float(sums["loss"].value())}

    def _scores(self, logits: list[np.ndarray], table: TaskTable) -> dict[str, float]:
        metrics, labels = self._task.judges, table.labels[: len(logits)]
        if self._task.kind == "regression":
            return scores(metrics, np.array(logits)[:, 0], labels)
        if self._task.kind == "sequence":
            return scores(metrics, np.argmax(logits, axis=-1), labels)
        if self._task.kind == "tokens":
            named = [
                [self._label_names[numbers[: len(row)][where]].tolist() for numbers in (row.argmax(axis=-1), truth)]
                for row, truth in zip(logits, labels, strict=True)
                for where in (truth[: len(row)] != IGNORED,)
            ]
            return scores(metrics, [ours for ours, _ in named], [truth for _, truth in named])
        length = table.input_ids.shape[1]
        first_NxL, last_NxL = (
            np.stack([np.pad(row[:, end], (0, length - len(row)), constant_values=-np.inf) for row in logits])
            for end in (0, 1)
        )
        return scores(metrics, answers(table, first_NxL, last_NxL, self._task.max_answer), table.references)
