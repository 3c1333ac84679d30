"""Text into rows: nothing is lost, doubled or leaked, against a plain re-implementation; and all or nothing on disk."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from distil_jax.commands import prepare as command
from distil_jax.data import corpus, docstrings, loader
from distil_jax.data.corpus import Piece
from distil_jax.data.manifest import SPLITS, read_manifest, verify
from distil_jax.data.packing import Packer
from distil_jax.data.prepare import PrepareConfig, chunks, prepare
from distil_jax.data.tokenizer import fingerprint, load_tokenizer, model_positions, train_tokenizer
from distil_jax.schema import InputError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "small", "dogs", "ran", "over", "green", "hills"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A WordPiece that knows whole words; a letter that it never saw makes [UNK]."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([" ".join(WORDS)] * 3, 200, folder)
    return folder


def write_corpus(path: Path, documents: int = 60, seed: int = 0) -> list[list[str]]:
    """Documents of one to eight lines of one to sixty words, some of them unknown."""
    draw = random.Random(seed)
    result = []
    for _ in range(documents):
        lines = []
        for _ in range(draw.randint(1, 8)):
            words = [*WORDS, "ω"] if draw.random() < 0.8 else [*WORDS[:3], "ω", "ψ"]
            lines.append(" ".join(draw.choices(words, k=draw.randint(1, 60))))
        result.append(lines)
    path.write_text("\n\n".join("\n".join(lines) for lines in result))
    return result


def sequences_of(folder: Path, split: str) -> list[tuple[int, ...]]:
    table = loader.open_rows(folder, split)
    rows = table.gather(np.arange(len(table)))
    result = []
    for ids, segments in zip(rows.input_ids, rows.segment_ids, strict=True):
        padding = ids[segments == 0]
        assert (padding == table.pad_id).all()
        assert (np.diff(segments[segments > 0]) >= 0).all()
        assert not segments[len(ids) - len(padding) :].any()
        result += [tuple(ids[segments == segment].tolist()) for segment in range(1, segments.max() + 1)]
    return result


def plainly(documents: list[list[str]], tokenizer: Path, config: PrepareConfig) -> dict[str, list[tuple[int, ...]]]:
    """What `prepare` must keep, written again without any of its code."""
    plain = load_tokenizer(tokenizer)
    result: dict[str, list[tuple[int, ...]]] = {"train": [], "held_out": []}
    for lines in documents:
        key = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
        split = "held_out" if int(key, 16) / 2**64 < config.held_out else "train"
        for text in [" ".join(lines)] if config.sequence == "document" else lines:
            ids = plain(text, add_special_tokens=False)["input_ids"]
            while ids:
                part, ids = ids[: config.sequence_length - 2], ids[config.sequence_length - 2 :]
                sequence = (plain.cls_token_id, *part, plain.sep_token_id)
                unknown = sum(token == plain.unk_token_id for token in sequence) / len(sequence)
                if len(sequence) >= config.min_tokens and unknown < config.max_unknown:
                    result[split].append(sequence)
    return result


@pytest.mark.parametrize("sequence", ["line", "document"])
@pytest.mark.parametrize("sizes", [(32, 12, 0.2), (128, 3, 0.5), (16, 5, 0.0)])
def test_rows_hold_exactly_the_sequences(tmp_path, tokenizer, sequence, sizes):
    length, min_tokens, held_out = sizes
    documents = write_corpus(tmp_path / "a.txt")
    config = PrepareConfig(
        sources=(str(tmp_path / "a.txt"),),
        tokenizer=str(tokenizer),
        sequence_length=length,
        min_tokens=min_tokens,
        held_out=held_out,
        sequence=sequence,
    )
    manifest = prepare(config, tmp_path / "rows")
    expected = plainly(documents, tokenizer, config)
    for split, counts in (("train", manifest.train), ("held_out", manifest.held_out)):
        result = sequences_of(tmp_path / "rows", split)
        assert Counter(result) == Counter(expected[split])
        assert counts.sequences == len(result)
        assert counts.tokens == sum(map(len, result))
    everything = [*expected["train"], *expected["held_out"]]
    assert manifest.counts["documents"] == len(documents)
    assert manifest.counts["sequences"] == len(everything)
    assert manifest.counts["tokens"] == sum(map(len, everything))
    assert verify(tmp_path / "rows") == manifest
    counted = np.bincount([token for ids in expected["train"] for token in ids], minlength=manifest.vocab_size)
    assert np.array_equal(np.load(tmp_path / "rows" / "token_counts.npy"), counted)


def test_dropped_sequences_are_counted(tmp_path, tokenizer):
    lines = [
        "the cat",
        " ".join(WORDS),
        "ω " * 9 + "the cat",
        "ω " * 10 + "cat",
        "ω the " * 8,
        b"\xff".decode("latin-1"),
    ]
    (tmp_path / "a.txt").write_bytes("\n".join(lines[:-1]).encode() + b"\n\xff\n")
    manifest = prepare(
        PrepareConfig(sources=(str(tmp_path / "a.txt"),), tokenizer=str(tokenizer), held_out=0), tmp_path / "rows"
    )
    # Of 13 tokens 9 or 10 are unknown; of 18, with [CLS] and [SEP], 8 are.
    assert manifest.counts["dropped_short"] == 1
    assert manifest.counts["dropped_unknown"] == 2
    assert manifest.counts["invalid_lines"] == 1
    assert manifest.counts["sequences"] == 2


@pytest.mark.parametrize("room", [1, 5, 14])
def test_chunk_edges(room):
    for length in [*range(1, 4 * room + 2)]:
        ids = list(range(length))
        parts = [part for _, part in chunks([(Piece(b"k", "", True), list(ids))], room, join=False, counts=Counter())]
        assert [len(part) for part in parts[:-1]] == [room] * (len(parts) - 1)
        assert 1 <= len(parts[-1]) <= room
        assert [token for part in parts for token in part] == ids


def test_chunks_join_the_lines_of_one_document_only():
    pieces = [(Piece(b"a", "", True), [1, 2, 3]), (Piece(b"a", "", False), [4, 5]), (Piece(b"b", "", True), [6])]
    counts: Counter[str] = Counter()
    assert list(chunks(pieces, 4, join=True, counts=counts)) == [(b"a", [1, 2, 3, 4]), (b"a", [5]), (b"b", [6])]
    assert counts["cut_sequences"] == 1


@pytest.mark.parametrize("open_rows", [1, 7, 1000])
def test_packing_is_a_partition_into_rows_that_fit(open_rows):
    draw = random.Random(1)
    sequences = [[number] * draw.choice((3, 4, 7, 20, 63, 64)) for number in range(500)]
    packer = Packer(64, 3, open_rows=open_rows)
    rows = [row for sequence in sequences for row in packer.add(sequence)]
    rows += packer.close()
    assert sorted(sequence for row in rows for sequence in row) == sequences
    assert all(sum(map(len, row)) <= 64 for row in rows)
    if open_rows == 1000:  # no two rows could have been one
        spaces = sorted(64 - sum(map(len, row)) for row in rows)
        assert sum(spaces[-2:]) < 64
        assert sum(map(len, sequences)) / (64 * len(rows)) > 0.9


def test_packing_is_best_fit():
    packer = Packer(10, 2)
    for size in (6, 5, 7):
        assert packer.add([size] * size) == []
    assert packer.add([3] * 3) == [[[7] * 7, [3] * 3]]
    assert packer.add([4] * 4) == [[[6] * 6, [4] * 4]]


@pytest.mark.parametrize("share", [1e-9, 0.3, 1 - 1e-9])
@pytest.mark.parametrize("seed", range(5))
def test_of_two_documents_or_more_one_is_held_out_and_one_is_not(tmp_path, tokenizer, share, seed):
    """Among documents that are dropped because they are too short, as headings are."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(2 + seed)] + [f"the {word}" for word in WORDS[1:]]
    (tmp_path / "a.txt").write_text("\n\n".join(draw.sample(texts, len(texts))))
    config = PrepareConfig((str(tmp_path / "a.txt"),), str(tokenizer), held_out=share, sequence_length=64)
    manifest = prepare(config, tmp_path / "rows")
    assert manifest.train.sequences and manifest.held_out.sequences
    assert manifest.train.sequences + manifest.held_out.sequences == 2 + seed
    if share != 0.3:  # no more than is needed is moved to the other side
        assert 1 in (manifest.train.sequences, manifest.held_out.sequences)
    # The share that was really used is kept, and gives the same rows again.
    again = prepare(replace(config, held_out=manifest.settings["held_out"]), tmp_path / "again")
    assert [file.sha256 for file in again.files] == [file.sha256 for file in manifest.files]


