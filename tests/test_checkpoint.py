"""Checkpoints as files: whole or not there, found damaged before they are used, and the right ones kept."""

import contextlib
import hashlib
import json
import shutil
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from conftest import file_hashes, finish, same_leaves, start

from distil_jax.io.checkpoint import Checkpoints
from distil_jax.schema import InputError

FACTS = {"position": 7, "identity": {"rows": "abc"}}


def arrays(step):
    draw = np.random.default_rng(step)
    values = {"params": {"kernel": draw.normal(size=(3, 8, 16)).astype(np.float32)}, "step": np.int32(step)}
    return jax.tree.map(jax.numpy.asarray, values)


def shapes(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)


def saved(folder, *steps, keep=9, scores=None):
    with contextlib.closing(Checkpoints(folder, keep=keep)) as checkpoints:
        for step in steps:
            checkpoints.save(step, arrays(step), FACTS | {"step": step}, criterion=(scores or {}).get(step))
            checkpoints.wait()
            assert checkpoints.failure is None
    return folder


def sealed(path, **changes):
    """A manifest with another body and the checksum of that."""
    body = json.loads(path.read_text())["body"] | changes
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "body": body}))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of the steps 1 and 2. Copy them."""
    return saved(tmp_path_factory.mktemp("two") / "checkpoints", 1, 2)


def test_what_was_saved_comes_back(two):
    with contextlib.closing(Checkpoints(two)) as checkpoints:
        assert checkpoints.steps() == [1, 2] and checkpoints.newest_valid() == (2, [])
        for step in (1, 2):
            assert checkpoints.verify(step) == checkpoints.metadata(step) == FACTS | {"step": step}
            assert same_leaves(checkpoints.restore(step, shapes(arrays(step))), arrays(step))


@pytest.mark.parametrize(("columns", "programs"), [(range(1, 9), 0), ([2**18], 8)])  # 1 MiB for each of 8 devices
def test_only_large_arrays_are_written_in_slices(tmp_path, columns, programs):
    """Each slice of each shape is a program that XLA compiles before the first save goes on."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = jax.device_put({str(n): np.arange(8 * n, dtype=np.float32).reshape(8, n) for n in columns}, everywhere)
    compiled = []

    def listen(event, seconds, **about):
        compiled.extend([event] * event.endswith("backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        try:
            checkpoints.save(1, tree, FACTS)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        checkpoints.wait()
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree)
        assert same_leaves(checkpoints.restore(1, abstract), tree)
    assert len(compiled) == programs


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    values = bytearray(path.read_bytes())
    values[len(values) // 2] ^= 1
    path.write_bytes(values)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, empty, remove])
def test_damage_to_any_file_is_found_and_the_older_one_is_taken(two, tmp_path, damage):
    """Every file of the newest checkpoint in turn, the manifest too."""
    names = [path.relative_to(two) for path in sorted((two / "2").rglob("*")) if path.is_file()]
    assert len(names) >= 5
    for number, name in enumerate(names):
        folder = shutil.copytree(two, tmp_path / str(number))
        if (folder / name).stat().st_size == 0 and damage is not remove:
            continue
        damage(folder / name)
        before = file_hashes(folder)
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            step, problems = checkpoints.newest_valid()
            assert step == 1, name
            assert len(problems) == 1 and "Checkpoint 2" in problems[0] and name.name in problems[0], problems
            with pytest.raises(InputError, match="Checkpoint 2"):
                checkpoints.verify(2)
            assert same_leaves(checkpoints.restore(1, shapes(arrays(1))), arrays(1))
        assert file_hashes(folder) == before, "looking changes nothing"


def test_where_none_is_valid_nothing_begins_from_nothing(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    for step in (1, 2):
        flip(folder / str(step) / "manifest.json")
    refused = pytest.raises(InputError, match=r"None of the checkpoints .* Checkpoint 2 .* Checkpoint 1 ")
    with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints, refused:
        checkpoints.newest_valid()
    assert (folder / "1").is_dir() and (folder / "2").is_dir()


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [{"path": "/dev/zero", "bytes": 0, "sha256": ""}]},
        {"files": [{"path": "../1/manifest.json", "bytes": 0, "sha256": ""}]},
        {"files": [{"path": "state"}]},
        {"files": None},
        {"facts": []},
        {"arrays": {"step": []}},
        {"score": "low"},
        {"step": 1},
    ],
)
def test_a_manifest_that_cannot_be_is_damaged_whatever_its_checksum_says(two, tmp_path, changes):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    sealed(folder / "2" / "manifest.json", **changes)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        step, problems = checkpoints.newest_valid()
        assert step == 1 and "Checkpoint 2" in problems[0]
        with pytest.raises(InputError, match="Checkpoint 2"):
            checkpoints.restore(2, shapes(arrays(2)))


def test_only_numbers_are_steps(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    for name in ("²", "٣", "02", "-1", "2.set-aside-1"):
        (folder / name).mkdir()
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.steps() == [1, 2]


def test_a_manifest_whose_facts_were_changed_is_damaged(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    path = folder / "2" / "manifest.json"
    values = json.loads(path.read_text())
    values["body"]["facts"]["position"] = 8
    path.write_text(json.dumps(values))
    with contextlib.closing(Checkpoints(folder)) as checkpoints, pytest.raises(InputError, match="has changed"):
        checkpoints.metadata(2)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "{}", '{"body": 1, "sha256": 2}', '{"body": {}}', "\xff"])
def test_a_manifest_that_is_none_is_one_error(two, tmp_path, text):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    (folder / "2" / "manifest.json").write_text(text, encoding="latin-1")
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.newest_valid()[0] == 1


