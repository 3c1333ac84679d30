"""The scores of a fine-tuned model, from its run's scores.json, as a table and sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distil_jax.evaluation.tasks import nothing_learned


def read_scores(run: Path) -> dict[str, Any] | None:
    """The contents of a run's scores.json, or None before it is written."""
    file = run / "scores.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def score_table(scores: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table: for each split the model's metrics, and those of the largest class.

    Args:
      scores: of `read_scores`; those of older runs lack the largest class.
    """
    metrics, rows = list(scores["dev"]), []
    largest_class = scores.get("largest_class", {})
    for split in (split for split in ("dev", "test") if split in scores):
        for name, values in ((split, scores[split]), (f"{split}, largest class", largest_class.get(split))):
            if values:
                rows.append([name, *(f"{values[metric]:.4f}" if metric in values else "" for metric in metrics)])
    return ["examples", *metrics], rows


def score_notes(scores: dict[str, Any]) -> list[str]:
    """Sentences about the table: what the largest class is, and whether nothing was learned."""
    notes = []
    if "largest_class" in scores:
        notes.append(
            f'Largest class: what a model scores whose every prediction is "{scores["constant"]}", which suits the '
            "training labels best (the most frequent class or answer, or the mean of numbers)."
        )
        splits = {split: scores[split] for split in ("dev", "test") if split in scores}
        if sentence := nothing_learned(splits, scores["largest_class"], scores["only_prediction"]):
            notes.append(sentence)
    return notes
