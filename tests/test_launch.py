"""The scripts: they parse, they are executable, and the README says what is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = sorted((REPOSITORY / "launch").glob("*.sh"))
README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    sourced = script.name in ("environment.sh", "contract.sh")
    assert os.access(script, os.X_OK) != sourced
    if not sourced:
        assert script.read_text().splitlines()[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-x", script], check=True, cwd=REPOSITORY)


def test_ci_runs_the_readmes_test_command():
    assert "exec launch/test.sh" in (REPOSITORY / ".ci/run").read_text()
    assert "launch/test.sh" in README and "launch/demo.sh" in README


def test_the_workflow_of_github_is_one():
    pytest.importorskip("check_jsonschema")
    workflow = REPOSITORY / ".github/workflows/test.yml"
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", workflow]
    subprocess.run(check, check=True, capture_output=True)
    assert "run: launch/test.sh" in workflow.read_text()


def test_an_old_python_is_refused(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/usr/bin/env bash\nexit 1\n")
    fake.chmod(0o755)
    environment = {**os.environ, "DISTIL_PYTHON": str(fake), "DISTIL_VENV": str(tmp_path / "venv")}
    done = subprocess.run([REPOSITORY / "launch/demo.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "needs Python 3.11" in done.stderr and not (tmp_path / "venv").exists()


def test_what_the_readme_names_is_there():
    for path in re.findall(r"`((?:launch|configs|distil_jax)/[\w./]+)`", README):
        assert (REPOSITORY / path).exists(), path
    for preset in set(re.findall(r"distil-jax train (\w+)", README)) - {"run"}:  # the run folder of the examples
        assert (REPOSITORY / "configs" / f"{preset}.toml").exists()
    assert len(README.splitlines()) <= 150


def test_every_link_of_a_readme_leads_somewhere():
    folders = (".", "configs", "launch", "tests", "distil_jax", "distil_jax/data", "distil_jax/commands/bench")
    for readme in (REPOSITORY / folder / "README.md" for folder in folders):
        for link in re.findall(r"\]\(([^)]+)\)", readme.read_text()):
            assert (readme.parent / link.partition("#")[0]).exists(), (readme, link)


def test_the_readmes_research_example_runs_as_it_stands(capsys):
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "train_step" in block)
    assert len([line for line in code.splitlines() if line]) <= 25
    exec(
        compile(code.replace('"MY_BERT"', repr(str(REPOSITORY / "distil_jax" / "teacher"))), "README", "exec"),
        names := {},
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(names["teacher_params"])), "sent once"
    lines = capsys.readouterr().out.splitlines()
    losses = [float(re.search(r"'loss': ([\d.]+)", line).group(1)) for line in lines]
    assert len(losses) == 3 and losses[-1] < losses[0] * 1.01
