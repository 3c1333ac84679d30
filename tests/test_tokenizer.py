"""Tokenizers: texts become the ids of `transformers`, every file travels along, and two are compared as loaded."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import VOCAB

from distil_jax.config.model import ModelConfig
from distil_jax.data.corpus import Piece
from distil_jax.data.examples import Answer, Example
from distil_jax.data.manifest import read_manifest
from distil_jax.data.prepare import PrepareConfig, prepare
from distil_jax.data.spans import span_table
from distil_jax.data.tokenizer import encode_pieces, encode_texts, fingerprint, load_tokenizer, same_tokenizer
from distil_jax.evaluation.fill_mask import fill_mask
from distil_jax.files import TOKENIZER_FILES, copy_tokenizer, has_tokenizer, tokenizer_files
from distil_jax.io import huggingface
from distil_jax.runtime.assemble import check_tokenizer
from distil_jax.runtime.run_folder import Model
from distil_jax.schema import InputError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = list("abcdefghij") + [f"##{letter}" for letter in "abcdefghij"]
WORDS = [*SPECIAL, *"[]/<>.,'-!1E9", *LETTERS, "the", "cat", "##s", "É", "é", "ï", "中", "文", "url", "sep", "mask"]
ADDED = ["covid19", "[E1]", "[/E1]", "<url>", "New York", "C++", "[drug]", "É-é", "abc"]
MARKS = ["[E1]", "[/E1]", "<url>", "É-é"]  # of these, those that are marked special
GAPS = ["", " ", "  ", "\t", "\n", "\u00a0", "\u3000", "\u200b", "\x00", "\u0301"]


def vocabulary_folder(folder: Path, words=WORDS, **files) -> Path:
    """A folder as old checkpoints have it: vocab.txt, config.json, and what else is named."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def random_tokenizer(folder: Path, kind: str, draw: random.Random) -> Path:
    """A WordPiece tokenizer with added tokens, in one of the forms that folders have."""
    from transformers import AddedToken, BertTokenizer

    how = {name: draw.choice([True, False]) for name in ("do_lower_case", "tokenize_chinese_chars")}
    how |= {"strip_accents": draw.choice([None, True, False]), "model_max_length": draw.choice([8, 512])}
    names = draw.sample(ADDED, 6)
    flags = [{name: draw.random() < 0.3 for name in ("single_word", "lstrip", "rstrip", "normalized")} for _ in names]
    added = [
        {"content": name, "special": name in MARKS, **each, "normalized": each["normalized"] or name not in MARKS}
        for name, each in zip(names, flags, strict=True)
    ]
    marks = [name for name in names if name in MARKS]
    if kind == "added_tokens.json":
        words = {name: len(WORDS) + number for number, name in enumerate(names)}
        return vocabulary_folder(
            folder, added_tokens=words, special_tokens_map={"extra_special_tokens": marks}, tokenizer_config=how
        )
    if kind == "added_tokens_decoder":
        numbered = {str(len(WORDS) + number): token for number, token in enumerate(added)}
        return vocabulary_folder(
            folder, tokenizer_config=how | {"added_tokens_decoder": numbered, "additional_special_tokens": marks}
        )
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, **how)
    for token in added:  # one by one, so that special ones stand between others
        tokenizer.add_tokens([AddedToken(**token)], special_tokens=token["special"])
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(folder)
    return folder


