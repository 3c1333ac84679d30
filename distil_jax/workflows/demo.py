"""The demonstration: distils a small student on this machine in minutes, without a network.

The text is the docstrings of the installed packages, and the teacher is the small BERT that comes with this package. A
student with half of its layers is trained twice from the same start, with and without the teacher, and one table
compares all models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distil_jax.config.load import load
from distil_jax.config.model import ModelConfig
from distil_jax.config.run import EMBEDDED_TEACHER, check_seeds
from distil_jax.data.prepare import PrepareConfig
from distil_jax.evaluation.held_out import evaluate
from distil_jax.evaluation.speed import encoder_seconds
from distil_jax.files import unfinished
from distil_jax.io.metrics import read_metrics
from distil_jax.models.encoder import count_parameters
from distil_jax.reporting.history import history
from distil_jax.reporting.markdown import mean_and_spread
from distil_jax.reporting.masked_words import prediction_table
from distil_jax.reporting.page import Paragraph, Table, to_markdown
from distil_jax.reporting.report import write_report
from distil_jax.runtime.run_folder import open_model
from distil_jax.schema import InputError, require
from distil_jax.workflows.export import export
from distil_jax.workflows.prepare import prepare_rows
from distil_jax.workflows.train import train

TEXT = PrepareConfig(sources=("docstrings",), tokenizer=str(EMBEDDED_TEACHER), sequence_length=128, held_out=0.05)
_EXAMPLES = (
    "this function returns a new [MASK] of the given shape and type.",
    "if true, the input is sorted in ascending [MASK].",
    "raises an error if the [MASK] is not found.",
)

_COLUMNS = (
    "held-out text", "parameters", "size", "MLM loss", "accuracy", "perplexity", "agreement", "tokens/s", "trained in",
)  # fmt: skip
_NOTE = (
    "Agreement: how often a model's first choice at a masked token is the teacher's. Tokens/s: the encoder alone, "
    "32 rows of 128 tokens at a time. Both students took the same steps on the same rows and masks."
)


def demo(
    output: Path, *, seeds: Sequence[int] = (0,), overrides: Sequence[str] = (), text: PrepareConfig = TEXT
) -> dict[str, list[dict[str, float]]]:
    """Prepares the text, trains a student with and without the teacher, evaluates all models and writes a report.

    A second call resumes what the first one began.

    Args:
      output: the folder for rows/, distilled-SEED/, undistilled-SEED/, student/, report.md, report.html, curves.png.
      seeds: both students are trained once per seed, which decides the order of the rows and the masks.
      overrides: `section.key=value`, for the student's configuration.
      text: what to prepare.

    Returns:
      Held-out metrics by model, one dictionary per seed where the seed matters.

    Raises:
      InputError: as `prepare_rows` and `train`, or an override of a key that the demonstration sets itself.
    """
    start = time.monotonic()
    check_seeds(*seeds)
    require(len(set(seeds)) == len(seeds) > 0, f"Each seed may be named once, but they are {list(seeds)}.")
    for override in overrides:
        key = override.partition("=")[0].strip()
        reserved = key in ("seed", "teacher.path", "data.path")
        require(not reserved, f"demo sets {key} itself: leave it out of --set (--seeds names the seeds).")
    rows = output / "rows"
    drafts = set(unfinished(rows))  # of earlier calls that were killed while they prepared the rows
    if output.exists() and not (output.is_dir() and (rows.exists() or drafts.issuperset(output.iterdir()))):
        raise InputError(f"{output} holds something other than a demonstration: name a new folder with --output.")
    if not rows.exists():
        _title("Preparing text: the docstrings of the installed packages")
        print(prepare_rows(text, rows))
    config = load("demo_student", [f"teacher.path={EMBEDDED_TEACHER}", f"data.path={rows}", *overrides])
    undistilled = replace(config, loss=replace(config.loss, kl=0.0, cosine=0.0, mse=0.0))
    for seed in seeds:
        _title(f"Seed {seed}: training a student with half of the teacher's layers, with the teacher")
        train(replace(config, seed=seed), output / f"distilled-{seed}")
        _title(f"Seed {seed}: training the same student from the same start, without the teacher")
        train(replace(undistilled, seed=seed), output / f"undistilled-{seed}")
    _title("Comparing the models")
    metrics = _report(output, seeds, config.train.eval_rows)
    print(f"\nAll of it took {(time.monotonic() - start) / 60:.1f} minutes. The report is {output / 'report.md'} with")
    print(f"{output / 'curves.png'}; {output / 'report.html'} shows both in a browser, and {output / 'student'} is the")
    print("student as a folder that transformers opens.")
    print("\nNext, your own BERT (a folder or a hub id) on your own text:")
    print("  distil-jax prepare YOUR_TEXT.txt --tokenizer YOUR_BERT --output rows")
    print("  distil-jax train small --set teacher.path=YOUR_BERT --set data.path=rows --output run")
    print("  distil-jax export run student")
    return metrics


def _report(output: Path, seeds: Sequence[int], limit: int) -> dict[str, list[dict[str, float]]]:
    """Evaluates and times all models, prints the table, writes the report, and exports the distilled student."""
    teacher, student = open_model(EMBEDDED_TEACHER), open_model(output / f"distilled-{seeds[0]}")
    runs = {name: [output / f"{name}-{seed}" for seed in seeds] for name in ("distilled", "undistilled")}
    lines = {name: [read_metrics(folder) for folder in folders] for name, folders in runs.items()}
    held_out = {
        name: [[line for line in run_lines if line["kind"] == "held_out"] for run_lines in lines[name]]
        for name in lines
    }
    metrics = {
        "teacher": [evaluate(teacher, output / "rows", limit=limit) | {"agreement": 1.0}],
        "student, untrained": [held_out["distilled"][0][0]],
        "student, distilled": [evaluations[-1] for evaluations in held_out["distilled"]],
        "student, no teacher": [evaluations[-1] for evaluations in held_out["undistilled"]],
    }
    trained = {"student, distilled": lines["distilled"], "student, no teacher": lines["undistilled"]}
    length = teacher.config.max_positions
    seconds = encoder_seconds({"teacher": teacher, "student": student}, rows=32, length=length)
    rows = []
    for name, by_seed in metrics.items():
        kind, model = ("teacher", teacher) if name == "teacher" else ("student", student)
        training_seconds = [history(run_lines).step_seconds for run_lines in trained.get(name, ())]
        rows.append(_row(name, model.config, by_seed, 32 * length / seconds[kind], training_seconds))
    note = _NOTE + (f" Mean ± standard deviation over {len(seeds)} seeds." if len(seeds) > 1 else "")
    head, examples = [Table(_COLUMNS, rows), Paragraph(note)], prediction_table(teacher, student, _EXAMPLES)
    print(to_markdown([*head, *examples]), end="")
    if not (output / "student").exists():
        export(student, output / "student")
    shown = {"distilled": runs["distilled"][0], "without the teacher": runs["undistilled"][0]}
    write_report(shown, output, title="A student distilled on this machine", head=head, examples=examples)
    return metrics


def _row(
    name: str, model: ModelConfig, metrics: list[dict[str, float]], speed: float, seconds: list[float]
) -> list[str]:
    """One row of the table; `metrics` and the training time `seconds` have one item per seed, `speed` is tokens/s."""
    parameters = count_parameters(model)
    return [
        name,
        f"{parameters:,}",
        f"{4 * parameters / 1e6:.1f} MB",
        mean_and_spread([of_seed["mlm"] for of_seed in metrics], 3),
        mean_and_spread([100 * of_seed["accuracy"] for of_seed in metrics], 1, " %"),
        mean_and_spread([of_seed["perplexity"] for of_seed in metrics], 1),
        mean_and_spread([100 * of_seed["agreement"] for of_seed in metrics], 1, " %"),
        f"{speed:,.0f}",
        mean_and_spread(seconds, 0, " s"),
    ]


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)
