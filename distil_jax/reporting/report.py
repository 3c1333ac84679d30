"""Writes the report of one or more runs: report.md, report.html and curves.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distil_jax.config.run import Config
from distil_jax.files import write_whole
from distil_jax.io.metrics import read_metrics
from distil_jax.reporting.curves import draw_curves, resumed_after
from distil_jax.reporting.history import history
from distil_jax.reporting.masked_words import check_texts, masked_word_examples
from distil_jax.reporting.page import Block, Heading, Paragraph, to_html, to_markdown
from distil_jax.reporting.sections import best_checkpoint, by_seed, details, held_out, over_seeds, summary, throughput
from distil_jax.runtime.run_folder import is_run, read_config
from distil_jax.schema import InputError

_RESUMED = (
    "A dotted vertical line marks where a run was resumed. The first number of training after it is that of one step, "
    "while the others are means over several."
)


def write_report(
    runs: dict[str, Path],
    output: Path,
    *,
    title: str = "",
    head: Sequence[Block] = (),
    examples: Sequence[Block] | None = None,
    texts: Sequence[str] = (),
) -> Path:
    """Writes `curves.png`, `report.md` and `report.html` into `output`, and returns the path of report.md.

    Args:
      runs: run folders, by the names under which they are shown.
      output: a folder, which is made if it does not exist.
      title: of the page; default: the names of the runs.
      head: blocks to put before the held-out results and the curves.
      examples: what the models predict for masked words; None: `masked_word_examples` of the first run.
      texts: sentences for these; none: sentences of the held-out rows.

    Raises:
      InputError: a folder is not a run or has no metrics yet, or a text does not have exactly one [MASK].
    """
    metrics = {}
    for name, folder in runs.items():
        metrics[name] = read_metrics(folder) if is_run(folder) else []
        if not metrics[name]:
            raise InputError(f"{folder} is not a run with metrics: name a folder that `distil-jax train` wrote.")
    first = next(iter(runs.values()))
    check_texts(first, texts)
    histories = {name: history(lines) for name, lines in metrics.items()}
    configs = {name: read_config(folder) for name, folder in runs.items()}
    title = title or ", ".join(runs)
    groups = by_seed(configs)
    repeated, results = len(groups) < len(runs), held_out(histories)
    if repeated:  # results are of all runs of a group, everything else of its first run
        results = over_seeds({name: [histories[run] for run in group] for name, group in groups.items()})
        title = ", ".join(groups) if title == ", ".join(runs) else title
        metrics, histories, configs, runs = (
            {name: values[group[0]] for name, group in groups.items()} for values in (metrics, histories, configs, runs)
        )
    print("Drawing the curves ...", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    curves = draw_curves(metrics, output / "curves.png")
    blocks = [Heading(title, 1)]
    for name, folder in runs.items():
        blocks += summary(folder, histories[name], configs[name], lead=f"{name}:" if len(runs) > 1 else "")
    blocks += [*head, Heading("Held out"), results]
    for name, folder in runs.items():
        blocks += best_checkpoint(folder, lead=f"{name}:" if len(runs) > 1 else "")
    blocks += [Heading("Curves"), curves]
    if any(resumed_after(lines) for lines in metrics.values()):
        blocks += [Paragraph(_RESUMED)]
    if repeated:
        blocks += [Paragraph("For each configuration, the curves show the run of its first seed.")]
    blocks += [Heading("Throughput"), *throughput(histories)]
    if isinstance(next(iter(configs.values())), Config):  # a fine-tuned model has no MLM head
        if examples is None:
            print("Asking the models for masked words ...", flush=True)
            examples = masked_word_examples(first, texts)
        blocks += [Heading("Masked words"), *examples]
    for name in runs:
        blocks += [Heading(name if len(runs) > 1 else "Details"), *details(histories[name], configs[name])]
    write_whole(output / "report.html", to_html(title, blocks))
    path = output / "report.md"
    write_whole(path, to_markdown(blocks))
    return path