def random_text(draw: random.Random) -> str:
    """Words, pieces of added tokens and whole ones, in odd spaces, and never a token that rows are built with."""
    parts = ["the", "cats", "Cat", "ABC", "abcj", "É", "e\u0301", "naïve", "中文", "[", "E1", "[e1]", "zyzzyva", "🙂"]
    text = ""
    for _ in range(draw.randint(0, 12)):
        text += draw.choice(draw.choice([parts, ADDED])) + draw.choice(draw.choice([GAPS, [" "]]))
    return text


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json"])
def test_texts_get_the_ids_of_transformers(tmp_path, kind, seed):
    from transformers import AutoTokenizer

    draw = random.Random(f"{kind} {seed}")
    folder = random_tokenizer(tmp_path / "tokenizer", kind, draw)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    texts, others = ([random_text(draw) for _ in range(60)] for _ in range(2))
    bare = theirs(texts, add_special_tokens=False)["input_ids"]
    assert any(number >= len(WORDS) for ids in bare for number in ids), "no text holds an added token"
    assert [
        ids for batch in encode_pieces(ours, [Piece(b"", text, True) for text in texts]) for _, ids in batch
    ] == bare
    assert [each.ids for each in encode_texts(ours, texts)] == bare
    for length in (12, 64):
        cut = {"truncation": True, "max_length": length}
        assert [each.ids for each in encode_texts(ours, texts, max_length=length)] == theirs(texts, **cut)["input_ids"]
        pairs = list(zip(texts, others, strict=True))
        expected = theirs(texts, others, **cut)
        result = list(encode_texts(ours, pairs, max_length=length))
        assert [each.ids for each in result] == expected["input_ids"]
        assert [each.type_ids for each in result] == expected["token_type_ids"]
        words = [text.split(" ") for text in texts]
        expected = theirs(words, is_split_into_words=True, **cut)
        result = list(encode_texts(ours, words, max_length=length, words=True))
        assert [each.ids for each in result] == expected["input_ids"]
        assert [each.word_ids for each in result] == [expected.word_ids(row) for row in range(len(texts))]
    asked = [Example("line", pair, (Answer(0, ""),)) for pair in zip(texts, others, strict=True)]
    table = span_table(ours, asked, max_length=512, stride=0)
    rows = [row[:length].tolist() for row, length in zip(table.input_ids, table.lengths, strict=True)]
    assert rows == theirs(texts, others)["input_ids"]


def test_no_text_can_name_a_token_that_rows_are_built_with(tmp_path):
    """Only those: markers such as [E1] beside them are tokens, unless the folder says that they are characters too."""
    from transformers import AutoTokenizer

    marks = {"extra_special_tokens": ["[E1]", "[/E1]"]}
    added = {"[E1]": len(WORDS), "[/E1]": len(WORDS) + 1}
    folder = vocabulary_folder(tmp_path / "one", added_tokens=added, special_tokens_map=marks)
    text = "[E1] cat [SEP] the [MASK][/E1] [PAD] [CLS] [UNK]"
    apart = text.replace("[E1]", "@").replace("[/E1]", "#").replace("[", "[ ").replace("]", " ]")
    expected = AutoTokenizer.from_pretrained(folder)(apart.replace("@", "[E1]").replace("#", "[/E1]"))["input_ids"]
    [result] = encode_texts(load_tokenizer(folder), [text], max_length=99)
    assert result.ids == expected and len(WORDS) in expected
    split = {"split_special_tokens": True}
    folder = vocabulary_folder(tmp_path / "two", added_tokens=added, special_tokens_map=marks, tokenizer_config=split)
    [result] = encode_texts(load_tokenizer(folder), [text], max_length=99)
    assert result.ids == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert max(result.ids) < len(WORDS)


def special_in_the_file_alone(folder: Path) -> Path:
    """tokenizer.json marks a token as special that tokenizer_config.json does not name."""
    random_tokenizer(folder, "tokenizer.json", random.Random(1))
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].append(
        {**values["added_tokens"][0], "id": max(t["id"] for t in values["added_tokens"]) + 1, "content": "<only>"}
    )
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


def test_markers_are_never_masked_and_added_words_are(tmp_path):
    folder = special_in_the_file_alone(tmp_path / "tokenizer")
    tokens = load_tokenizer(folder).added_tokens_decoder
    (tmp_path / "a.txt").write_text(" ".join(token.content for token in tokens.values()) + " <only> the cat")
    config = PrepareConfig((str(tmp_path / "a.txt"),), tokenizer=str(folder), held_out=0)
    manifest = prepare(config, tmp_path / "rows")
    marks = {number for number, token in tokens.items() if token.content in [*SPECIAL, *MARKS, "<only>"]}
    assert set(manifest.special_ids) == marks and len(marks) > 6
    held = set(np.load(tmp_path / "rows" / "train" / "input_ids.npy").ravel().tolist())
    assert marks - set(range(5)) <= held and set(tokens) - marks <= held


# Odd folders: the ids of `transformers`, or one sentence


