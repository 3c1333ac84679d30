"""Files that others wrote, damaged at random: every parser succeeds or refuses in one sentence, and nothing else.

What is planted in them comes out, or is counted, or the file is refused: nothing is lost in silence.

DISTIL_FUZZ=2000 pytest tests/test_fuzz.py --hypothesis-seed=7: so many cases a test, those of that seed; without a seed
other ones each time; without DISTIL_FUZZ 60, always the same.
"""

from __future__ import annotations

import bz2
import contextlib
import copy
import csv
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import resource
import shutil
import signal
import struct
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pyarrow.parquet
import pytest
import tomli_w
from conftest import RUN
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from distil_jax.config.load import load
from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.config.run import Config
from distil_jax.config.task import TaskConfig
from distil_jax.data import corpus, loader, sources, tokenizer
from distil_jax.data.examples import read_splits
from distil_jax.data.manifest import SPLITS, verify
from distil_jax.data.records import read_records
from distil_jax.io import huggingface
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.metrics import read_metrics
from distil_jax.models.encoder import abstract_params
from distil_jax.models.heads import abstract_task_params
from distil_jax.reporting import report
from distil_jax.schema import InputError, build, to_dict

FUZZ = settings(
    max_examples=int(os.environ.get("DISTIL_FUZZ", "60")),
    derandomize="DISTIL_FUZZ" not in os.environ,
    database=None,
    deadline=None,  # `parse` has its own
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),  # explaining a failure takes minutes
)
LONGEST_CASE = 20  # seconds; most take a millisecond
LARGEST_CASE = 2**31  # bytes that may come to the address space
MAPPED = Path("/proc/self/statm")  # Linux
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
SIZES = {"vocab_size": 7, "hidden_size": 4, "num_heads": 2, "intermediate_size": 3, "max_positions": 5}
DISTILBERT = ModelConfig(**SIZES, num_layers=1, token_types=0)