def test_held_out_text_is_chosen_before_a_vocabulary_is_trained(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the cat sat on " * 10)
    monkeypatch.setattr("distil_jax.data.prepare.train_tokenizer", lambda *_, **__: pytest.fail("hours of work"))
    with pytest.raises(InputError, match="only one document"):
        prepare(PrepareConfig((str(tmp_path / "a.txt"),), train_vocabulary=99), tmp_path / "rows")


def test_a_share_that_would_hold_out_none_or_all_is_told(tmp_path, tokenizer, capsys):
    (tmp_path / "a.txt").write_text("\n".join(f"{' '.join(WORDS)} {word}" for word in WORDS))
    for share, told in (("1e-9", "0.00% of the documents would be none"), ("0.999999", "would be all"), ("0.5", "")):
        output = tmp_path / share
        words = ["--document", "line", "--held-out", share, "--output", str(output), "--tokenizer", str(tokenizer)]
        command.run(parse(str(tmp_path / "a.txt"), *words))
        text = capsys.readouterr().out
        assert told in text and ("would be" in text) == bool(told)


def test_a_large_corpus_is_not_read_an_extra_time():
    pieces = (Piece(hashlib.blake2b(b"%d" % number, digest_size=8).digest(), "x" * 99, True) for number in range(10**5))
    assert corpus.held_out_share(pieces, 0.01, length=96, join=False) == 0.01
    assert sum(1 for _ in pieces) > 10**5 - 2000


def test_rows_are_no_longer_than_the_model_of_the_tokenizer_takes(tmp_path, tokenizer, capsys):
    write_corpus(tmp_path / "a.txt")
    model = shutil.copytree(tokenizer, tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 40}')
    for name, folder, flags, length in (
        ("model's", model, [], 40),
        ("shorter", model, ["--sequence-length", "32"], 32),
        ("longer", model, ["--sequence-length", "64"], 64),
        ("no model", tokenizer, [], 512),
    ):
        output = tmp_path / name
        command.run(parse(str(tmp_path / "a.txt"), "--output", str(output), "--tokenizer", str(folder), *flags))
        warning = capsys.readouterr().err
        assert read_manifest(output).sequence_length == read_manifest(output).settings["sequence_length"] == length
        assert ("longer than the 40 positions" in warning and "--sequence-length 40" in warning) == (length == 64)
    (model / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        model_positions(model)


def test_the_split_is_by_document_and_does_not_depend_on_the_rest(tmp_path, tokenizer):
    documents = write_corpus(tmp_path / "a.txt", documents=40)
    (tmp_path / "twice.txt").write_text((tmp_path / "a.txt").read_text() + "\n\n" + (tmp_path / "a.txt").read_text())
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"body": "\n".join(lines)}) for lines in reversed(documents))
    )
    folders = {}
    for name, length in (("a.txt", 64), ("twice.txt", 64), ("b.jsonl", 32)):
        folders[name] = tmp_path / f"rows-{name}"
        prepare(
            PrepareConfig(
                sources=(str(tmp_path / name),),
                tokenizer=str(tokenizer),
                held_out=0.3,
                sequence_length=length,
                text_field="body",
            ),
            folders[name],
        )
    train, held_out = (set(sequences_of(folders["a.txt"], split)) for split in SPLITS)
    assert not train & held_out
    assert set(sequences_of(folders["twice.txt"], "train")) == train
    assert set(sequences_of(folders["twice.txt"], "held_out")) == held_out
    words = [{ids[1:6] for ids in sequences_of(folders["b.jsonl"], split)} for split in SPLITS]
    assert {ids[1:6] for ids in train} <= words[0]
    assert {ids[1:6] for ids in held_out} <= words[1]


