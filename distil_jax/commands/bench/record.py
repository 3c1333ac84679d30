"""The record of a measurement: one JSON file, complete in itself, and a Markdown table of it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from distil_jax import __version__
from distil_jax.commands.bench.timing import Measured
from distil_jax.files import write_whole
from distil_jax.reporting import markdown
from distil_jax.schema import InputError, require, user_path

KEPT = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "torch", "transformers", "tokenizers")
_KEYS = {"measurement", "command", "date", "machine", "versions", "settings", "products", "lines"}
_NO_SETTING = ("measurement", "output")
_GIB = 2**30


def record(arguments: argparse.Namespace, measured: Measured, load: float) -> dict[str, Any]:
    """The results with everything needed to judge and repeat them, as plain values.

    Args:
      arguments: of the command line.
      measured: its results.
      load: processes that were running before it began, on average: on a machine that is not idle, libraries that
        let their threads wait for each other lose the most.
    """
    return {
        "measurement": arguments.measurement,
        "command": command_line(arguments),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine() | {"load_before": load},
        "versions": {"distil_jax": __version__, "python": platform.python_version(), **_versions()},
        "settings": {name: value for name, value in vars(arguments).items() if name not in _NO_SETTING},
        "products": measured.products,
        "lines": measured.lines,
    }


def command_line(arguments: argparse.Namespace) -> str:
    """The command with every flag written out, so that it means the same when defaults have changed."""
    words = ["distil-jax", "bench", arguments.measurement]
    for name, value in vars(arguments).items():
        if name not in _NO_SETTING and value not in (None, [], ""):
            for each in value if isinstance(value, list) else [value]:
                words += [f"--{name.replace('_', '-')}", str(each)]
    return shlex.join(words)


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and the devices that JAX sees."""
    cpu, listing = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if listing.exists():
        names = [line.partition(": ")[2] for line in listing.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    device = jax.devices()[0].device_kind
    return {"cpu": cpu, "cores": os.cpu_count(), "memory": memory(), "device": device, "devices": jax.device_count()}


def memory() -> int:
    """Bytes of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions() -> dict[str, str]:
    installed = {each.metadata["Name"].lower(): each.version for each in metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def check_output(path: str | None) -> None:
    """Refuses a file that cannot be written, before hours are spent on what belongs into it.

    Raises:
      InputError: it cannot.
    """
    if path is not None:
        file = user_path(path)
        writable = not file.is_dir() and os.access(file.absolute().parent, os.W_OK)
        require(writable, f"Cannot write {file}: --output takes a file in an existing folder.")


def write(path: str | Path, values: dict[str, Any]) -> None:
    """Writes a record as JSON."""
    write_whole(user_path(path), json.dumps(values, indent=1) + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """Reads what `write` wrote.

    Raises:
      InputError: another file, or none.
    """
    path = user_path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror}): name a file that `bench --output` wrote.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): name a file that `bench --output` wrote.") from error
    known = isinstance(values, dict) and values.keys() == _KEYS
    require(known, f"{path} holds no results: name a file that `bench --output` wrote.")
    return values


def show(values: dict[str, Any]) -> str:
    """A record as Markdown: where, with what and how it was measured, then the numbers."""
    host, versions = values["machine"], values["versions"]
    where = f"{host['cpu']}, {host['cores']} cores, {host['memory'] / _GIB:.0f} GiB, load {host['load_before']:.1f}"
    if host["device"] != "cpu":
        where += f", {host['devices']} x {host['device']}"
    using = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "transformers") if name in versions)
    rates = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in values["products"].items())
    floor = f" Matrix products alone: {rates}." if rates else ""
    head = [f"`{values['command']}`", "", f"{where}; {using}; {values['date']}.{floor}", ""]
    return "\n".join(head + table(values["lines"]))


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown with a column for each key, in order; lists are left out, and columns without any number.

    A key's lowest and highest stand in brackets beside it.
    """
    keys = dict.fromkeys(key for line in lines for key in line if not key.endswith(("_lowest", "_highest")))
    columns = {key.replace("_", " "): [_cell(line, key) for line in lines] for key in keys}
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    return markdown.table(list(columns), list(zip(*columns.values(), strict=True)))


def _cell(line: dict[str, Any], key: str) -> str:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "" if value is None or isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value

    shown, lowest = text(line.get(key)), line.get(f"{key}_lowest")
    return shown if lowest is None else f"{shown} ({text(lowest)} to {text(line[f'{key}_highest'])})"
