"""Model cards: how a model was trained, on what data and with what results, from the files of its run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distil_jax.config.model import ModelConfig
from distil_jax.config.run import Config
from distil_jax.data.summary import data_problems
from distil_jax.io.metrics import read_metrics
from distil_jax.io.names import short_name, source_name
from distil_jax.models.encoder import count_parameters
from distil_jax.objective.distillation import Distillation
from distil_jax.reporting.card_head import head_lines
from distil_jax.reporting.markdown import table
from distil_jax.reporting.task_scores import read_scores, score_notes, score_table
from distil_jax.reporting.usage import usage
from distil_jax.runtime.run_folder import Model
from distil_jax.schema import build


def model_card(model: Model, *, licence: str = "", languages: Sequence[str] = ()) -> str:
    """The text of README.md for an exported model.

    Args:
      model: from `open_model`.
      licence: by the name that the Hugging Face hub has for it, such as "apache-2.0"; empty: the card says none.
      languages: of the text, by their codes, such as "en".
    """
    body = _short_card if model.run is None else _language_model_card if model.head is None else _task_card
    return "\n".join([*head_lines(model, licence, languages), *body(model)])


def _language_model_card(model: Model) -> list[str]:
    metadata, config = model.metadata, model.run_config
    data = metadata["data"]
    if metadata["teacher"]:
        teacher = build(ModelConfig, metadata["teacher"])
        lines = [
            f"A {model.config.num_layers}-layer student ({count_parameters(model.config):,} parameters) of "
            f"`{short_name(config.teacher.path)}` ({teacher.num_layers} layers, {count_parameters(teacher):,} "
            f"parameters), {_method(config)} with distil_jax {metadata['version']}.",
        ]
    else:
        how = "with a teacher of its user's own" if "teacher" in metadata.get("custom", {}) else "without a teacher"
        lines = [
            f"A {model.config.num_layers}-layer masked language model ({count_parameters(model.config):,} parameters), "
            f"trained {how} with distil_jax {metadata['version']}.",
        ]
    lines += ["", *usage(model), "", "## Training", "", *_training(model), ""]
    lines += ["## Held-out text", "", *_held_out(model), ""]
    lines += [
        *_text(data),
        "",
        "## Limits",
        "",
        "A masked language model reproduces what its training text and its teacher contain, including their biases. "
        "The licences of the text and of the teacher also apply to it.",
        "",
    ]
    return lines


def _task_card(model: Model) -> list[str]:
    metadata, config = model.metadata, model.run_config
    task, loss, optimizer = config.task, config.loss, config.optimizer
    teacher = ""
    if metadata["teacher"]:
        teacher = (
            f", with `{short_name(config.teacher.path)}` as its teacher (weight {loss.soft:g} at temperature "
            f"{loss.temperature:g}, {loss.task:g} on the labels)"
        )
    own, adamw = metadata.get("custom", {}), ""
    if "optimizer" not in own:
        adamw = (
            f"; AdamW: learning rate {optimizer.learning_rate:g}, betas {optimizer.beta1:g} and {optimizer.beta2:g}, "
            f"weight decay {optimizer.weight_decay:g}, warm-up {optimizer.warmup:.0%}, clip {optimizer.clip:g}"
        )
    train = _code(source_name(task.train))
    dev = f"from {_code(source_name(task.dev))}" if task.dev else "held out of them by a hash"
    lines = [
        f"`{short_name(config.model.path)}` ({model.config.num_layers} layers, {count_parameters(model.config):,} "
        f"parameters in the encoder) fine-tuned with distil_jax {metadata['version']}{teacher}.",
        "",
        *usage(model),
        "",
        "## Task",
        "",
        f"- {task.kind}: {', '.join(map(_code, task.text))} to {_code(task.label)}"
        + (f" ({', '.join(task.label_names[:20])})" if task.label_names else ""),
        f"- {metadata['data']['examples']:,} examples to train on from {train}; the best checkpoint was "
        f"chosen on {metadata['data']['dev']:,} examples {dev}",
        f"- at most {task.max_length} tokens per row",
        *_data_problems(metadata["data"].get("counts", {})),  # older runs have no counts
        "",
        "## Training",
        "",
        f"- step {model.step:,} of {config.train.steps:,}, each of {config.train.batch_rows:,} examples{adamw}; "
        f"dropout {model.config.hidden_dropout:g} and {model.head.dropout:g} before the last layer; seed {config.seed}",
        *_own_parts(own),
        "",
    ]
    scores = read_scores(model.run)
    if scores and scores["step"] == model.step:  # the file may be of another checkpoint
        lines += ["## Results", "", *table(*score_table(scores)), ""]
        lines += [line for note in score_notes(scores) for line in (note, "")]
    return lines


def _data_problems(counts: dict[str, dict[str, int]]) -> list[str]:
    """A line for each split with examples that were cut, lost or doubtful."""
    problems = {split: ", ".join(data_problems(of_split)) for split, of_split in counts.items()}
    return [f"- {split}: {text}" for split, text in problems.items() if text]


def _code(text: str) -> str:
    return f"`{text}`"


def _method(config: Config) -> str:
    if not config.loss.needs_teacher:
        return "started from its layers but trained without it"
    return "distilled"


def _training(model: Model) -> list[str]:
    config, metadata, data = model.run_config, model.metadata, model.metadata["data"]
    loss, optimizer, batch_rows = config.loss, config.optimizer, config.train.batch_rows
    weights = ", ".join(f"{name} {weight:g}" for name, weight in Distillation(loss).weights.items())
    if config.student.layers:
        start = f"the teacher's layers {', '.join(map(str, config.student.layers))}"
    elif config.student.init == "random":
        start = "random parameters"
    else:
        start = f"`{short_name(config.student.init)}`"
    tokens = model.step * batch_rows * data["tokens"] / data["rows"]
    own = metadata.get("custom", {})
    lines = [
        f"- initialised from: {start}",
        f"- steps: {model.step:,} of {config.train.steps:,}, each of {batch_rows:,} rows of {data['sequence_length']} "
        f"tokens; about {tokens:,.0f} tokens in all, from a corpus of {data['tokens']:,}",
    ]
    if "objective" not in own:
        lines.append(f"- loss weights: {weights}{f', temperature {loss.temperature:g}' if loss.kl else ''}")
    lines.append(f"- masking: {config.masking.rate:.0%} of the tokens, smoothing {config.masking.smoothing:g}")
    if "optimizer" not in own:
        lines.append(
            f"- AdamW: learning rate {optimizer.learning_rate:g}, betas {optimizer.beta1:g} and {optimizer.beta2:g}, "
            f"eps {optimizer.eps:g}, weight decay {optimizer.weight_decay:g}, warm-up {optimizer.warmup:.0%}, clip "
            f"{optimizer.clip:g}"
        )
    return [*lines, *_own_parts(own), f"- {config.compute.dtype}; seed {config.seed}"]


def _own_parts(custom: dict[str, Any]) -> list[str]:
    """A line on the objective, optimiser and teacher that the user wrote, if there are some."""
    parts = ", ".join(f"{name} {_code(part['class'])}" for name, part in custom.items())
    return [f"- the user's own parts, instead of the recipe's: {parts}"] if parts else []


def _held_out(model: Model) -> list[str]:
    """A table of the run's first evaluation and the last one up to the exported step, and the teacher's own numbers."""
    lines = read_metrics(model.run)
    evaluations = [line for line in lines if line["kind"] == "held_out" and line["step"] <= model.step]
    if not evaluations:
        return ["This run has no evaluation up to the exported step."]
    names = [name for name in evaluations[-1] if name not in ("step", "kind")]
    rows = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    cells = [(f"{row['step']:,}", *(f"{row.get(name, math.nan):.4f}" for name in names)) for row in rows]
    note = ""
    for row in (line for line in lines if line["kind"] == "teacher"):
        cells.append(("teacher", *(f"{row[name]:.4f}" if name in row else "" for name in names)))
        note = " The teacher's row is how well it predicts the same words itself."
    return [
        *table(("step", *names), cells, text_columns=0),
        "",
        "mlm is the cross entropy at the masked positions. kl (at temperature 1) and agreement compare the student "
        "with the teacher at these positions." + note,
    ]


def _text(data: dict[str, Any]) -> list[str]:
    sources = ", ".join(_code(source_name(source)) for source in data["sources"])
    lines = [
        f"The text: {sources}. {data['held_out_tokens']:,} tokens of it were held out, chosen by a hash of each "
        "document, and not trained on in this run."
    ]
    if problems := _text_problems(data.get("counts", {})):  # older runs have no counts
        lines += ["", f"Of the text, {problems}."]
    if "docstrings" in data["sources"]:
        lines += [
            "",
            "The docstrings are English paragraphs from the installed packages, without duplicates (two paragraphs "
            "with the same first 60 words count as duplicates). A document is everything under the same last name (of "
            "a function, class or module), because numpy, jax.numpy and pandas repeat each other. A paragraph under "
            "several names is held out only if all of them are, and only if it has at most 60 words, because longer "
            "ones are cut and may repeat each other after the first words.",
        ]
    return lines


def _text_problems(counts: dict[str, int]) -> str:
    """How much of the text was left out or cut, and why."""
    texts = {
        "cut_sequences": "sequences longer than a row were cut into several",
        "dropped_short": "sequences were dropped because they were too short",
        "dropped_unknown": "sequences were dropped because most of their words were unknown",
        "invalid_lines": "lines were skipped because they were not UTF-8",
        "left_out_files": "files in its folders were left out",
        "empty_files": "files had no text",
        "empty_records": "records were empty",
        "unnamed_fields": "rows had fields without a name, which were left out",
    }
    return ", ".join(f"{counts[name]:,} {text}" for name, text in texts.items() if counts.get(name))


def _short_card(model: Model) -> list[str]:
    """The card of a model that does not come from a run."""
    return [f"{count_parameters(model.config):,} parameters. Written by distil_jax.", "", *usage(model), ""]
