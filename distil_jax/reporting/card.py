"""A model's card: what was done, with what, and how well it went, from the run's own files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distil_jax.config.model import ModelConfig
from distil_jax.data.summary import data_problems
from distil_jax.io.metrics import read_metrics
from distil_jax.models.encoder import count_parameters
from distil_jax.objective.distillation import Distillation
from distil_jax.reporting.markdown import table
from distil_jax.runtime.run_folder import Model
from distil_jax.schema import build

_PIPELINES = {"sequence": "text-classification", "tokens": "token-classification", "spans": "question-answering"}


def model_card(model: Model) -> str:
    """The text of README.md for an exported model."""
    if model.run is None:
        return _plain_card(model)
    return _card(model) if model.head is None else _task_card(model)


def _card(model: Model) -> str:
    """The sections of a distilled student's card, from the run's own files."""
    facts, config = model.metadata, model.run_config
    data, train = facts["data"], config.train
    lines = [*_front_matter(model), f"# {model.run.resolve().name}", ""]
    if facts["teacher"]:
        teacher = build(ModelConfig, facts["teacher"])
        lines += [
            f"A {model.config.num_layers}-layer student ({count_parameters(model.config):,} parameters) of "
            f"`{Path(config.teacher.path).name}` ({teacher.num_layers} layers, {count_parameters(teacher):,} "
            f"parameters), {_how(config)} with distil_jax {facts['version']}.",
        ]
    else:
        lines += [
            f"A {model.config.num_layers}-layer masked language model ({count_parameters(model.config):,} parameters), "
            f"trained without a teacher with distil_jax {facts['version']}.",
        ]
    lines += ["", "## Training", "", *_training(model, data, train.batch_rows), ""]
    lines += ["## Held-out text", "", *_held_out(model), ""]
    lines += [
        *_text(data),
        "",
        "## Limits",
        "",
        "A masked language model repeats what its training text and its teacher say, biases included. Licences of the "
        "text and of the teacher apply to it as they apply to them.",
        "",
    ]
    return "\n".join(lines)


def _task_card(model: Model) -> str:
    """The sections of a fine-tuned model's card."""
    facts, config = model.metadata, model.run_config
    task, loss, optimizer = config.task, config.loss, config.optimizer
    teacher = (
        f", with `{_named(config.teacher.path)}` as its teacher (weight {loss.soft:g} at temperature "
        f"{loss.temperature:g}, {loss.task:g} on the labels)"
        if facts["teacher"]
        else ""
    )
    lines = [*_front_matter(model), f"# {model.run.resolve().name}", ""]
    lines += [
        f"`{Path(config.model.path).name}` ({model.config.num_layers} layers, {count_parameters(model.config):,} "
        f"parameters in the encoder) fine-tuned with distil_jax {facts['version']}{teacher}.",
        "",
        "## Task",
        "",
        f"- {task.kind}: {', '.join(map(_code, task.text))} to {_code(task.label)}"
        + (f" ({', '.join(task.label_names[:20])})" if task.label_names else ""),
        f"- {facts['data']['examples']:,} examples to train on from {_code(task.train)}, {facts['data']['dev']:,} to "
        f"choose the best checkpoint by{f' from {_code(task.dev)}' if task.dev else ', held out of them by a hash'}",
        f"- at most {task.max_length} tokens",
        *_doubtful(facts["data"].get("counts", {})),  # older runs do not know
        "",
        "## Training",
        "",
        f"- step {model.step:,} of {config.train.steps:,}, each of {config.train.batch_rows:,} examples; AdamW: "
        f"learning rate {optimizer.learning_rate:g}, betas {optimizer.beta1:g} and {optimizer.beta2:g}, weight decay "
        f"{optimizer.weight_decay:g}, warm-up {optimizer.warmup:.0%}, clip {optimizer.clip:g}; dropout "
        f"{model.config.hidden_dropout:g} and {model.head.dropout:g} before the last layer; seed {config.seed}",
        "",
    ]
    scores = model.run / "scores.json"
    if scores.exists():
        judged = json.loads(scores.read_text(encoding="utf-8"))
        if judged["step"] == model.step:  # scores of another checkpoint are not this model's
            lines += ["## Scores", "", *_scores(judged), ""]
    return "\n".join(lines)


def _doubtful(counts: dict[str, dict[str, int]]) -> list[str]:
    """A line for each split with examples that were cut, lost or doubtful."""
    problems = {split: ", ".join(data_problems(of_split)) for split, of_split in counts.items()}
    return [f"- {split}: {text}" for split, text in problems.items() if text]


def _named(path: str) -> str:
    """A model's name in its path, where RUN/model and compare's NAME/SEED/model say what it is further up."""
    parts = [part for part in Path(path).parts if part != "model" and not part.isdigit()]
    return parts[-1] if parts else path


