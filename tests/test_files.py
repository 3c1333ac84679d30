"""A folder appears whole or not at all, and what a killed process left of it goes with the next attempt."""

import subprocess
import sys

import pytest

from distil_jax.files import whole_folder
from distil_jax.schema import InputError

WRITES = """
import sys, time
from distil_jax.files import whole_folder
with whole_folder(sys.argv[1]) as draft:
    (draft / "half").write_text("a half")
    print("written", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process in the middle of writing tmp_path/new[1], whose name is no pattern."""
    with subprocess.Popen([sys.executable, "-c", WRITES, tmp_path / "new[1]"], stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout.readline() == "written\n"
        yield it
        it.kill()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder):
    with whole_folder(folder) as draft:
        (draft / "file").write_text("whole")
        assert not (folder / "file").exists()


def test_what_a_killed_process_left_goes(tmp_path, writer):
    writer.kill()
    writer.wait()
    assert len(names(tmp_path)) == 1
    write(tmp_path / "new[1]")
    assert names(tmp_path) == ["new[1]"] and (tmp_path / "new[1]" / "file").read_text() == "whole"


def test_what_a_living_one_writes_and_what_is_anothers_stays(tmp_path, writer):
    (draft,) = names(tmp_path)
    for other in (".new[1].original", ".new1.unfinished-0123abcd", ".new[1].unfinished"):
        (tmp_path / other).mkdir()
    before = names(tmp_path)
    write(tmp_path / "new[1]")
    assert names(tmp_path) == sorted([*before, "new[1]"]) and (tmp_path / draft / "half").read_text() == "a half"


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "new") as draft:
        (draft / "half").write_text("a half")
        raise KeyboardInterrupt
    assert not names(tmp_path)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "used").mkdir()
    write(tmp_path / "used")  # empty: free
    with pytest.raises(InputError, match="used exists and is not an empty folder"):
        write(tmp_path / "used")
    assert names(tmp_path) == ["used"]