def parse(parser: Callable, *arguments: Any, saying: str = "") -> Any:
    """What the parser returns, or None where it refuses, `saying` so; another error, a hang or a long story fails."""
    try:
        with limits():
            return parser(*arguments)
    except InputError as error:
        message = str(error)
        note(message)
        assert (
            message.isprintable()
            and message.endswith((".", "?"))
            and len(message) < 2_000
            and re.search(saying, message)
        )
        return None


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A hang is an AssertionError in here, and a giant allocation a MemoryError, whatever the machine has."""

    def late(*_: object) -> None:
        raise AssertionError("the parser hangs")

    before, action = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    if MAPPED.exists():
        pages = int(MAPPED.read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LARGEST_CASE, before[1]))
    signal.alarm(LONGEST_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, action)
        resource.setrlimit(resource.RLIMIT_AS, before)


# Damage


NUMBERS = [0, 1, -1, 2, 3, 127, 255, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 10**400]
FLOATS = [0.0, -0.0, 0.5, 1.0, 1e-300, 1e308, math.inf, -math.inf, math.nan]
TEXTS = ["", ".", "..", "../x", "/etc/passwd", "/dev/zero", "C:\\x", "x/", "a\0b", "\ud800", "é\n\x1b[31m\u2028"]
TEXTS += ["x" * 3_000, "nan", "1e999", "null", "[1]", "bert", "I32", "F4", "F8_E4M3", "C64", "[MASK]", "BertTokenizer"]
TEXTS += ["train", "train/input_ids.npy", "model.safetensors", "model-0.safetensors", "config.json"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.sampled_from(FLOATS),
    st.floats(),
    st.sampled_from(TEXTS),
    st.text(max_size=10),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS) | st.text(), inner, max_size=3),
    max_leaves=4,
)
PLACES = st.integers(0, 2**16)
# Changes a value a little or altogether, removes it, sets it to that of another place, or puts one beside it.
EDIT = st.sampled_from(["nudge", "nudge", "nudge", "nudge", "replace", "replace", "remove", "copy", "add"])
EDITS = st.lists(st.tuples(EDIT, PLACES, PLACES, VALUES), min_size=1, max_size=3)
SPLINTERS = [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5_000, b"0x" + b"f" * 5_000, b"-", b"1e999", b"NaN", b"null"]
SPLINTERS += [b'"', b"\\", b"\\ud800", b"\0" * 16, b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"{}", b"[]", b",", b":"]
SPLINTERS += [b"PK\x03\x04", b"\x80\x04.", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"'", b"L,"]
CUTS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "write", "insert", "remove", "repeat", "truncate"]),
        st.integers(0, 160) | PLACES,  # where headers are, or anywhere
        st.integers(1, 64),
        st.integers(0, len(SPLINTERS) - 1) | st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def cut(sound: bytes, edits: list[tuple[str, int, int, int | bytes]]) -> bytes:
    """Damages bytes as bytes."""
    for what, place, length, splinter in edits:
        place %= len(sound) + 1
        splinter = SPLINTERS[splinter] if isinstance(splinter, int) else splinter
        head, span, tail = sound[:place], sound[place : place + length], sound[place + length :]
        sound = {
            "flip": head + bytes([span[0] ^ (1 << length % 8)]) + span[1:] + tail if span else sound,
            "write": head + splinter + sound[place + len(splinter) :],
            "insert": head + splinter + span + tail,
            "remove": head + tail,
            "repeat": head + span + span + tail,
            "truncate": head,
        }[what]
    return sound


def edited(sound: Any, edits: list[tuple[str, int, int, Any]]) -> Any:
    """Damages nested values as values."""
    values = copy.deepcopy(sound)
    for what, place, other, value in edits:
        result = list(_places(values))
        if not result:
            break
        container, key = result[place % len(result)]
        if what == "copy":
            source, name = result[other % len(result)]
            value = copy.deepcopy(source[name])
        elif what == "nudge":
            value = _nudged(container[key], other)
        if what == "remove":
            del container[key]
        elif what == "add" and isinstance(container, dict):
            container[TEXTS[other % len(TEXTS)]] = value
        elif what == "add":
            container.append(value)
        else:
            container[key] = value
    return values


def _nudged(value: Any, choice: int) -> Any:
    """Another value of the same type, or nearly."""
    if isinstance(value, (bool, type(None))):
        return not value
    if isinstance(value, (int, float)):
        others = [value + 1, -value, 10**400, math.nan]
    elif isinstance(value, str):
        others = [value[:-1], value + "x", value + "\0", value + "\ud800"]
    elif isinstance(value, list):
        others = [value[:-1], value[::-1], value * 2, []]
    else:
        others = [dict(list(value.items())[1:]), {}]
    return others[choice % len(others)]


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    for key in values if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], (dict, list)):
            yield from _places(values[key])


DAMAGE = st.sampled_from([EDITS, EDITS, CUTS]).flatmap(
    lambda edits: st.tuples(st.just("bytes" if edits is CUTS else "values"), edits)
)


def damaged_json(sound: bytes, damage: tuple[str, Any]) -> bytes:
    what, edits = damage
    mutant = cut(sound, edits) if what == "bytes" else json.dumps(edited(json.loads(sound), edits)).encode()
    note(f"{mutant[:5_000]!r}")
    return mutant


def damaged_toml(sound: bytes, damage: tuple[str, Any]) -> bytes:
    what, edits = damage
    if what == "values":
        return tomli_w.dumps(_without_none(edited(tomllib.loads(sound.decode()), edits))).encode(errors="surrogatepass")
    return cut(sound, edits)


def _without_none(values: Any) -> Any:
    """TOML has no null."""
    if isinstance(values, dict):
        return {name: _without_none(value) for name, value in values.items() if value is not None}
    return [_without_none(value) for value in values if value is not None] if isinstance(values, list) else values


# Configs


SECTIONS = {name: table for name, table in to_dict(load("demo_student")).items() if isinstance(table, dict)}
KEYS = [f"{section}.{name}" for section, table in SECTIONS.items() for name in table]
KEYS += ["seed", "train", "student.hidden_size.x", "", ".", "..", "a" * 3_000, "a." * 3_000]
WORDS = ["0", "1", "2", "0.5", "-1", "auto", "random", "[1]", "true", "nan", "inf", "'", "1\nx=2", "\udcff"]
WORDS += ["0x" + "f" * 5_000, "9" * 5_000, "[" * 3_000]
WORD = st.sampled_from(WORDS) | SCALARS.map(str) | VALUES.map(json.dumps)
OVERRIDES = st.lists(st.tuples(st.sampled_from(KEYS), WORD).map("=".join) | st.text(max_size=20), max_size=2)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check_config(path: Path, overrides: list[str] = ()) -> None:
    """What loads can be written and loads again as the same."""
    config = parse(load, path, overrides)
    if config is not None:
        again = path.with_name("again.toml")
        again.write_text(tomli_w.dumps(to_dict(config)), encoding="utf-8")
        assert repr(load(again)) == repr(config)


@FUZZ
@given(st.sampled_from([RUN.format(rows="r", teacher="t", steps=3), *(path.read_text() for path in CONFIGS)]), DAMAGE)
def test_configs(scratch, text, damage):
    path = scratch / "config.toml"
    path.write_bytes(damaged_toml(text.encode(), damage))
    check_config(path)


@FUZZ
@given(OVERRIDES)
def test_overrides(scratch, overrides):
    path = scratch / "config.toml"
    path.write_text(RUN.format(rows="r", teacher="t", steps=3))
    check_config(path, overrides)


@FUZZ
@given(EDITS)
def test_values_of_a_config(edits):
    values = edited(to_dict(load("demo_teacher")), edits)
    config = parse(build, Config, values)
    if config is not None:
        assert repr(build(Config, to_dict(config))) == repr(config)
        assert hash(config) == hash(build(Config, to_dict(config)))


# Model folders


def random_leaves(shapes: dict) -> dict:
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), nn.unbox(shapes))


def save_random(folder: Path, config: ModelConfig) -> Path:
    huggingface.save(folder, config, random_leaves(abstract_params(config)))
    return folder


@pytest.fixture(scope="module")
def model(scratch) -> Path:
    """A DistilBERT with the copy of a tied tensor, as PyTorch writes it."""
    folder = save_random(scratch / "model", DISTILBERT)
    weights = load_file(folder / "model.safetensors")
    weights["vocab_projector.weight"] = weights["distilbert.embeddings.word_embeddings.weight"].copy()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bert(scratch) -> Path:
    return save_random(scratch / "bert", replace(DISTILBERT, token_types=2, mlm_head=False, pooler=True))


@pytest.fixture(scope="module")
def sharded(model) -> Path:
    """The same in two files behind an index."""
    folder = shutil.copytree(model, model.with_name("sharded"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard)
        places |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@contextlib.contextmanager
def replaced(path: Path, mutant: bytes) -> Iterator[None]:
    """The file with other bytes, and then with its own again."""
    sound = path.read_bytes()
    path.write_bytes(mutant)
    try:
        yield
    finally:
        path.write_bytes(sound)


@FUZZ
@given(st.booleans(), DAMAGE)
def test_config_json(model, bert, is_bert, damage):
    folder = bert if is_bert else model
    path = folder / "config.json"
    with replaced(path, damaged_json(path.read_bytes(), damage)):
        parse(huggingface.load, folder)


@pytest.fixture(scope="module")
def tasks(scratch) -> dict[str, Path]:
    """A folder for each kind of head."""
    folders = {}
    for kind, token_types in (("sequence", 2), ("tokens", 0), ("spans", 0)):
        config, head = replace(DISTILBERT, token_types=token_types), HeadConfig(kind, label_names=("no", "yes"))
        folders[kind] = scratch / kind
        huggingface.save_task(folders[kind], config, head, random_leaves(abstract_task_params(config, head)))
    return folders


@FUZZ
@given(st.sampled_from(["sequence", "tokens", "spans"]), DAMAGE)
def test_config_json_of_a_task(tasks, kind, damage):
    path = tasks[kind] / "config.json"
    with replaced(path, damaged_json(path.read_bytes(), damage)):
        parse(huggingface.load_task, tasks[kind])


BITS = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64, "I32": 32, "I64": 64, "U8": 8, "BOOL": 8, "C64": 64}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F4": 4}
TENSOR_SHAPES = [[], [0], [1], [7], [4, 7], [7, 4], [8, 4], [7, 4, 1], [2**62, 0], [3, 4], [4, 3]]
# Another type, shape, name or contents, in a file that is true to its header.
TENSOR_EDIT = st.sampled_from(["type", "shape", "name", "copy", "contents", "remove"])
TENSOR_EDITS = st.lists(st.tuples(TENSOR_EDIT, PLACES, PLACES), min_size=1, max_size=3)


def other_tensors(sound: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    (size,) = struct.unpack("<Q", sound[:8])
    header, body = json.loads(sound[8 : 8 + size]), sound[8 + size :]
    tensors = {
        name: (of["dtype"], of["shape"], body[slice(*of["data_offsets"])])
        for name, of in header.items()
        if name != "__metadata__"
    }
    tied = [name for name in tensors if "vocab_projector.weight" in name or "word_embeddings" in name]
    for what, place, other in edits:
        names = list(tensors) + tied * 5
        name = names[place % len(names)]
        if name not in tensors:
            continue
        dtype, shape, data = tensors.pop(name)
        if what == "type":
            dtype = list(BITS)[other % len(BITS)]
        elif what == "shape":
            shape = TENSOR_SHAPES[other % len(TENSOR_SHAPES)]
        elif what in ("name", "copy"):
            tensors |= {name: (dtype, shape, data)} if what == "copy" else {}
            name = (names + TEXTS)[other % len(names + TEXTS)]
        elif what == "contents":
            data = bytes([other % 256]) * len(data)
        if what != "remove":
            tensors[name] = (dtype, shape, data)
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        length = -(-math.prod(shape) * BITS[dtype] // 8)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + length]}
        body += data[:length].ljust(length, b"\1")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@FUZZ
@given(DAMAGE | st.tuples(st.just("tensors"), TENSOR_EDITS))
def test_safetensors(model, damage):
    """All of the file as bytes, its header as values, or its tensors."""
    path = model / "model.safetensors"
    sound = path.read_bytes()
    what, edits = damage
    if what == "values":
        (size,) = struct.unpack("<Q", sound[:8])
        header = damaged_json(sound[8 : 8 + size], damage)
        mutant = struct.pack("<Q", len(header)) + header + sound[8 + size :]
    else:
        mutant = cut(sound, edits) if what == "bytes" else other_tensors(sound, edits)
    with replaced(path, mutant):
        parse(huggingface.load, model)


@FUZZ
@given(DAMAGE)
def test_an_index_of_shards(sharded, damage):
    path = sharded / "model.safetensors.index.json"
    with replaced(path, damaged_json(path.read_bytes(), damage)):
        parse(huggingface.load, sharded)


# Rows


@pytest.fixture(scope="module")
def rows(workshop, scratch) -> Path:
    return shutil.copytree(workshop / "rows", scratch / "rows")


def check_rows(folder: Path) -> None:
    """Whatever opens gives rows that a model can take."""
    manifest = parse(verify, folder)
    for split in SPLITS:
        table = parse(loader.open_rows, folder, split)
        if table is None:
            continue
        numbers = np.arange(len(table))[::-1]
        result = parse(table.gather, numbers)
        if result is not None:
            assert (result.input_ids >= 0).all() and (result.input_ids < table.vocab_size).all()
            assert result.input_ids.shape == result.segment_ids.shape == result.position_ids.shape
    if manifest is not None:
        counts = parse(loader.token_counts, folder, manifest)
        assert counts is None or counts.shape == (manifest.vocab_size,)


@FUZZ
@given(DAMAGE)
def test_the_manifest_of_rows(rows, damage):
    path = rows / "manifest.json"
    with replaced(path, damaged_json(path.read_bytes(), damage)):
        check_rows(rows)


DTYPES = st.sampled_from(["<u2", ">u2", "<u4", "<i8", "|O", "|V0", "<U9", "|S0", "f16", "<M8[s]", "u2,u2", "", "x"])
SHAPES = st.lists(st.sampled_from([-1, 0, 1, 24, 2**31, 2**62, 2**63, 10**30]), max_size=3).map(tuple)
HEADERS = st.one_of(
    st.builds(
        lambda descr, order, shape: repr({"descr": descr, "fortran_order": order, "shape": shape}),
        DTYPES | VALUES | st.just([("a", "<u2")]) | st.just([("a", "<u2", (2**31, 2**31))]),
        st.booleans() | SCALARS,
        SHAPES | VALUES,
    ),
    st.just("{'descr': '<u2', 'fortran_order': False, 'shape': (5L, 24L), }"),  # as Python 2 wrote it
    st.sampled_from(["(" * 5_000, "-" * 9_000 + "1", "{}"]) | st.text(),
)


def npy(version: int, header: str, body: bytes) -> bytes:
    text = (header + "\n").encode(errors="surrogatepass")
    length = struct.pack("<H", len(text) % 2**16) if version == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + body


@FUZZ
@given(
    st.sampled_from(["train/input_ids.npy", "train/segment_ids.npy", "held_out/input_ids.npy", "token_counts.npy"]),
    CUTS | st.tuples(st.integers(1, 3), HEADERS),
)
def test_arrays_of_rows(rows, name, damage):
    """With a manifest that agrees with the damage, so that the file is read at all."""
    sound = (rows / name).read_bytes()
    mutant = cut(sound, damage) if isinstance(damage, list) else npy(*damage, sound[128:])
    manifest = json.loads((rows / "manifest.json").read_text())
    for file in manifest["files"]:
        if file["path"] == name:
            digest = hashlib.sha256(mutant[file["header"] :]).hexdigest()
            file |= {"bytes": len(mutant), "sha256": digest}
    with replaced(rows / name, mutant), replaced(rows / "manifest.json", json.dumps(manifest).encode()):
        check_rows(rows)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoints(scratch) -> Iterator[Checkpoints]:
    with contextlib.closing(Checkpoints(scratch / "checkpoints", keep=9)) as opened:
        for step in (1, 2):
            opened.save(step, {"kernel": jax.numpy.ones(3)}, {"position": step, "config": {"a": [1.5, None]}})
            opened.wait()
        assert opened.newest_valid() == (2, [])
        yield opened


@FUZZ
@given(DAMAGE, st.booleans())
def test_the_manifest_of_a_checkpoint(scratch, checkpoints, damage, sealed):
    """`sealed`: with a checksum that agrees with the damage."""
    path = scratch / "checkpoints" / "2" / "manifest.json"
    sound = path.read_bytes()
    if sealed:
        body = damaged_json(json.dumps(json.loads(sound)["body"]).encode(), damage)
        with contextlib.suppress(ValueError, RecursionError):  # bytes that are not JSON have no seal
            digest = hashlib.sha256(json.dumps(json.loads(body), sort_keys=True).encode()).hexdigest()
            body = b'{"sha256": "%s", "body": %s}' % (digest.encode(), body)
    else:
        body = damaged_json(sound, damage)
    with replaced(path, body):
        facts = parse(checkpoints.metadata, 2)
        assert facts is None or isinstance(facts, dict)
        parse(checkpoints.verify, 2)
        result, problems = checkpoints.newest_valid()
        assert result == 2 - len(problems)
        shape = jax.ShapeDtypeStruct((3,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        if facts is not None and path.read_bytes() != sound:
            parse(checkpoints.restore, 2, {"kernel": shape})


# The numbers of a run


LINES = [
    {"step": 0, "kind": "held_out", "mlm": 4.5, "kl": 2.25, "agreement": 0.0, "accuracy": 0.0, "perplexity": 90.0},
    {"step": 1, "kind": "train", "kl": 2.5, "mlm": None, "cosine": 0.5, "loss": 9.0, "tokens_per_second": 1234.5},
    {"step": 2, "kind": "skipped", "loss": None, "gradient_norm": 1e9, "rows": [1, 2, 3]},
    {"step": 2, "kind": "train", "kl": 2.5, "mlm": 4.0, "cosine": 0.5, "loss": 9.0, "tokens_per_second": 1e4},
    {"step": 2, "kind": "held_out", "mlm": 4.5, "kl": 2.25, "agreement": 0.1, "accuracy": 0.2, "perplexity": 90.0},
]


@pytest.fixture(scope="module")
def run(scratch) -> Path:
    (scratch / "run" / "tokenizer").mkdir(parents=True)
    (scratch / "run" / "config.toml").write_text(RUN.format(rows="r", teacher="t", steps=3))
    return scratch / "run"


@FUZZ
@given(DAMAGE)
def test_metrics(run, damage):
    what, edits = damage
    sound = "".join(json.dumps(line) + "\n" for line in (edited(LINES, edits) if what == "values" else LINES)).encode()
    (run / "metrics.jsonl").write_bytes(cut(sound, edits) if what == "bytes" else sound)
    lines = parse(read_metrics, run, saying=r"^Line \d+ of .*metrics\.jsonl is damaged")
    if lines:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "draw_curves", lambda metrics, path: report.Heading(""))  # matplotlib takes a second
            parse(report.write_report, {"run": run}, run)


# Text and tokenizers


@pytest.fixture(scope="module")
def tokens(workshop, scratch) -> Path:
    return shutil.copytree(workshop / "rows" / "tokenizer", scratch / "tokenizer")


@FUZZ
@given(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), DAMAGE)
def test_a_tokenizer(tokens, name, damage):
    path = tokens / name
    with replaced(path, damaged_json(path.read_bytes(), damage)):
        parse(tokenizer.fingerprint, tokens)
        parse(tokenizer.load_tokenizer, tokens)


@FUZZ
@given(st.sampled_from(["jsonl", "txt"]), st.sampled_from(["block", "file", "line"]), DAMAGE)
def test_text(scratch, suffix, document, damage):
    records = [{"text": "a b\nc", "id": 1}, {"text": "é \ud800 x", "more": None}, {"text": "\n\n"}]
    what, edits = damage
    lines = edited(records, edits) if what == "values" else records
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path = scratch / f"text.{suffix}"
    path.write_bytes(cut(text, edits) if what == "bytes" else text)
    counts: Counter[str] = Counter()
    parse(lambda: list(corpus.read([str(path)], document=document, counts=counts)))


# What is planted


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    ['"', "a,b", "{}", "[1]", '{"text": "x"}', "\ufeff", "\u2028", "\u0085x", "é", "text", " x ", "\\", "'", "sep=;"]
)
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKING = st.sampled_from(list(PACKERS))
FORMATS = ("jsonl", "list", "indented", "csv", "tsv")


def planted(records: list[dict[str, Any]], form: str) -> bytes:
    """The records as a file of that form, written by other code than what reads it."""
    if form in ("list", "indented"):
        return json.dumps(records, indent=2 if form == "indented" else None, ensure_ascii=False).encode()
    if form == "jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if form == "tsv":
        rows = [records[0].keys(), *(map(str, record.values()) for record in records)]
        return "\n".join(map("\t".join, rows)).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0].keys())
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def read_text(path: Path, counts: Counter[str], document: str = "line") -> list[corpus.Piece] | None:
    return parse(lambda: list(corpus.read([str(path)], document=document, counts=counts)))


@FUZZ
@given(
    st.lists(WORDS.map(str.encode) | st.binary(max_size=4) | st.just(b"\xff"), max_size=40),
    st.sampled_from([b"\n", b"\r\n"]),
    PACKING,
    st.none() | CUTS,
)
def test_no_line_of_a_text_is_lost(scratch, lines, end, packing, damage):
    data = end.join([b"a line", *lines])
    data = cut(data, damage) if damage else data
    path = scratch / f"planted.txt{packing}"
    path.write_bytes(PACKERS[packing](data))
    counts: Counter[str] = Counter()
    pieces = read_text(path, counts)
    if pieces is None or sources.kind_of(str(path)) != "text":
        return
    result, invalid = [], 0
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n")):
        try:
            text = line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").decode()
        except UnicodeDecodeError:
            invalid += 1
            continue
        if "\0" in text:
            invalid += 1
        elif text.strip():
            result.append(text.strip())
    assert [piece.text for piece in pieces] == result
    assert counts["documents"] == len(result) and counts["invalid_lines"] == invalid
    assert counts["bytes"] == path.stat().st_size == corpus.size_in_bytes([str(path)])


@FUZZ
@given(
    st.lists(WORDS, min_size=1, max_size=12),
    st.sampled_from(FORMATS),
    st.sampled_from(["a.jsonl", "a.JSON", "a.txt", "wiki_00"]),
    PACKING,
    st.booleans(),
)
def test_no_record_is_lost(scratch, texts, form, name, packing, marked):
    """Planted records come out, in their order, of a file that is called as it is or otherwise."""
    records = [{"text": text.replace("\t", " "), "id": f"n{number}"} for number, text in enumerate(texts)]
    suffix = f".{form}" if form in ("csv", "tsv") else ""
    path = scratch / f"{name}{suffix}{packing}"
    path.write_bytes(PACKERS[packing](b"\xef\xbb\xbf" * marked + planted(records, form)))
    try:
        counts: Counter[str] = Counter()
        pieces = list(corpus.read([str(path)], counts=counts))
        assert [piece.text for piece in pieces] == [text for r in records if (text := r["text"].strip())]
        assert counts["documents"] + counts["empty_records"] == len(records)
        assert [record for _, record in read_records(str(path)).rows] == records
    finally:
        path.unlink()


@FUZZ
@given(st.sampled_from(FORMATS), CUTS, PACKING)
def test_no_record_is_lost_of_a_damaged_file(scratch, form, damage, packing):
    """As many come out as there are lines, or rows, or the file is refused."""
    data = cut(planted([{"text": f"text {n}", "id": n} for n in range(20)], form), damage)
    path = scratch / f"damaged.{form if form in ('csv', 'tsv') else 'jsonl'}{packing}"
    path.write_bytes(PACKERS[packing](data))
    result = parse(lambda: [record for _, record in read_records(str(path)).rows])
    counts: Counter[str] = Counter()
    pieces = read_text(path, counts)
    if result is not None:
        text = data.decode("utf-8-sig")
        if form in ("list", "indented"):
            with contextlib.suppress(ValueError):
                assert result == json.loads(text) or result == [json.loads(text)]
                return
        if form == "csv":
            rows = len([row for row in csv.reader(io.StringIO(text, newline="")) if row]) - 1
        else:
            rows = len([line for line in text.split("\n") if line.strip("\r" if form == "tsv" else None)])
            rows -= form == "tsv"
        assert len(result) == rows
    if pieces is not None and form == "jsonl":
        lines = len([line for line in data.split(b"\n") if line.strip(b" \t\r\v\f")])
        assert counts["documents"] + counts["empty_records"] + counts["invalid_lines"] >= lines


@FUZZ
@given(st.sampled_from([".gz", ".bz2", ".xz"]), CUTS, st.booleans())
def test_a_damaged_archive_gives_all_or_nothing(scratch, packing, damage, twice):
    lines = [f"line {number} of the text" for number in range(50)]
    text = "\n".join(lines).encode()
    sound = PACKERS[packing](text[:300]) + PACKERS[packing](text[300:]) if twice else PACKERS[packing](text)
    path = scratch / "damaged.txt"
    path.write_bytes(sound[:16] + cut(sound[16:], damage))
    pieces = read_text(path, Counter())
    # Cut exactly between its two members, a file is whole.
    assert pieces is None or [piece.text for piece in pieces] in (lines, text[:300].decode().split("\n"))


LABELS = st.sampled_from(
    [
        st.integers(-2, 5),
        st.integers(),
        st.integers(-1, 5).map(float),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.sampled_from(
            ["true", "True", "FALSE", "1", "0", "1.0", "-1", " 1", "no", "yes ", "NaN", "", "1e2", "½", "٢"]
        ),
        WORDS,
    ]
).flatmap(lambda values: st.lists(values, min_size=2, max_size=6))
NAMES = st.sampled_from(
    [
        (),
        (),
        (),
        ("no", "yes"),
        ("-1", "0", "1"),
        ("2", "1"),
        ("true", "false"),
        ("1.0", "0"),
        ("0", "x"),
        ("a", "b", "c"),
    ]
)


@FUZZ
@given(LABELS, NAMES, st.sampled_from([("csv", "jsonl")] * 8 + [("csv", "parquet")]), st.booleans())
def test_labels_mean_the_same_in_every_format(scratch, labels, names, forms, regression):
    """The same classes in the same order, and the same numbers, or a refusal of every format."""
    records = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    result = []
    for form in forms:
        path = scratch / f"labels.{form}"
        if form == "parquet":
            try:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
            except (OverflowError, pyarrow.ArrowInvalid):  # integers beyond 64 bits
                return
        else:
            path.write_bytes(planted(records, form))
        kind = "regression" if regression else "sequence"
        splits = parse(read_splits, TaskConfig(kind, train=str(path), dev=str(path), label_names=names))
        result.append(splits and (splits.label_names, [example.label for example in splits.dev]))
    assert result[0] == result[1]


# Examples of tasks


SPAN = {"text": ["b"], "answer_start": [2]}
TASKS = {
    "sequence": [{"label": n % 2, "text": f"é {n}"} for n in range(6)],
    "regression": [{"label": n / 2, "text": f'"{n}, x'} for n in range(6)],
    "tokens": [{"label": ["O", "B-X"], "text": ["a", f"b{n}"]} for n in range(6)],
    "spans": [{"label": SPAN, "question": f"{n}?", "text": f"a b {n}"} for n in range(6)],
}
TABLES = [(kind, suffix) for kind in ("sequence", "regression") for suffix in ("csv", "tsv")]


def table_bytes(records: list[Any], suffix: str) -> bytes:
    """CSV or TSV of the records' values, whatever they have become."""
    if suffix == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in records).encode()
    lines = [["label", "text"], *(record.values() if isinstance(record, dict) else [record] for record in records)]
    if suffix == "tsv":
        return "\n".join("\t".join(map(str, line)) for line in lines).encode(errors="surrogatepass")
    text = io.StringIO()
    csv.writer(text).writerows(map(list, lines))
    return text.getvalue().encode(errors="surrogatepass")


