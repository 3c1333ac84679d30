"""`distil-jax plan`: whether a run fits TPUs, and how fast it can be on them, before any is paid for."""

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
    parser.add_argument("config", help="a TOML file, or the name of a preset")
    parser.add_argument("--topology", default="v5e:2x4", help="type and shape of a TPU slice (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=1, help="how many such slices (default: %(default)s)")
    parser.add_argument(
        "--sweep", metavar="LIST", help="several topologies instead, with commas between; 2*v5e:4x4 is two slices"
    )
    parser.add_argument("--sequence-length", type=int, help="of a row (default: of the prepared data, or 512)")
    parser.add_argument("--tokens", type=float, help="of the training text (default: of the prepared data)")
    parser.add_argument("--output", metavar="FOLDER", help="also write plan.md there, and plan.png for a sweep")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a config key")


def run(arguments: argparse.Namespace) -> None:
    """Compiles for every topology and prints the tables.

    Raises:
      InputError: bad input, or a run that fits none of the topologies.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("plan compiles with libtpu, which is not installed: pip install 'distil-jax[tpu]'.")
    if arguments.sweep and arguments.slices != 1:
        raise InputError("--slices goes with --topology; in a sweep write 2*v5e:4x4 for two slices.")
    one = f"{arguments.slices}*{arguments.topology}" if arguments.slices != 1 else arguments.topology
    machines = [_topology(name) for name in (arguments.sweep or one).split(",")]
    finite = arguments.tokens is None or 0 < arguments.tokens < 1e18
    require(finite, f"--tokens must be a number above 0, not {arguments.tokens}.")
    length = arguments.sequence_length
    require(length is None or length >= 1, f"--sequence-length must be at least 1, not {length}.")
    workload = read_workload(load(arguments.config, arguments.set), length, arguments.tokens)
    plan(workload, machines, user_path(arguments.output) if arguments.output else None, sweep=bool(arguments.sweep))


def _topology(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+:\d+(?:x\d+)+)", text.strip())
    if not found or found[1] == "0":
        raise InputError(f"{text!r} is no topology: write v5e:2x4, or 2*v5e:4x4 for two slices.")
    return found[2], int(found[1] or 1)
