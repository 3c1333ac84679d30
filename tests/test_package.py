"""The wheel, installed somewhere else, is the whole package: presets, embedded teacher, types, entry point."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distil_jax import __version__

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source") / "copy"
    leave = shutil.ignore_patterns(".git", ".venv*", "demo", "runs", "*.egg-info", "__pycache__", "build")
    shutil.copytree(REPOSITORY, copy, ignore=leave)
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", target, copy]
    subprocess.run(build, check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_the_wheel_holds_code_presets_teacher_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "distil_jax").rglob("*.py")}
    assert ours <= names
    presets = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs").rglob("*.toml")}
    assert {f"distil_jax/{path}" for path in presets} <= names
    assert {f"distil_jax/teacher/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")} <= names
    assert "distil_jax/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"distil_jax", f"distil_jax-{__version__}.dist-info"}
    assert wheel.stat().st_size < 14e6


def test_installed_it_runs_without_the_checkout(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--no-index", "--target", tmp_path, wheel]
    subprocess.run(install, check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments):
        # -P: the folder the tests run in must not be imported from.
        command = [sys.executable, "-P", *arguments]
        environment["PYTHONPATH"] = str(tmp_path)
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout

    assert run("-m", "distil_jax", "--version").strip() == f"distil-jax {__version__}"
    assert 'path = "google-bert/bert-base-cased"' in run(
        "-m", "distil_jax", "train", "distilbert_base_cased", "--print-config"
    )
    assert str(tmp_path) in run("-c", "import distil_jax; print(distil_jax.__file__)")
    assert (tmp_path / "bin" / "distil-jax").exists()
