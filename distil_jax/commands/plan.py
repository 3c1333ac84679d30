"""`distil-jax plan`: estimates whether a run fits on TPUs and how fast it can be there, without any TPU."""

from __future__ import annotations

import argparse
import importlib.util
import re

from distil_jax.config.load import load
from distil_jax.machines.workload import read_workload
from distil_jax.schema import InputError, require, user_path
from distil_jax.workflows.plan import plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax plan`."""
    parser.add_argument("config", help="a TOML file, or the name of a preset in configs/")
    parser.add_argument("--topology", default="v5e:2x4", help="type and shape of a TPU slice (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=1, help="number of such slices (default: %(default)s)")
    parser.add_argument(
        "--sweep", metavar="LIST", help="compare several topologies, separated by commas; 2*v5e:4x4 means two slices"
    )
    parser.add_argument("--sequence-length", type=int, help="tokens per row (default: as in the prepared data, or 512)")
    parser.add_argument("--tokens", type=float, help="tokens in the training text (default: as in the prepared data)")
    parser.add_argument("--output", metavar="FOLDER", help="also write plan.md there, and plan.png after a sweep")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a config key")


def run(arguments: argparse.Namespace) -> None:
    """Compiles the run for every topology and prints the tables.

    Raises:
      InputError: a bad flag or config, libtpu is not installed, or the run fits on none of the topologies.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("plan compiles with libtpu, which is not installed: pip install 'distil-jax[tpu]'.")
    if arguments.sweep and arguments.slices != 1:
        raise InputError("--slices goes with --topology; in a sweep write 2*v5e:4x4 for two slices.")
    single = f"{arguments.slices}*{arguments.topology}" if arguments.slices != 1 else arguments.topology
    machines = [_parse_topology(text) for text in (arguments.sweep or single).split(",")]
    tokens = arguments.tokens
    require(tokens is None or 0 < tokens < 1e18, f"--tokens must be a number above 0, not {tokens}.")
    length = arguments.sequence_length
    require(length is None or length >= 1, f"--sequence-length must be at least 1, not {length}.")
    workload = read_workload(load(arguments.config, arguments.set), length, tokens)
    plan(workload, machines, user_path(arguments.output) if arguments.output else None, sweep=bool(arguments.sweep))


def _parse_topology(text: str) -> tuple[str, int]:
    """The topology and the number of slices in a text such as 2*v5e:4x4."""
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+:\d+(?:x\d+)+)", text.strip())
    if not match or match[1] == "0":
        raise InputError(f"{text!r} is not a topology: write v5e:2x4, or 2*v5e:4x4 for two slices.")
    return match[2], int(match[1] or 1)