def odd_folders(folder: Path):
    """Folders that hold something unusual, and how many ids they have beyond those of `WORDS`."""
    text = "\n".join(WORDS).encode()
    for name, contents, more in (
        ("crlf", text.replace(b"\n", b"\r\n"), 0),
        ("a byte order mark", b"\xef\xbb\xbf" + text, 1),  # it hides [PAD], which `transformers` adds
        ("blank lines at the end", text + b"\n\n\n", 0),
        ("tokens twice", text + b"\nthe\ncat\nlast\n", 3),
    ):
        (vocabulary_folder(folder / name) / "vocab.txt").write_bytes(contents)
        yield folder / name, more
    config = {"tokenizer_class": "BertTokenizerFast"}
    yield vocabulary_folder(folder / "the name of an old class", tokenizer_config=config), 0
    both = vocabulary_folder(folder / "two files disagree, and neither has the added token", WORDS[::-1])
    load_tokenizer(vocabulary_folder(folder / "saved")).save_pretrained(both)
    saved = json.loads((both / "tokenizer_config.json").read_text())
    decoder = {"added_tokens_decoder": {str(len(WORDS)): {"content": "covid19", "special": False}}}
    (both / "tokenizer_config.json").write_text(json.dumps(saved | decoder))
    yield both, 1
    cased = shutil.copytree(both, folder / "tokenizer.json is cased and its config is not")
    values = json.loads((cased / "tokenizer.json").read_text())
    values["normalizer"]["lowercase"] = False
    (cased / "tokenizer.json").write_text(json.dumps(values))
    yield cased, 1


def test_odd_folders_prepare_the_ids_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    text = "The cats, last covid19 É the cat [ sep ] abc"
    (tmp_path / "a.txt").write_text(text)
    for number, (folder, more) in enumerate(odd_folders(tmp_path / "odd")):
        rows = tmp_path / f"rows {number}"
        config = PrepareConfig((str(tmp_path / "a.txt"),), tokenizer=str(folder), held_out=0, max_unknown=1)
        manifest = prepare(config, rows)
        expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        result = np.load(rows / "train" / "input_ids.npy")[0]
        assert result[: len(expected)].tolist() == expected, folder.name
        assert AutoTokenizer.from_pretrained(rows / "tokenizer")(text)["input_ids"] == expected, folder.name
        assert fingerprint(rows / "tokenizer") == fingerprint(folder) == manifest.tokenizer_fingerprint, folder.name
        assert manifest.vocab_size == len(WORDS) + more, folder.name


def test_a_gap_is_not_filled_where_a_token_has_no_row(tmp_path):
    folder = vocabulary_folder(tmp_path / "model", added_tokens={"covid19": len(WORDS)})
    model = Model(ModelConfig(vocab_size=len(WORDS)), params=None, tokenizer=folder)
    with pytest.raises(InputError, match=f"has {len(WORDS) + 1} tokens, but the model has {len(WORDS)}: resize"):
        fill_mask(model, ["the covid19 [MASK]"])


# Files