def test_held_out_docstrings_are_never_trained_on(tmp_path, monkeypatch, tokenizer):
    package = tmp_path / "packages" / "some_package"
    package.mkdir(parents=True)
    draw = random.Random(2)
    paragraphs = [" ".join(draw.choices(WORDS, k=30)) for _ in range(60)]
    functions = [f'def name{draw.randrange(40)}():\n    """{draw.choice(paragraphs)}"""\n' for _ in range(300)]
    (package / "code.py").write_text("\n".join(functions))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(docstrings, "PACKAGES", ("some_package",))
    docstrings.paragraphs.cache_clear()
    config = PrepareConfig(sources=("docstrings",), tokenizer=str(tokenizer), held_out=0.85, sequence_length=64)
    manifest = prepare(config, tmp_path / "rows")
    docstrings.paragraphs.cache_clear()
    train, held_out = (sequences_of(tmp_path / "rows", split) for split in SPLITS)
    assert len(held_out) > 5
    assert not set(train) & set(held_out)
    assert manifest.counts["sequences"] == len({*train, *held_out}) == len(train) + len(held_out)


def test_preparing_again_gives_the_same_bytes(tmp_path):
    write_corpus(tmp_path / "a.txt", documents=150)
    config = PrepareConfig(
        sources=(str(tmp_path / "a.txt"),), train_vocabulary=120, sequence_length=64, min_tokens=5, held_out=0.2
    )
    first, second = (prepare(config, tmp_path / name) for name in ("one", "two"))
    assert first == second
    trained = load_tokenizer(tmp_path / "one" / "tokenizer")
    assert trained.tokenize("the cat") == ["the", "cat"] and trained.model_max_length == 64
    again = PrepareConfig(
        sources=config.sources,
        tokenizer=str(tmp_path / "one" / "tokenizer"),
        sequence_length=64,
        min_tokens=5,
        held_out=0.2,
    )
    third = prepare(again, tmp_path / "three")
    assert third.tokenizer_fingerprint == first.tokenizer_fingerprint
    assert [file.sha256 for file in third.files[:5]] == [file.sha256 for file in first.files[:5]]