@FUZZ
@given(st.sampled_from([*TABLES, *((kind, "jsonl") for kind in TASKS)]), st.booleans(), DAMAGE)
def test_examples_of_a_task(scratch, of, named, damage):
    """What is read has texts, and labels that a head can learn."""
    kind, suffix = of
    what, edits = damage
    sound = table_bytes(edited(TASKS[kind], edits) if what == "values" else TASKS[kind], suffix)
    path = scratch / f"examples.{suffix}"
    path.write_bytes(cut(sound, edits) if what == "bytes" else sound)
    note(f"{path.read_bytes()[:5_000]!r}")
    task = TaskConfig(
        kind,
        train=str(path),
        dev="" if named else str(path),
        text=("question", "text") if kind == "spans" else ("text",),
        label_names=("O", "B-X") if named and kind in ("sequence", "tokens") else (),
        stride=8,
        dev_share=0.5,
    )
    splits = parse(read_splits, task)
    for example in (*splits.train, *splits.dev) if splits else ():
        "".join(example.texts).encode()
        if kind == "regression":
            assert abs(np.float32(example.label)) < math.inf
        elif kind == "spans":
            assert all(example.texts[1][start:].startswith(text) for start, text in example.label)
        else:
            numbers = example.label if kind == "tokens" else [example.label]
            assert all(0 <= number < len(splits.label_names) for number in numbers)
            HeadConfig("tokens" if kind == "tokens" else "sequence", len(splits.label_names), 0.1, splits.label_names)