def test_other_shapes_or_types_are_refused_by_name(two):
    other = arrays(2) | {"params": {"kernel": jax.numpy.zeros((3, 8, 17))}}
    with contextlib.closing(Checkpoints(two)) as checkpoints:
        with pytest.raises(InputError, match=r"params/kernel is float32\[3, 8, 16\] and should be float32\[3, 8, 17\]"):
            checkpoints.restore(2, shapes(other))
        with pytest.raises(InputError, match=r"should be absent|not there"):
            checkpoints.restore(2, shapes({"step": arrays(2)["step"]}))


def test_the_newest_and_the_best_are_kept(tmp_path):
    folder = saved(tmp_path / "checkpoints", 1, 2, 3, 4, 5, keep=2, scores={1: 3.0, 2: 1.0, 3: 2.0})
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.newest_valid() == (5, [])
    assert not list(folder.glob(".*"))


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    scores = {1: float("nan"), 2: 0.5, 3: 0.1, 4: float("-inf"), 5: 0.2}
    folder = saved(tmp_path / "checkpoints", *scores, keep=1, scores=scores)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.steps() == [3, 5] and checkpoints.best() == (3, 0.1)
    sealed(folder / "3" / "manifest.json", score=float("nan"))  # as older versions wrote it
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.best_valid() == (5, []) and checkpoints.verify(3)["step"] == 3


def test_the_best_that_is_damaged_is_named_and_the_next_best_taken(tmp_path):
    folder = saved(tmp_path / "checkpoints", 1, 2, 3, scores={1: 1.0, 2: 2.0})
    flip(max((folder / "1").glob("state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size))
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        result, problems = checkpoints.best_valid()
        assert result == 2 and len(problems) == 1 and "Checkpoint 1" in problems[0]
        assert checkpoints.best() == (2, 2.0)


def test_a_part_of_a_checkpoint_is_read_alone(two):
    whole = arrays(2)
    with contextlib.closing(Checkpoints(two)) as checkpoints:
        part = checkpoints.restore(2, shapes({"params": whole["params"]}), partial=True)
        assert same_leaves(part, {"params": whole["params"]})
        with pytest.raises(InputError, match="params/bias is not there"):
            checkpoints.restore(2, shapes({"params": whole["params"] | {"bias": whole["step"]}}), partial=True)


def test_a_mistake_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        for error in (ValueError("too many values to unpack"), KeyError("params"), RuntimeError("deleted")):
            monkeypatch.setattr(checkpoints, "_retire", Mock(side_effect=error))
            checkpoints.save(1, arrays(1), FACTS)
            with pytest.raises(type(error), match=error.args[0]):
                checkpoints.wait()
            shutil.rmtree(tmp_path / "1")
        assert checkpoints.failure is None


def test_a_damaged_checkpoint_is_not_counted_among_the_newest(tmp_path):
    folder = saved(tmp_path / "checkpoints", 1, 2)
    flip(folder / "2" / "manifest.json")
    saved(folder, 3, keep=2)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3], "the damaged one is kept, and so are two that are whole"


def test_later_ones_are_set_aside_and_can_be_written_again(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    with contextlib.closing(Checkpoints(folder, keep=9)) as checkpoints:
        (name,) = checkpoints.set_aside_after(1)
        assert name.startswith("2.set-aside-") and (folder / name / "manifest.json").exists()
        assert checkpoints.steps() == [1]
        checkpoints.save(2, arrays(20), FACTS)
        checkpoints.wait()
        assert same_leaves(checkpoints.restore(2, shapes(arrays(20))), arrays(20))


def test_what_a_killed_save_left_is_removed_and_harmless(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    shutil.copytree(folder / "2", folder / ".saving-3")
    shutil.copytree(folder / "1", folder / ".retired-0")
    (folder / "notes").write_text("mine")
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.newest_valid() == (2, [])
    assert (folder / ".saving-3").exists(), "who only reads removes nothing"
    saved(folder, 3)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "notes"]


def test_a_save_that_fails_is_told_and_the_next_one_succeeds(tmp_path, monkeypatch):
    folder = saved(tmp_path / "checkpoints", 1)
    with contextlib.closing(Checkpoints(folder, keep=9)) as checkpoints:
        (folder / ".saving-2").write_text("in the way")
        checkpoints.save(2, arrays(2), FACTS)
        checkpoints.wait()
        assert "step 2 could not be saved" in checkpoints.failure
        assert checkpoints.newest_valid() == (1, [])
        checkpoints.save(3, arrays(3), FACTS)
        checkpoints.wait()
        assert checkpoints.failure is None and checkpoints.newest_valid() == (3, [])


# Files may not grow beyond 100 KiB, and of each save's forty writes many are under way when the first one fails.
FAILING = """
import resource, sys
import jax, numpy as np
from distil_jax.io.checkpoint import Checkpoints
resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 2**10, resource.RLIM_INFINITY))
values = {str(number): jax.numpy.asarray(np.random.rand(200, 40)) for number in range(40)}
checkpoints = Checkpoints(sys.argv[1], keep=1)
for step in range(6):
    checkpoints.save(step, values, {})
    checkpoints.wait()
    print(checkpoints.failure)
checkpoints.close()
class Mistake:
    def __del__(self):
        raise RuntimeError("somebody else's")
Mistake()
"""


def test_a_save_that_fails_prints_nothing_itself_and_hides_nothing_else(tmp_path):
    ((status, stdout, stderr),) = finish(start(1, [tmp_path / "checkpoints"], program=FAILING))
    assert status == 0 and stdout.count("could not be saved (File too large)") == 6, (stdout, stderr)
    assert stderr.count("Traceback") == 1 and "somebody else's" in stderr, stderr