def test_the_vocabulary_is_trained_on_the_training_side_only(tmp_path):
    documents = write_corpus(tmp_path / "a.txt", documents=100)
    secret = next(
        word
        for word in (f"{letter}{number}" for number in range(1000) for letter in "ж")
        if int(hashlib.blake2b(word.encode(), digest_size=8).hexdigest(), 16) < 0.2 * 2**64
    )
    with (tmp_path / "a.txt").open("a") as file:
        file.write(f"\n\n{secret}")
    assert not any("ж" in line for lines in documents for line in lines)
    config = PrepareConfig(sources=(str(tmp_path / "a.txt"),), train_vocabulary=120, min_tokens=3, held_out=0.2)
    prepare(config, tmp_path / "rows")
    assert not any("ж" in token for token in load_tokenizer(tmp_path / "rows" / "tokenizer").get_vocab())


def test_special_and_unused_tokens_are_told(tmp_path):
    from transformers import BertTokenizer

    words = [
        "[PAD]",
        "[unused0]",
        "[unused7]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[",
        "]",
        "sep",
        "mask",
        "pad",
        "the",
    ]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("the [SEP] [MASK] [PAD] the")
    config = PrepareConfig(
        sources=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path / "tokenizer"), min_tokens=3, held_out=0
    )
    manifest = prepare(config, tmp_path / "rows")
    assert manifest.unused_ids == (1, 2)
    assert manifest.special_ids == (0, 3, 4, 5, 6)
    assert (manifest.pad_id, manifest.unk_id, manifest.cls_id, manifest.sep_id, manifest.mask_id) == (0, 3, 4, 5, 6)
    # Text that spells a special token does not become one.
    [sequence] = sequences_of(tmp_path / "rows", "train")
    assert " ".join(words[number] for number in sequence) == "[CLS] the [ sep ] [ mask ] [ pad ] the [SEP]"


