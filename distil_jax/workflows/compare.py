"""Fine-tunes a teacher and its students on tasks, and measures what they keep of it and what they save."""

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
from distil_jax.reporting.comparison import Comparison
from distil_jax.runtime.program import keep_compiled
from distil_jax.runtime.run_folder import Model, open_model
from distil_jax.schema import InputError, expand_home, quoted, require, user_path
from distil_jax.workflows.finetune import finetune

_LENGTH = 128  # tokens a row of the timings, or as many positions as the smallest model has
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
) -> Comparison:
    """Fine-tunes every model on every task with every seed, and measures the encoders.

    Args:
      models: paths by name; the first is the teacher.
      tasks: names or TOML files.
      seeds: one run each.
      output: gets TASK/MODEL/SEED, run folders; those that are finished are not run again.
      overrides: of every run's configuration.
      distil: names of models that are also fine-tuned with the fine-tuned teacher of the same seed.
      baseline: adds a linear model of TF-IDF.

    Raises:
      InputError: a model or a task that cannot be used; runs that were finished before stay.
    """
    _check(models, tasks, seeds, overrides, distil)
    require(output.is_dir() or not output.exists(), f"{output} is a file: name a folder for the runs.")
    teacher, names = next(iter(models)), {Path(task).stem: task for task in tasks}
    opened = {name: open_model(path) for name, path in models.items()}
    plain = [override for override in overrides if not _of_a_teacher(override)]
    start = quoted("model.path", models[teacher])
    configs = {name: load_task(task, [start, *plain]) for name, task in names.items()}
    keep_compiled(next(iter(configs.values())).compute, output)
    scores: dict[str, dict[str, list[float]]] = {}
    for task, config in configs.items():
        linear = {}
        if baseline and config.task.kind in (
            "sequence",
            "regression",
        ):  # first, because what it refuses should be refused before hours of training
            print(f"\n== {task}: {_BASELINE}", flush=True)
            linear[_BASELINE] = [baseline_scores(config.task)[config.task.metric_names[0]]] * len(seeds)
        scores[task] = {}
        for name, path in models.items():
            of_task = replace(config, model=replace(config.model, path=str(path)))
            scores[task][name] = [_score(of_task, seed, output / task / name / str(seed)) for seed in seeds]
        for name in distil:
            distilled = []
            for seed in seeds:
                path = output / task / teacher / str(seed) / "model"
                paths = [quoted("model.path", models[name]), quoted("teacher.path", path)]
                of_task = load_task(names[task], [*paths, *overrides])
                distilled.append(_score(of_task, seed, output / task / f"{name}-distilled" / str(seed)))
            scores[task][name + _DISTILLED] = distilled
        scores[task] |= linear
        jax.clear_caches()  # compiled programs of one task are of no use for the next, and hold memory
    length = min(_LENGTH, *(model.config.max_positions for model in opened.values()))
    return Comparison(
        scores=scores,
        metrics={task: config.task.metric_names[0] for task, config in configs.items()},
        examples={task: "test" if config.task.test else "dev" for task, config in configs.items()},
        sizes=_sizes(opened, length),
        seeds=seeds,
        length=length,
    )


def _check(
    models: dict[str, str],
    tasks: Sequence[str],
    seeds: tuple[int, ...],
    overrides: Sequence[str],
    distil: Sequence[str],
) -> None:
    """Refuses models, tasks or settings that could not be told apart, or would be ignored."""
    check_seeds(*seeds)
    require(len(set(seeds)) == len(seeds) > 0, f"Each seed may be named once, but they are {seeds}.")
    same = len({Path(task).stem for task in tasks}) < len(tasks)
    require(not same, "Two of the tasks have the same name, so a table could not tell them apart.")
    _, *students = models
    for name in distil:
        require(name in students, f"--distil names {name}, but the students are {', '.join(students) or 'none'}.")
        taken = f"{name}-distilled"
        require(taken not in models, f"{taken} is where {name} learns from the teacher: give that model another name.")
    for override in overrides:
        key = override.partition("=")[0].strip()
        ours = key in ("seed", "model.path", "teacher.path")
        require(not ours, f"compare sets {key} of every run itself: leave it out of --set.")
        require(distil or not _of_a_teacher(override), f"{key} is of students with a teacher: add --distil.")


def _of_a_teacher(override: str) -> bool:
    return override.strip().startswith(("loss.", "teacher."))


def named(models: Sequence[str]) -> dict[str, str]:
    """Name -> path; the names head the tables and name folders."""
    named = {}
    for model in models:
        name, separator, path = model.partition("=")
        name, path = (name, path) if separator else (user_path(model).resolve().name, model)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise InputError(f"{name!r} cannot name a model: write NAME=PATH, with letters, digits, - and . in NAME.")
        if name in named:
            raise InputError(f"Two models are called {name}: write NAME=PATH to tell them apart.")
        named[name] = expand_home(path)
    return named


def _score(config: FinetuneConfig, seed: int, folder: Path) -> float:
    print(f"\n== {folder}", flush=True)
    metrics = finetune(replace(config, seed=seed), folder)
    return metrics.get("test", metrics["dev"])[config.task.metric_names[0]]


def _sizes(models: dict[str, Model], length: int) -> dict[str, dict[str, float]]:
    one = encoder_seconds(models, rows=1, length=length)
    many = encoder_seconds(models, rows=32, length=length)
    sizes = {}
    for name, model in models.items():
        parameters = count_parameters(replace(model.config, mlm_head=False, pooler=False))
        sizes[name] = {
            "parameters": parameters,
            "bytes": 4 * parameters,
            "latency": one[name],
            "throughput": 32 * length / many[name],
        }
    return sizes
