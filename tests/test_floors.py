"""Who may import whom, and what `import distil_jax` may pull in (the house's one direction of travel)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
    "machines": RUN | {"runtime", "reporting"},
    "reporting": RUN | {"runtime", "evaluation", "machines"},
    "workflows": RUN | {"runtime", "evaluation", "machines", "reporting"},
    "commands": RUN | {"runtime", "evaluation", "machines", "reporting", "workflows"},
}
EDGES = ("torch", "transformers", "datasets", "grain", "orbax", "tokenizers")


def imported(path):
    """The names under distil_jax that a file imports: ("models", "encoder") and the like."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distil_jax":
            parts = node.module.split(".")[1:]
            for name in node.names:
                yield tuple([*parts, name.name][:2])


@pytest.mark.parametrize("room", BELOW)
def test_a_room_uses_the_ground_and_what_is_below_it(room):
    for path in (HOUSE / room).rglob("*.py"):
        for target in imported(path):
            allowed = GROUND | BELOW[room] | {room, "__version__"}
            assert target[0] in allowed, f"{path.relative_to(HOUSE)} may not import {'.'.join(target)}"


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
    for path in [*(HOUSE / "config").glob("*.py"), *(HOUSE / f"{name}.py" for name in GROUND - {"config"})]:
        assert {target[0] for target in imported(path)} <= GROUND


def test_commands_call_each_other_in_no_circle():
    uses = {
        path.stem: {target[1] for target in imported(path) if target[0] == "commands" and len(target) > 1}
        for path in (HOUSE / "commands").glob("*.py")
    }

    def reaches(name, seen):
        assert name not in seen, f"a circle: {' -> '.join([*seen, name])}"
        for used in uses.get(name, ()):
            reaches(used, [*seen, name])

    for name in uses:
        reaches(name, [])


def test_research_code_gets_no_edge_library():
    code = f"import sys, distil_jax; distil_jax.train_step; print(*(n for n in {EDGES} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