def test_every_file_of_a_tokenizer_is_copied_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    names = [name.replace("*", "4.0.0") for name in TOKENIZER_FILES]
    for name in (*names, "config.json", "model.safetensors", "README.md", "vocab.txt.bak"):
        (source / name).write_text(name)
    (target / "added_tokens.json").write_text("of another tokenizer")
    assert {file.name for file in tokenizer_files(source)} == set(names)
    copy_tokenizer(source, target)
    assert {file.name: file.read_text() for file in target.iterdir()} == {
        name: name for name in (*names, "config.json")
    }
    (source / "added_tokens.json").unlink()
    copy_tokenizer(source, target)
    assert not (target / "added_tokens.json").exists()
    written = {"vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    assert written | {"merges.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model"} <= set(names)
    for name in ("vocab.json", "sentencepiece.bpe.model", "spiece.model"):  # of the other families
        alone = tmp_path / name
        alone.mkdir()
        (alone / "tokenizer_config.json").write_text("{}")
        assert not has_tokenizer(alone)
        (alone / name).write_text("")
        assert has_tokenizer(alone)


@pytest.mark.parametrize("kind", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json"])
def test_a_saved_model_reads_texts_as_its_original_did(tmp_path, kind, teacher_config, teacher_params):
    from transformers import AutoTokenizer

    draw = random.Random(kind)
    folder = random_tokenizer(tmp_path / "tokenizer", kind, draw)
    huggingface.save(tmp_path / "saved", teacher_config, teacher_params, tokenizer=folder)
    texts = [random_text(draw) for _ in range(30)]
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("tokenizer", "saved"))
    assert before(texts)["input_ids"] == after(texts)["input_ids"] and len(before) == len(after) > len(WORDS)


def test_a_saved_model_names_the_tokenizer_class_that_its_config_named(tmp_path, teacher_config, teacher_params):
    folder = vocabulary_folder(tmp_path / "tokenizer")
    (folder / "config.json").write_text('{"model_type": "bert", "tokenizer_class": "XLMRobertaTokenizer"}')
    huggingface.save(tmp_path / "saved", teacher_config, teacher_params, tokenizer=folder)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tokenizer_class"] == "XLMRobertaTokenizer"


# Which are the same


def test_tokenizers_are_compared_as_loaded(tmp_path):
    draw = random.Random(5)
    one = random_tokenizer(tmp_path / "one", "added_tokens_decoder", draw)
    load_tokenizer(one).save_pretrained(tmp_path / "saved")
    assert has_tokenizer(tmp_path / "saved") and not (tmp_path / "saved" / "vocab.txt").exists()
    assert same_tokenizer(one, tmp_path / "saved") and same_tokenizer(one, one)
    plain = vocabulary_folder(tmp_path / "plain")
    mark = {"content": "[E1]", "special": True, "normalized": False}
    others = {
        "turned": vocabulary_folder(tmp_path / "turned", [*SPECIAL, *WORDS[:4:-1]]),
        "longer": vocabulary_folder(tmp_path / "longer", [*WORDS, "last"]),
        "added": vocabulary_folder(tmp_path / "added", added_tokens={"last": len(WORDS)}),
        "cased": vocabulary_folder(tmp_path / "cased", tokenizer_config={"do_lower_case": False}),
        "accents": vocabulary_folder(tmp_path / "accents", tokenizer_config={"strip_accents": False}),
        "another mask": vocabulary_folder(tmp_path / "mask", tokenizer_config={"mask_token": "mask"}),
    }
    for name, flags in {
        "[E1]": {},
        "[E1] and its spaces": {"lstrip": True},
        "[E1] alone": {"single_word": True},
    }.items():
        decoder = {"added_tokens_decoder": {str(len(WORDS)): mark | flags}}
        others[name] = vocabulary_folder(tmp_path / name, tokenizer_config=decoder)
    result = {name: fingerprint(folder) for name, folder in {"plain": plain, **others}.items()}
    assert len(set(result.values())) == len(result), result
    assert not any(same_tokenizer(plain, folder) for folder in others.values())


def vocabulary_alone(workshop: Path, folder: Path, *, turned: bool = False) -> Path:
    """The workshop's tokenizer as vocab.txt alone; `turned`: its words in another order."""
    vocabulary = load_tokenizer(workshop / "teacher").get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    return vocabulary_folder(folder, [*words[:5], *words[:4:-1]] if turned else words)


def test_rows_of_another_tokenizer_are_refused_whatever_files_it_has(workshop, tmp_path, capsys):
    rows, model = workshop / "rows", ModelConfig(vocab_size=VOCAB)
    manifest = read_manifest(rows)
    for folder in (workshop / "teacher", vocabulary_alone(workshop, tmp_path / "same")):
        check_tokenizer(folder, model, rows, manifest)
    other = vocabulary_alone(workshop, tmp_path / "other", turned=True)
    with pytest.raises(InputError, match=f"with another tokenizer than that of the model {other}"):
        check_tokenizer(other, model, rows, manifest)
    assert capsys.readouterr().err == ""
    (other / "vocab.txt").unlink()
    check_tokenizer(other, model, rows, manifest)
    assert capsys.readouterr().err.startswith(f"Not checked: {other} holds no tokenizer")


def test_rows_of_earlier_versions_go_with_the_tokenizer_they_were_made_with(workshop, tmp_path):
    rows = shutil.copytree(workshop / "rows", tmp_path / "rows")
    values = json.loads((rows / "manifest.json").read_text())
    values["tokenizer_fingerprint"] = "of a file that is read otherwise"
    (rows / "manifest.json").write_text(json.dumps(values))
    check_tokenizer(workshop / "teacher", ModelConfig(vocab_size=VOCAB), rows, read_manifest(rows))


def test_the_fingerprint_of_a_plain_tokenizer_is_what_it_always_was(tmp_path):
    """Runs hold on to the fingerprint of their rows: another value, and none of them would go on."""
    known = "e9b6ce3ba8093d84984a3a8805b4bafd71b9ed070b42b03e9b89455e30bbd5ed"
    assert fingerprint(vocabulary_folder(tmp_path / "one")) == known
