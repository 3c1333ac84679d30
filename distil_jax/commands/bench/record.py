"""The record of a measurement: a JSON file with all that is needed to repeat it, and its Markdown table."""

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
from distil_jax.commands.bench.timing import Measurement
from distil_jax.files import write_whole
from distil_jax.reporting import markdown
from distil_jax.schema import InputError, require, user_path

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "torch", "transformers", "tokenizers")
_KEYS = {"measurement", "command", "date", "machine", "versions", "settings", "products", "lines"}
_NOT_SETTINGS = ("measurement", "output")
_GIB = 2**30


def record(arguments: argparse.Namespace, measurement: Measurement, load: float) -> dict[str, Any]:
    """The results with everything that is needed to interpret and repeat them, as plain values.

    Args:
      arguments: of the command line.
      measurement: the results.
      load: the machine's load average before the measurement. On a busy machine, libraries whose threads wait for each
        other lose the most.
    """
    return {
        "measurement": arguments.measurement,
        "command": command_line(arguments),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine() | {"load_before": load},
        "versions": {"distil_jax": __version__, "python": platform.python_version(), **_versions()},
        "settings": {name: value for name, value in vars(arguments).items() if name not in _NOT_SETTINGS},
        "products": measurement.products,
        "lines": measurement.lines,
    }


def command_line(arguments: argparse.Namespace) -> str:
    """The command with all flags written out, so that later changes of defaults do not affect it."""
    words = ["distil-jax", "bench", arguments.measurement]
    for name, value in vars(arguments).items():
        if name not in _NOT_SETTINGS and value not in (None, [], ""):
            for item in value if isinstance(value, list) else [value]:
                words += [f"--{name.replace('_', '-')}", str(item)]
    return shlex.join(words)


def machine() -> dict[str, Any]:
    """The processor, its cores and memory in bytes, and the devices that JAX sees."""
    cpu, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    device = jax.devices()[0].device_kind
    return {"cpu": cpu, "cores": os.cpu_count(), "memory": memory(), "device": device, "devices": jax.device_count()}


def memory() -> int:
    """The size of the host's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions() -> dict[str, str]:
    installed = {package.metadata["Name"].lower(): package.version for package in metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def check_output(path: str | None) -> None:
    """Checks that the file for the results can be written, before hours of measuring.

    Raises:
      InputError: it cannot be written.
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
      InputError: the file cannot be read, or has something else in it.
    """
    path = user_path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror}): name a file that `bench --output` wrote.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): name a file that `bench --output` wrote.") from error
    known = isinstance(values, dict) and values.keys() == _KEYS
    require(known, f"{path} has no results in it: name a file that `bench --output` wrote.")
    return values


def show(values: dict[str, Any]) -> str:
    """A record as Markdown: the command, the machine, versions and date, then the table."""
    host, versions = values["machine"], values["versions"]
    hardware = f"{host['cpu']}, {host['cores']} cores, {host['memory'] / _GIB:.0f} GiB, load {host['load_before']:.1f}"
    if host["device"] != "cpu":
        hardware += f", {host['devices']} x {host['device']}"
    software = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "transformers") if name in versions)
    rates = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in values["products"].items())
    matmuls = f" Matrix products alone: {rates}." if rates else ""
    head = [f"`{values['command']}`", "", f"{hardware}; {software}; {values['date']}.{matmuls}", ""]
    return "\n".join(head + table(values["lines"]))


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table with a column per key; lists and empty columns are left out.

    The lowest and highest of a key are not columns, but in brackets after its median.
    """
    keys = dict.fromkeys(key for line in lines for key in line if not key.endswith(("_lowest", "_highest")))
    columns = {key.replace("_", " "): [_cell(line, key) for line in lines] for key in keys}
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    return markdown.table(list(columns), list(zip(*columns.values(), strict=True)))


def _cell(line: dict[str, Any], key: str) -> str:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        if isinstance(value, int):
            return f"{value:,}"
        return "" if value is None or isinstance(value, list) else value

    median, lowest = text(line.get(key)), line.get(f"{key}_lowest")
    return median if lowest is None else f"{median} ({text(lowest)} to {text(line[f'{key}_highest'])})"