def test_vocabularies_beyond_16_bits(tmp_path):
    from transformers import BertTokenizer

    vocabulary = {token: number for number, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    vocabulary |= {f"w{number}": number for number in range(5, 70_000)}
    BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text(" ".join(f"w{number}" for number in range(65_500, 65_600)))
    config = PrepareConfig(sources=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path / "tokenizer"), held_out=0)
    prepare(config, tmp_path / "rows")
    assert sequences_of(tmp_path / "rows", "train") == [(2, *range(65_500, 65_600), 3)]


def test_the_fingerprint_is_of_the_vocabulary_and_normalisation(tmp_path, tokenizer):
    loaded = load_tokenizer(tokenizer)
    loaded.backend_tokenizer.enable_truncation(7)
    loaded.backend_tokenizer.enable_padding(length=9)
    loaded.save_pretrained(tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(tokenizer)
    path = tmp_path / "copy" / "tokenizer.json"
    values = json.loads(path.read_text())
    del values["model"]["type"]
    path.write_text(json.dumps(values, indent=3))
    assert fingerprint(tmp_path / "copy") == fingerprint(tokenizer)
    config = tmp_path / "copy" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"do_lower_case": False}))
    cased = fingerprint(tmp_path / "copy")
    values["model"]["vocab"]["cat"], values["model"]["vocab"]["dogs"] = 1000, 1001
    path.write_text(json.dumps(values))
    assert len({cased, fingerprint(tokenizer), fingerprint(tmp_path / "copy")}) == 3


def test_a_tokenizer_that_truncates_and_pads_does_so_no_more(tmp_path, tokenizer):
    loaded = load_tokenizer(tokenizer)
    loaded.backend_tokenizer.enable_truncation(7)
    loaded.backend_tokenizer.enable_padding(length=9)
    loaded.save_pretrained(tmp_path / "cuts")
    write_corpus(tmp_path / "a.txt")
    rows = []
    for folder in (tokenizer, tmp_path / "cuts"):
        output = tmp_path / f"rows-{folder.name}"
        prepare(PrepareConfig(sources=(str(tmp_path / "a.txt"),), tokenizer=str(folder), held_out=0.2), output)
        rows.append(sequences_of(output, "train"))
    assert rows[0] == rows[1]


