"""Compares students with their teacher: fine-tunes all of them on tasks, and measures their size and speed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from distil_jax.config.load import load_task
from distil_jax.config.run import check_seeds
from distil_jax.config.task import FinetuneConfig
from distil_jax.evaluation.baseline import baseline_scores
from distil_jax.evaluation.speed import encoder_seconds
from distil_jax.models.encoder import count_parameters
from distil_jax.reporting.comparison import LARGEST_CLASS, Comparison, add_to_card, tables, write
from distil_jax.runtime import processes
from distil_jax.runtime.program import keep_compiled
from distil_jax.runtime.run_folder import Model, open_model
from distil_jax.schema import InputError, expand_home, quoted, require, user_path
from distil_jax.workflows.finetune import finetune_and_score

_LENGTH = 128  # tokens per row when timing, if every model has that many positions
_BASELINE = "TF-IDF + linear"
_DISTILLED = " + its logits"


def compare(
    models: dict[str, str],
    tasks: Sequence[str],
    *,
    seeds: tuple[int, ...],
    output: Path,
    overrides: Sequence[str] = (),
    distil: Sequence[str] = (),
    baseline: bool = False,
    cards: bool = False,
) -> Comparison:
    """Fine-tunes every model on every task with every seed, times the encoders, and prints and writes the tables.

    Args:
      models: name -> path; the first is the teacher.
      tasks: names in configs/tasks, or TOML files.
      seeds: one run per seed, model and task.
      output: the folder for the runs, TASK/MODEL/SEED, and for compare.md, compare.json and compare.png. Runs that are
        already finished there are not repeated.
      overrides: `section.key=value` for every run; those of [loss] and [teacher] apply to runs with a teacher.
      distil: names of students that are also fine-tuned with the fine-tuned teacher of the same seed.
      baseline: whether to add a linear model on TF-IDF features, on classification and regression tasks.
      cards: whether to add the tables to README.md in those of the models that are folders.

    Raises:
      InputError: a model, task or setting that cannot be used. Runs that were already finished stay.
    """
    _check(models, tasks, seeds, overrides, distil)
    require(output.is_dir() or not output.exists(), f"{output} is a file: name a folder for the runs.")
    teacher, task_files = next(iter(models)), {Path(task).stem: task for task in tasks}
    opened = {name: open_model(path) for name, path in models.items()}
    without_teacher = [override for override in overrides if not _needs_teacher(override)]
    start = quoted("model.path", models[teacher])
    configs = {task: load_task(file, [start, *without_teacher]) for task, file in task_files.items()}
    keep_compiled(next(iter(configs.values())).compute, output)
    scores: dict[str, dict[str, list[float]]] = {}
    for task, config in configs.items():
        baseline_row = {}
        # The baseline comes first, so that it refuses bad input before hours of training.
        if baseline and config.task.kind in ("sequence", "regression"):
            print(f"\n== {task}: {_BASELINE}", flush=True)
            baseline_row[_BASELINE] = [baseline_scores(config.task)[config.task.metric_names[0]]] * len(seeds)
        scores[task] = {}
        for name, path in models.items():
            run_config = replace(config, model=replace(config.model, path=str(path)))
            scored = [_scores(run_config, seed, output / task / name / str(seed)) for seed in seeds]
            scores[task][name] = [of_model for of_model, _ in scored]
            # The same for every model with the teacher's tokenizer, and for every seed.
            scores[task].setdefault(LARGEST_CLASS, [of_class for _, of_class in scored])
        for name in distil:
            distilled = []
            for seed in seeds:
                tuned_teacher = output / task / teacher / str(seed) / "model"
                paths = [quoted("model.path", models[name]), quoted("teacher.path", tuned_teacher)]
                run_config = load_task(task_files[task], [*paths, *overrides])
                folder = output / task / f"{name}-distilled" / str(seed)
                distilled.append(_scores(run_config, seed, folder)[0])
            scores[task][name + _DISTILLED] = distilled
        scores[task] |= baseline_row | {LARGEST_CLASS: scores[task].pop(LARGEST_CLASS)}  # the last row
        jax.clear_caches()  # the next task cannot use this task's compiled programs, which hold memory
    print("\n== Measuring the speed of the encoders", flush=True)
    length = min(_LENGTH, *(model.config.max_positions for model in opened.values()))
    comparison = Comparison(
        scores=scores,
        metrics={task: config.task.metric_names[0] for task, config in configs.items()},
        examples={task: "test" if config.task.test else "dev" for task, config in configs.items()},
        sizes=_sizes(opened, length),
        seeds=seeds,
        length=length,
    )
    _report(comparison, output, list(models.values()) if cards else [])
    return comparison


def _report(comparison: Comparison, output: Path, folders: Sequence[str]) -> None:
    """Prints the tables, and writes them to `output` and to the model cards in `folders`."""
    lines = tables(comparison)
    print("\n".join(["", *lines]))
    if processes.is_first():
        write(comparison, lines, output)
        for folder in folders:
            card = user_path(folder) / "README.md"
            if card.is_file():
                add_to_card(card, lines)
    print(f"\nWrote {output / 'compare.md'}, {output / 'compare.json'} and {output / 'compare.png'}.")


def _check(
    models: dict[str, str],
    tasks: Sequence[str],
    seeds: tuple[int, ...],
    overrides: Sequence[str],
    distil: Sequence[str],
) -> None:
    """Refuses names that are not unique, and settings that would be ignored."""
    check_seeds(*seeds)
    require(len(set(seeds)) == len(seeds) > 0, f"Each seed may be named once, but they are {seeds}.")
    unique = len({Path(task).stem for task in tasks}) == len(tasks)
    require(unique, "Two of the tasks have the same name, so the table could not tell them apart.")
    _, *students = models
    for name in distil:
        require(name in students, f"--distil names {name}, but the students are {', '.join(students) or 'none'}.")
        folder = f"{name}-distilled"
        require(folder not in models, f"{folder} is the folder of {name} with a teacher: give that model another name.")
    for override in overrides:
        key = override.partition("=")[0].strip()
        reserved = key in ("seed", "model.path", "teacher.path")
        require(not reserved, f"compare sets {key} of every run itself: leave it out of --set.")
        require(distil or not _needs_teacher(override), f"{key} needs students with a teacher: add --distil.")


def _needs_teacher(override: str) -> bool:
    return override.strip().startswith(("loss.", "teacher."))


def models_by_name(models: Sequence[str]) -> dict[str, str]:
    """Name -> path of models given as PATH or NAME=PATH; by default a model has the name of its folder.

    Raises:
      InputError: two models have the same name, or a name that cannot be one of a folder.
    """
    paths = {}
    for model in models:
        name, separator, path = model.partition("=")
        name, path = (name, path) if separator else (user_path(model).resolve().name, model)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise InputError(f"{name!r} cannot name a model: write NAME=PATH, with letters, digits, - and . in NAME.")
        if name in paths:
            raise InputError(f"Two models are called {name}: write NAME=PATH to tell them apart.")
        paths[name] = expand_home(path)
    return paths


def _scores(config: FinetuneConfig, seed: int, folder: Path) -> tuple[float, float]:
    """Fine-tunes one model; returns its score and the largest class's.

    They are the task's first metric, on the test examples if there are any, else on dev.
    """
    print(f"\n== {folder}", flush=True)
    scores = finetune_and_score(replace(config, seed=seed), folder)
    split, metric = "test" if "test" in scores.splits else "dev", config.task.metric_names[0]
    return scores.splits[split][metric], scores.largest_class[split][metric]


def _sizes(models: dict[str, Model], length: int) -> dict[str, dict[str, float]]:
    """By model: parameters of the encoder, their bytes, seconds for one row, and tokens per second for 32 rows."""
    seconds_of_1 = encoder_seconds(models, rows=1, length=length)
    seconds_of_32 = encoder_seconds(models, rows=32, length=length)
    sizes = {}
    for name, model in models.items():
        parameters = count_parameters(replace(model.config, mlm_head=False, pooler=False))
        sizes[name] = {
            "parameters": parameters,
            "bytes": 4 * parameters,
            "latency": seconds_of_1[name],
            "throughput": 32 * length / seconds_of_32[name],
        }
    return sizes