def _code(text: str) -> str:
    return f"`{text}`"


def _scores(judged: dict[str, Any]) -> list[str]:
    splits = [split for split in ("dev", "test") if split in judged]
    return table(
        ["examples", *judged["dev"]],
        [[split, *(f"{number:.4f}" for number in judged[split].values())] for split in splits],
    )


def _how(config: Any) -> str:
    if not config.loss.needs_teacher:
        return "started from its layers but trained without it"
    return "distilled"


def _training(model: Model, data: dict[str, Any], batch_rows: int) -> list[str]:
    config = model.run_config
    loss, optimizer = config.loss, config.optimizer
    weights = ", ".join(f"{name} {weight:g}" for name, weight in Distillation(loss).weights.items())
    begin = (
        f"the teacher's layers {', '.join(map(str, config.student.layers))}"
        if config.student.layers
        else "random parameters"
        if config.student.init == "random"
        else f"`{Path(config.student.init).name}`"
    )
    tokens = model.step * batch_rows * data["tokens"] / data["rows"]
    return [
        f"- begins with: {begin}",
        f"- steps: {model.step:,} of {config.train.steps:,}, each of {batch_rows:,} rows of {data['sequence_length']} "
        f"tokens; about {tokens:,.0f} tokens in all, of a corpus of {data['tokens']:,}",
        f"- loss: {weights}{f', temperature {loss.temperature:g}' if loss.kl else ''}",
        f"- masking: {config.masking.rate:.0%} of the tokens, smoothing {config.masking.smoothing:g}",
        f"- AdamW: learning rate {optimizer.learning_rate:g}, betas {optimizer.beta1:g} and {optimizer.beta2:g}, eps "
        f"{optimizer.eps:g}, weight decay {optimizer.weight_decay:g}, warm-up {optimizer.warmup:.0%}, clip "
        f"{optimizer.clip:g}; {config.compute.dtype}; seed {config.seed}",
    ]


def _held_out(model: Model) -> list[str]:
    """The evaluations of the run, first and last up to the exported step, as a table."""
    evaluations = [
        line for line in read_metrics(model.run) if line["kind"] == "held_out" and line["step"] <= model.step
    ]
    if not evaluations:
        return ["This run has no evaluation up to this step."]
    names = [name for name in evaluations[-1] if name not in ("step", "kind")]
    rows = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    cells = [(f"{row['step']:,}", *(f"{row.get(name, math.nan):.4f}" for name in names)) for row in rows]
    return [
        *table(("step", *names), cells, texts=0),
        "",
        "mlm is the cross entropy at the masked positions, kl (temperature 1) and agreement compare with the teacher "
        "there.",
    ]


def _text(data: dict[str, Any]) -> list[str]:
    sources = ", ".join(f"`{source}`" for source in data["sources"])
    lines = [
        f"The text: {sources}. Held out by a hash of each document: {data['held_out_tokens']:,} tokens, never trained "
        "on in this run."
    ]
    if lost := _left_out(data.get("counts", {})):  # older runs do not know
        lines += ["", f"Of it {lost}."]
    if "docstrings" in data["sources"]:
        lines += [
            "",
            "Docstrings are those of the installed packages: paragraphs of English, each once (two with the same 60 "
            "first words are one). A document is what stands under one last name (of a function, class or module), "
            "because numpy, jax.numpy and pandas repeat each other; a paragraph under several names is held out only "
            "if all of them are, and only if it has at most 60 words: longer ones are cut, and their inner parts "
            "repeat each other.",
        ]
    return lines


def _left_out(counts: dict[str, int]) -> str:
    """A sentence about the text that was left out or cut."""
    texts = {
        "cut_sequences": "sequences longer than a row were cut into several",
        "dropped_short": "sequences were dropped as too short",
        "dropped_unknown": "sequences were dropped as mostly unknown words",
        "invalid_lines": "lines were skipped as not UTF-8",
        "left_out_files": "files of its folders were left out",
        "empty_files": "files held no text",
        "empty_records": "records were empty",
        "unnamed_fields": "rows held something in fields without a name, which was left out",
    }
    return ", ".join(f"{counts[name]:,} {text}" for name, text in texts.items() if counts.get(name))


def _plain_card(model: Model) -> str:
    return "\n".join(
        [*_front_matter(model), f"{count_parameters(model.config):,} parameters. Written by distil_jax.", ""]
    )


def _front_matter(model: Model) -> list[str]:
    pipeline = _PIPELINES[model.head.kind] if model.head else "fill-mask"
    return ["---", "library_name: transformers", f"pipeline_tag: {pipeline}", "tags: [distil_jax]", "---", ""]
