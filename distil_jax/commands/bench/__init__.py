"""`distil-jax bench`: how fast the real programs run here, alone or beside PyTorch's."""

from __future__ import annotations

import argparse
import os

from distil_jax.commands.bench import data, inference, loss, record, step
from distil_jax.schema import require

_MEASUREMENTS = {"step": step, "loss": loss, "data": data, "inference": inference}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax bench`, a set for each measurement."""
    kinds = parser.add_subparsers(dest="measurement", required=True, metavar="MEASUREMENT")
    for name, module in _MEASUREMENTS.items():
        what = module.__doc__.partition(": ")[2].partition("\n")[0].rstrip(".")
        kind = kinds.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        module.add_arguments(kind)
        kind.add_argument("--output", metavar="FILE", help="also write the results there, as JSON")
    table = kinds.add_parser("table", help="Markdown of result files", description="Prints result files as Markdown.")
    table.add_argument("files", nargs="*", metavar="FILE", help="what --output wrote (default: the results we keep)")


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints a table, or prints the tables of earlier results."""
    if arguments.measurement == "table":
        files = arguments.files or sorted(record.KEPT.glob("*.json"))
        require(bool(files), f"No results are kept in {record.KEPT}: name files that `bench --output` wrote.")
        print("\n\n".join(record.show(record.read(file)) for file in files))
        return
    record.check_output(arguments.output)
    load = os.getloadavg()[0]
    results = record.record(arguments, _MEASUREMENTS[arguments.measurement].run(arguments), load)
    print(record.show(results))
    if arguments.output:
        record.write(arguments.output, results)
        print(f"\nWrote {arguments.output}.")
