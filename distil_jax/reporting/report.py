"""The report of a run: report.md, report.html and curves.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distil_jax.config.run import Config
from distil_jax.files import write_whole
from distil_jax.io.metrics import read_metrics
from distil_jax.reporting.curves import draw_curves
from distil_jax.reporting.masked_words import check_texts, examples
from distil_jax.reporting.history import history
from distil_jax.reporting.page import Block, Heading, Paragraph, to_html, to_markdown
from distil_jax.reporting.sections import by_seed, details, held_out, over_seeds, summary, throughput
from distil_jax.runtime.run_folder import is_run, read_config
from distil_jax.schema import InputError


def write_report(
    runs: dict[str, Path],
    output: Path,
    *,
    title: str = "",
    head: Sequence[Block] = (),
    gaps: Sequence[Block] | None = None,
    texts: Sequence[str] = (),
) -> Path:
    """Writes `curves.png`, `report.md` and `report.html` into `output`, and returns the path of report.md.

    Args:
      runs: run folders by the name they are shown under.
      output: a folder.
      title: of the page.
      head: stands before the curves.
      gaps: what models put in gaps; None: `examples` of the first run.
      texts: for these; none: sentences of the held-out rows.

    Raises:
      InputError: a folder that is no run, or has no numbers yet; a text without exactly one gap.
    """
    metrics = {}
    for name, folder in runs.items():
        metrics[name] = read_metrics(folder) if is_run(folder) else []
        if not metrics[name]:
            raise InputError(f"{folder} is not a run with numbers in it: name what `distil-jax train` wrote.")
    first = next(iter(runs.values()))
    check_texts(first, texts)
    histories = {name: history(lines) for name, lines in metrics.items()}
    configs = {name: read_config(folder) for name, folder in runs.items()}
    title = title or ", ".join(runs)
    together = by_seed(configs)
    repeated, results = len(together) < len(runs), held_out(histories)
    if repeated:  # each is shown by its first run, and judged by all of them
        results = over_seeds({name: [histories[each] for each in names] for name, names in together.items()})
        title = ", ".join(together) if title == ", ".join(runs) else title
        firsts = {name: names[0] for name, names in together.items()}
        metrics, histories, configs, runs = (
            {name: values[first] for name, first in firsts.items()} for values in (metrics, histories, configs, runs)
        )
    curves = draw_curves(metrics, output / "curves.png")
    blocks = [Heading(title, 1)]
    for name, folder in runs.items():
        blocks += summary(folder, histories[name], configs[name], lead=f"{name}:" if len(runs) > 1 else "")
    blocks += [*head, Heading("Held out"), results, Heading("Curves"), curves]
    if repeated:
        blocks += [Paragraph("Of each, the run with its first seed.")]
    blocks += [Heading("Throughput"), *throughput(histories)]
    if isinstance(next(iter(configs.values())), Config):  # a task's model has no words to put in a gap
        blocks += [Heading("Words in gaps"), *(examples(first, texts) if gaps is None else gaps)]
    for name in runs:
        blocks += [Heading(name if len(runs) > 1 else "Details"), *details(histories[name], configs[name])]
    write_whole(output / "report.html", to_html(title, blocks))
    path = output / "report.md"
    write_whole(path, to_markdown(blocks))
    return path