def test_folders_with_only_a_vocabulary(tmp_path, tokenizer):
    folder = tmp_path / "old"
    folder.mkdir()
    vocabulary = load_tokenizer(tokenizer).get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    write_corpus(tmp_path / "a.txt")
    config = PrepareConfig(sources=(str(tmp_path / "a.txt"),), tokenizer=str(folder), held_out=0.2)
    assert prepare(config, tmp_path / "rows").tokenizer_fingerprint == fingerprint(tokenizer)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no-such-thing is neither a folder nor a hub id"),
        ({"readme": ""}, r"holds no tokenizer: it needs tokenizer\.json"),
        ({"vocab.txt": "\n\n", "config.json": '{"model_type": "bert"}'}, "has only special tokens"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json is not a tokenizer file"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json is not a tokenizer file"),
        ({"vocab.txt": "", "config.json": '{"model_type": "bert"}'}, "has only special tokens"),
    ],
)
def test_tokenizers_that_cannot_be_used(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    folder = Path("tokenizer" if files else "no-such-thing")
    for name, text in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", {"normalizer": 0}),  # an Exception of no class of its own
        ("tokenizer.json", {"truncation": True}),
        ("tokenizer_config.json", {"do_lower_case": "yes"}),  # TypeError
        ("tokenizer_config.json", {"tokenizer_class": 1}),  # AttributeError
        ("tokenizer_config.json", {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(tmp_path, tokenizer, monkeypatch, name, change):
    """The last one wants to run its own code, and nobody is asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    (folder / "mine.py").write_text("raise SystemExit")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    with pytest.raises(InputError, match="is a damaged tokenizer"):
        load_tokenizer(folder)


def test_a_tokenizer_without_mask_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "[PAD]": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="lacks the cls, sep, mask token"):
        load_tokenizer(tmp_path)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("", {}, "contain no text"),
        (b"\xff\xfe\xfd\n\xff\n", {}, "UTF-16"),
        (b"\xff\n\xff\n", {}, r"contain no text \(2 lines are not UTF-8\)"),
        ("the cat\n\nthe mat", {}, "2 sequences are shorter than 12 tokens"),
        ("ω " * 30, {}, "1 have 50% unknown words or more"),
        ("the cat sat on " * 10 + "\n\nthe mat", {"held_out": 0.5}, "1 are held out"),
        ("the cat sat on " * 10 + "\n\nthe hills", {"held_out": 0.1}, "No sequence is held out: 1 of 2 documents"),
        ("the cat sat on " * 10, {"held_out": 0.999}, "only one document, which cannot be both"),
        ("the cat sat on " * 10, {"held_out": 1e-9}, "only one document, which cannot be both"),
        ("the cat\n\nthe cat", {"held_out": 0.5}, "only one document, which cannot be both"),
        ("", {"held_out": 0.5}, "contain no text"),
        ("the cat sat on " * 10, {"tokenizer": "", "train_vocabulary": 10}, "too small for this text"),
        ("the cat", {"tokenizer": "", "train_vocabulary": 99, "held_out": 0.999}, "only one document, which cannot"),
        ("the cat", {"sources": ("gone.txt",)}, "no file, folder or match 'gone.txt'"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, tokenizer, text, changes, message):
    (tmp_path / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = files_below(tmp_path)
    values = {"sources": (str(tmp_path / "a.txt"),), "tokenizer": str(tokenizer), "held_out": 0} | changes
    with pytest.raises(InputError, match=message):
        prepare(PrepareConfig(**values), tmp_path / "rows")
    assert files_below(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_existing_output_is_not_touched(tmp_path, tokenizer):
    write_corpus(tmp_path / "a.txt")
    (tmp_path / "rows").mkdir()
    config = PrepareConfig(sources=(str(tmp_path / "a.txt"),), tokenizer=str(tokenizer), held_out=0.2)
    prepare(config, tmp_path / "rows")  # an empty folder is fine
    before = files_below(tmp_path)
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        prepare(config, tmp_path / "rows")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        prepare(config, tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"Cannot write .*: Not a directory"):
        prepare(config, tmp_path / "a.txt" / "rows")
    assert files_below(tmp_path) == before


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, tokenizer):
    write_corpus(tmp_path / "a.txt")

    def interrupt(counts):
        raise KeyboardInterrupt

    config = PrepareConfig(sources=(str(tmp_path / "a.txt"),), tokenizer=str(tokenizer))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "rows", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "nothing to prepare"),
        ({"train_vocabulary": 5}, "either a tokenizer"),
        ({"tokenizer": ""}, "either a tokenizer"),
        ({"min_tokens": 2}, "min_tokens must be at least 3"),
        ({"min_tokens": 20, "sequence_length": 16}, "min_tokens must be"),
        ({"sequence_length": 70_000}, "min_tokens must be"),
        ({"held_out": 1.0}, "held_out is a share"),
        ({"max_unknown": 0.0}, "max_unknown is a share"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        PrepareConfig(**{"sources": ("a.txt",), "tokenizer": "t"} | changes)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*arguments])


def test_the_flags_have_the_defaults_of_the_config():
    parsed = parse("a.txt", "--output", "rows", "--tokenizer", "t")
    default = PrepareConfig(sources=("a.txt",), tokenizer="t")
    for field in fields(PrepareConfig):
        value = getattr(parsed, field.name)
        assert (tuple(value) if field.name == "sources" else value) == getattr(default, field.name)


def test_the_command_tells_what_became_of_the_text(tmp_path, tokenizer, capsys):
    write_corpus(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\n")
    command.run(
        parse(
            *(str(tmp_path / name) for name in ("a.txt", "b.txt")),
            *("--output", str(tmp_path / "rows"), "--tokenizer", str(tokenizer)),
            *("--held-out", "0.2", "--sequence-length", "64"),
        )
    )
    text = capsys.readouterr().out
    manifest = read_manifest(tmp_path / "rows")
    assert "documents   60" in text
    assert f"{manifest.counts['sequences']} kept" in text
    tokens = [sum(map(len, sequences_of(tmp_path / "rows", split))) for split in SPLITS]
    share = f"{100 * tokens[1] / sum(tokens):.2f}%"
    assert f"held out    {manifest.counts['held_out_documents']} documents, with {share} of the tokens" in text
    assert f"{manifest.counts['dropped_short']} too short" in text
    assert "1 lines that are not UTF-8" in text
    assert f"data.path={tmp_path / 'rows'}" in text
    assert "1 files without text" in text and "left out" not in text


def test_the_command_tells_what_it_passed_over(tmp_path, tokenizer, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_corpus(folder / "a.txt")
    (folder / "notes.rst").write_text("notes")
    (folder / "b.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    (folder / "c.csv").write_text("text,,x\nthe cat,sat,1\n")
    named = (folder, folder / "a.txt", folder / "c.csv")
    words = [*map(str, named), "--output", str(tmp_path / "rows"), "--tokenizer", str(tokenizer), "--held-out", "0.2"]
    command.run(parse(*words))
    text, counts = capsys.readouterr().out, read_manifest(tmp_path / "rows").counts
    for name, number, printed in (
        ("left_out_files", 2, "left out    2 files of the folders (other suffixes than .txt"),
        ("repeated_files", 1, "named twice 1 files"),
        ("empty_files", 1, "empty       1 files without text"),
        ("empty_records", 2, "empty       2 records whose text is empty"),
        ("unnamed_fields", 1, "unnamed     1 rows"),
    ):
        assert counts[name] == number and printed in text


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("the cat\n\nthe mat", r"join the lines of a document \(--sequence document\), or lower --min-tokens\.$"),
        ("ω " * 30, r"use a tokenizer for the language of the text"),
        ("the cat sat on " * 10 + "\n" + "the cat sat on " * 4 + "\n\nthe mat", r"lower --held-out"),
        (b"the cat\n" + b"\xff\n" * 9, r"convert the text to UTF-8\.$"),
    ],
)
def test_the_advice_is_for_what_took_the_most(tmp_path, tokenizer, text, advice):
    (tmp_path / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    config = PrepareConfig((str(tmp_path / "a.txt"),), str(tokenizer), held_out=0.5 if "sat" in str(text) else 0)
    with pytest.raises(InputError, match=advice):
        prepare(config, tmp_path / "rows")
