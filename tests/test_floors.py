"""Who may import whom, and what `import distil_jax` may pull in (the house's one direction of travel)."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from distil_jax import cli

HOUSE = Path(__file__).parents[1] / "distil_jax"
GROUND = {"schema", "config", "structs", "files"}
RUN = {"models", "objective", "training", "data", "io"}
BELOW = {
    "models": set(),
    "objective": set(),
    "data": set(),
    "io": set(),
    "training": {"models", "objective"},
    "runtime": RUN,
    "evaluation": RUN | {"runtime"},
    "machines": RUN | {"runtime"},
    "reporting": RUN | {"runtime", "evaluation", "machines"},
    "workflows": RUN | {"runtime", "evaluation", "machines", "reporting"},
    "commands": RUN | {"runtime", "evaluation", "machines", "reporting", "workflows"},
}
EDGES = ("torch", "transformers", "datasets", "grain", "orbax", "tokenizers")


def module_of(path):
    """("models", "encoder") for models/encoder.py; a folder's __init__.py is the folder."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(path): path for path in HOUSE.rglob("*.py")}


def imported(path):
    """The modules of the package that a file imports, as `module_of` names them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("distil_jax") for name in node.names), f"{path}: write from ... import"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distil_jax":
            package = tuple(node.module.split(".")[1:])
            for name in node.names:
                module = (*package, name.name)
                yield module if module in MODULES else package


@pytest.mark.parametrize("room", BELOW)
def test_a_room_uses_the_ground_and_what_is_below_it(room):
    for path in (HOUSE / room).rglob("*.py"):
        for target in imported(path):
            where = f"{path.relative_to(HOUSE)} may not import {'.'.join(target)}"
            assert target == () or target[0] in GROUND | BELOW[room] | {room}, where  # (): the version


def test_every_room_has_its_floor():
    rooms = {path.parent.name for path in HOUSE.glob("*/__init__.py")}
    assert rooms == {*BELOW, "config"}


def test_commands_are_verbs_and_none_uses_another():
    verbs = {module[1] for module in MODULES if module[0:1] == ("commands",) and len(module) > 1}
    assert verbs == set(cli._VERBS)
    for module, path in MODULES.items():
        for target in imported(path):
            if target[:1] == ("commands",):
                assert module[:2] == target[:2] == ("commands", "bench"), f"{path} uses the command {'.'.join(target)}"


def test_the_command_line_is_there_before_jax_is():
    """So that Ctrl-C ends it from the first moment on, and --help does not wait."""
    code = "import sys, distil_jax.cli; print(*(n for n in ('jax', 'numpy', 'flax', 'optax') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_table_of_contents_is_the_package():
    import distil_jax
    from distil_jax import public

    names = {name for name, value in vars(public).items() if not name.startswith("_")}
    assert {"train_step", "MaskedLm", "Config"} <= names <= set(dir(distil_jax))
    assert all(getattr(distil_jax, name) is getattr(public, name) for name in names)
    with pytest.raises(AttributeError, match="'distil_jax' has no attribute 'train_stop'"):
        distil_jax.train_stop  # noqa: B018
    with pytest.raises(ImportError):
        from distil_jax import train_stop  # noqa: F401


def test_the_ground_rests_on_nothing():
    for module, path in MODULES.items():
        if module and module[0] in GROUND:
            assert {target[0] for target in imported(path) if target} <= GROUND


def test_imports_run_in_no_circle():
    uses = {module: set(imported(path)) - {()} for module, path in MODULES.items() if module}
    order = graphlib.TopologicalSorter(uses)
    order.prepare()  # raises CycleError, which names the circle


def test_research_code_gets_no_edge_library():
    code = f"import sys, distil_jax; distil_jax.train_step; print(*(n for n in {EDGES} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
