"""`distil-jax bench`: measures how fast the real programs run on this machine, alone or next to PyTorch."""

from __future__ import annotations

import argparse
import os

from distil_jax.commands.bench import data, inference, loss, record, step
from distil_jax.schema import require

_MEASUREMENTS = {"step": step, "loss": loss, "data": data, "inference": inference}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax bench`, one set per measurement."""
    kinds = parser.add_subparsers(dest="measurement", required=True, metavar="MEASUREMENT")
    for name, module in _MEASUREMENTS.items():
        summary = module.__doc__.partition(": ")[2].partition("\n")[0].rstrip(".")
        kind = kinds.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        module.add_arguments(kind)
        kind.add_argument("--output", metavar="FILE", help="also write the results to this file, as JSON")
    table = kinds.add_parser("table", help="print result files", description="Prints result files as Markdown.")
    table.add_argument("files", nargs="*", metavar="FILE", help="files that --output wrote (default: our own results)")


def run(arguments: argparse.Namespace) -> None:
    """Runs a measurement and prints its table, or prints the tables of earlier results."""
    if arguments.measurement == "table":
        files = arguments.files or sorted(record.RESULTS.glob("*.json"))
        require(bool(files), f"There are no results in {record.RESULTS}: name files that `bench --output` wrote.")
        print("\n\n".join(record.show(record.read(file)) for file in files))
        return
    record.check_output(arguments.output)
    load = os.getloadavg()[0]
    results = record.record(arguments, _MEASUREMENTS[arguments.measurement].run(arguments), load)
    print(record.show(results))
    if arguments.output:
        record.write(arguments.output, results)
        print(f"\nWrote {arguments.output}.")
