"""The demonstration on a few lines of text, and the embedded teacher that it stands on."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import PLACES

from distil_jax.config.model import ModelConfig
from distil_jax.config.run import EMBEDDED_TEACHER
from distil_jax.evaluation import speed
from distil_jax.evaluation.fill_mask import fill_mask
from distil_jax.evaluation.speed import encoder_seconds
from distil_jax.io import huggingface
from distil_jax.runtime.run_folder import open_model
from distil_jax.schema import InputError
from distil_jax.workflows import demo as command
from distil_jax.workflows.demo import TEXT, _row, demo

LINES = (
    "returns the sum of the array elements over the given axis of the input array",
    "the shape of the output is the same as the shape of the input array",
    "raises a value error if the given argument is not a valid function name",
    "the dtype of the returned array is the same as that of the input data",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(f"{line} {number}" for number in range(60) for line in LINES))
    return replace(TEXT, sources=(str(path),), document="line", held_out=0.1)


def test_the_whole_path_and_that_a_second_call_goes_on(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "encoder_seconds", partial(encoder_seconds, repeats=1))
    overrides = ["train.steps=4", "train.eval_every=2", "train.eval_rows=16", "train.batch_rows=8", "train.log_every=2"]
    overrides += ["compute.unroll=no"]
    numbers = demo(tmp_path / "demo", overrides=overrides, text=text)
    shown = capsys.readouterr().out
    for name in ("teacher", "student, untrained", "student, distilled", "student, no teacher"):
        assert f"| {name}" in shown
        assert f"{numbers[name][0]['mlm']:.3f}"[:4] in shown
    for file in ("report.md", "curves.png", "student/config.json", "student/model.safetensors", "student/README.md"):
        assert (tmp_path / "demo" / file).stat().st_size > 0
    for file in ("report.md", "report.html", "student/README.md"):
        shared = (tmp_path / "demo" / file).read_text()
        assert not re.search(PLACES, shared) and "distil_jax-teacher" in shared
    config, _ = huggingface.load(tmp_path / "demo" / "student")
    assert (config.num_layers, config.token_types) == (2, 0)
    assert demo(tmp_path / "demo", overrides=overrides, text=text) == numbers


def test_several_seeds_are_shown_with_their_spread():
    each = [{"mlm": n, "accuracy": 0.5, "perplexity": 9.0, "agreement": 0.25} for n in (3.0, 3.2)]
    row = _row("student", ModelConfig(1000, 2, 64, 2, 128, 64), each, 1234.5, [60.0, 62.0])
    assert row[3:] == ["3.100 ± 0.141", "50.0 ± 0.0 %", "9.0 ± 0.0", "25.0 ± 0.0 %", "1,234", "61 ± 1 s"]


def test_models_are_timed_as_this_machine_computes(finished_run, monkeypatch):
    """Not as the machine that trained one of them did."""
    model, timed = open_model(finished_run), []
    hidden = speed._hidden

    def noted(config, params, batch):
        timed.append(config.dtype)
        return hidden(config, params, batch)

    monkeypatch.setattr(speed, "_hidden", noted)
    from_a_gpu = replace(model, config=replace(model.config, dtype="bfloat16"))
    encoder_seconds({"one": model, "other": from_a_gpu}, rows=1, length=16, repeats=1)
    assert set(timed) == {"float32"}


def test_what_a_killed_start_left_does_not_stop_the_next(text, tmp_path):
    (tmp_path / ".rows.unfinished-0123abcd").mkdir()
    with pytest.raises(InputError, match=r"train\.steps"):  # further than the folder
        demo(tmp_path, overrides=["train.steps=-1"], text=text)
    assert not (tmp_path / ".rows.unfinished-0123abcd").exists() and (tmp_path / "rows").is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": (0, 2**32)}, "A seed must be from 0"),
        ({"seeds": (1, 1)}, "named once"),
        ({"overrides": ["seed=3"]}, "demo sets seed itself"),
        ({"overrides": ["teacher.path=t"]}, "demo sets teacher.path itself"),
        ({"overrides": ["data.path=t"]}, "demo sets data.path itself"),
    ],
)
def test_what_would_be_ignored_is_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        demo(tmp_path / "demo", **settings)
    assert not (tmp_path / "demo").exists()


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="something other than a demonstration"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_embedded_teacher_is_small_whole_and_has_learnt():
    assert sum(path.stat().st_size for path in EMBEDDED_TEACHER.iterdir()) < 12e6
    card = (EMBEDDED_TEACHER / "README.md").read_text()
    assert "last name" in card and "steps" in card and "| mlm |" in card.replace("  ", " ")
    model = open_model(EMBEDDED_TEACHER)
    assert all(np.isfinite(leaf).all() for leaf in _leaves(model.params))
    (answers,) = fill_mask(model, ["if the [MASK] is not found, an exception is raised."], best=50)
    words = [word for word, _ in answers]
    assert sum(probability for _, probability in answers) <= 1 and len(set(words)) == 50
    assert {"file", "name", "value", "key", "function"} & set(words[:20]), "it knows what docstrings talk about"


def _leaves(tree):
    for value in tree.values():
        yield from _leaves(value) if isinstance(value, dict) else [value]
