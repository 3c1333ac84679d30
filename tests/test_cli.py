"""What the command line says and how it ends: bad input is one sentence and status 2, and nothing is touched."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import LENGTH, file_hashes, random_params

import distil_jax
from distil_jax import cli
from distil_jax.config.load import load, presets
from distil_jax.config.run import Config
from distil_jax.config.task import FinetuneConfig
from distil_jax.data.prepare import PrepareConfig, prepare
from distil_jax.io import huggingface
from distil_jax.schema import InputError, build, expand_home, user_path

REPOSITORY = Path(__file__).parents[1]
VERBS = ("demo", "prepare", "train", "eval", "export", "report")


def ended(arguments: list[str]) -> int:
    """The status of a command line that argparse ends."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


# What it says


def test_version(capsys):
    assert ended(["--version"]) == 0
    assert capsys.readouterr().out == f"distil-jax {distil_jax.__version__}\n"


def test_help_names_every_verb(capsys):
    assert ended(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS) and max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, capsys):
    assert ended([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: distil-jax {verb} ") and "--help" in shown
    # No flag without a word about it: argparse leaves the rest of the line, or the next line, empty then.
    lines = shown.partition("options:")[2].splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.lstrip().startswith("-"):
            assert "  " in line.strip() or after.startswith(" " * 20), line


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["train", "x", "--nonsense"], ["eval"], ["export", "x"]]
)
def test_words_that_are_no_command_end_with_2(arguments, capsys):
    assert ended(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: distil-jax")
    if arguments in ([], ["trian"]):
        assert all(verb in captured.err for verb in VERBS)


@pytest.mark.parametrize(("words", "kind"), [("train", ""), ("finetune", "tasks")])
def test_help_names_every_preset(words, kind, capsys):
    assert ended([words, "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert all(name in shown for name in presets(kind)) and len(presets(kind)) > 5


def test_the_configuration_of_a_fine_tuning_is_printed_without_a_folder(capsys):
    words = ["finetune", "my_bert", "--task", "sst2"]
    assert cli.main([*words, "--print-config"]) == 0
    assert build(FinetuneConfig, tomllib.loads(capsys.readouterr().out)).model.path == "my_bert"
    assert cli.main(words) == 2 and "--output" in capsys.readouterr().err


# Asks bash what TAB would offer after these words.
TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
$(complete -p distil-jax | sed 's/.*-F \\([^ ]*\\) .*/\\1/') distil-jax "${COMP_WORDS[COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_bash_completes_verbs_flags_choices_and_files(tmp_path, capsys, monkeypatch):
    pytest.importorskip("shtab", reason="completion is optional")
    assert ended(["--print-completion", "bash"]) == 0
    script = tmp_path / "distil-jax"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "text.txt").write_text("")

    def offered(*words: str) -> set[str]:
        asked = ["bash", "-c", TAB, "bash", script, "distil-jax", *words]
        result = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=tmp_path)
        return {word.strip() for word in result.stdout.splitlines() if word.strip()}

    assert offered("e") == {"eval", "export"} and offered("rep") == {"report"}
    assert offered("train", "--res") == {"--resume-step"}
    assert offered("bench", "step", "--shape", "") == {"base", "demo", "tiny"}
    assert offered("prepare", "te") == offered("train", "te") == {"text.txt"}


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_get_a_script_too(shell, capsys):
    pytest.importorskip("shtab", reason="completion is optional")
    assert ended(["--print-completion", shell]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


def test_without_the_package_completion_is_refused_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert ended(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "distil-jax: --print-completion needs shtab, which is not installed: pip install 'distil-jax[complete]'.\n"
    )


def test_print_config_prints_and_writes_nothing(workshop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [
        "train",
        str(workshop / "run.toml"),
        "--print-config",
        "--set",
        "train.steps=7",
        "--set",
        "student.init=random",
    ]
    assert cli.main(asked) == 0
    result = build(Config, tomllib.loads(capsys.readouterr().out))
    assert result == load(workshop / "run.toml", ["train.steps=7", "student.init=random"])
    assert result.train.steps == 7 and result.student.init == "random"
    assert list(tmp_path.iterdir()) == []


# Bad input


@pytest.fixture(scope="module")
def bad(workshop, tmp_path_factory) -> Path:
    """A folder with one of everything that is wrong."""
    folder = tmp_path_factory.mktemp("bad")
    config, _ = huggingface.load(workshop / "teacher")
    for name, changes in (
        ("small vocabulary", {"vocab_size": config.vocab_size - 5}),
        ("few positions", {"max_positions": 16}),
        ("no head", {"mlm_head": False}),
    ):
        other = replace(config, **changes)
        params = random_params(replace(other, mlm_head=True), seed=1)
        params = params if other.mlm_head else {part: tree for part, tree in params.items() if part != "mlm"}
        huggingface.save(folder / name, other, params, tokenizer=workshop / "teacher")
    shutil.copytree(workshop / "teacher", folder / "other words")
    words = json.loads((folder / "other words" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "other words" / "tokenizer.json").write_text(json.dumps(words))
    shutil.copytree(workshop / "teacher", folder / "gpt2")
    (folder / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 90}')
    settings = PrepareConfig(
        sources=(str(workshop / "text.txt"),),
        tokenizer=str(workshop / "teacher"),
        sequence_length=LENGTH,
        held_out=0.0,
        document="line",
        min_tokens=5,
    )
    prepare(settings, folder / "nothing held out")
    (folder / "used").mkdir()
    (folder / "used" / "thesis.txt").write_text("the only copy")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "config.toml").write_text('[theme]\ncolour = "blue"\n')
    (folder / "file").write_text("just a file")
    (folder / "broken.toml").write_text("[train\nsteps = 3")
    (folder / "picture.toml").write_bytes(b"\x93\xff\x00")
    (folder / "unknown.toml").write_text("[train]\nstps = 3\n")
    (folder / "task.toml").write_text('[task]\ntrain = "my.csv"\n')
    (folder / "empty.txt").write_text("\n\n")
    return folder


# Arguments of `train`, or of another verb where the first word says so; {w} is the workshop, {b} the folder above.
# And what the sentence must hold for a reader to know what to mend.
NO_SUCH_FOLDER = {
    "train {b}/none.toml": ["none.toml", "distilbert_base_uncased"],
    "--set data.path={b}/none": ["{b}/none", "distil-jax prepare"],
    "--set teacher.path={b}/none": ["no folder {b}/none"],
    "--set student.init={b}/none": ["no folder {b}/none"],
    "eval {b}/none --data {w}/rows": ["no folder {b}/none"],
    "eval {w}/teacher --data {b}/none": ["{b}/none"],
    "export {b}/none {o}": ["no folder {b}/none"],
    "report {b}/none": ["{b}/none"],
    "prepare {b}/none.txt --output {o} --tokenizer {w}/teacher": ["{b}/none.txt"],
    "prepare {w}/text.txt --output {o} --tokenizer {b}/none": ["{b}/none"],
}
NOT_A_BERT = {
    "--set teacher.path={b}/gpt2": ["gpt2", "{b}/gpt2"],
    "--set student.init={b}/gpt2": ["gpt2", "{b}/gpt2"],
    "--set teacher.path={w}/rows": ["{w}/rows"],
    "eval {b}/gpt2 --data {w}/rows": ["gpt2"],
    "export {b}/gpt2 {o}": ["gpt2"],
    "eval {w}/rows --data {w}/rows": ["{w}/rows"],
    "--set data.path={w}/teacher": ["{w}/teacher", "distil-jax prepare"],
}
ANOTHER_VOCABULARY = {
    "--set teacher.path={b}/small_vocabulary": ["90", "85", "{b}/small_vocabulary"],
    "--set student.init={b}/small_vocabulary": ["90", "85", "{b}/small_vocabulary"],
    "--set teacher.path={b}/other_words": ["{b}/other_words", "tokenizer"],
    "eval {b}/small_vocabulary --data {w}/rows": ["90", "85"],
    "eval {b}/other_words --data {w}/rows": ["tokenizer"],
    "eval {w}/teacher --data {w}/rows --teacher {b}/other_words": ["{b}/other_words", "tokenizer"],
}
NOT_A_CONFIG = {
    "train {b}/unknown.toml": ["train.stps", "train.steps"],
    "train {b}/broken.toml": ["broken.toml", "line 1"],
    "train {b}/picture.toml": ["picture.toml"],
    "train {b}": ["{b}"],
    "--set train.stepz=3": ["train.stepz", "train.steps"],
    "--set losss.kl=3": ["losss", "loss"],
    "--set train.steps=many": ["train.steps", "int", "many"],
    "--set train.tensorboard=1": ["train.tensorboard", "bool"],
    "--set student.layers=3": ["student.layers", "list"],
    "--set loss.soft_positions=some": ["loss.soft_positions", "'all'", "'targets'"],
    "--set train=5": ["train", "[train]"],
    "--set train.steps": ["section.key=value"],
    "--set learning_rate=1": ["did you mean optimizer.learning_rate?"],
    "--set train.batch_size=8": ["did you mean train.batch_rows?"],
    "--set path=rows": ["did you mean data.path or teacher.path?"],
    "--set train.wandb=true": ["train.wandb: the keys there are batch_rows, steps, "],
    "train {b}/task.toml": ["fine-tuning", "finetune MODEL --task {b}/task.toml"],
}
IMPOSSIBLE = {
    "--set train.steps=2 --set train.epochs=2": ["train.steps", "train.epochs"],
    "--set train.steps=0": ["train.steps", "train.epochs"],
    "--set student.layers=[0,1,2]": ["names 3 layers", "says 2", "student.num_layers = 3", "student.layers = []"],
    "--set student.layers=[0,9]": ["layers 0 to 3", "9"],
    "--set student.num_layers=5": ["5", "4"],
    "--set student.num_layers=0": ["num_layers"],
    "--set student.num_heads=5": ["32", "5 heads"],
    "--set student.hidden_size=16": ["16", "32", 'student.init = "random" and loss.cosine = 0'],
    "--set student.hidden_size=16 --set student.init=random": ["loss.cosine"],
    "--set loss.kl=0 --set loss.mlm=0 --set loss.cosine=0": ["loss.kl", "loss.mlm"],
    "--set loss.temperature=0": ["loss.temperature"],
    "--set masking.mask=0.9 --set masking.random=0.2": ["masking.mask", "masking.random"],
    "--set masking.mask_token_id=9999": ["mask_token_id", "9999"],
    "--set teacher.path= --set loss.kl=5": ["loss.kl", "teacher.path"],
    "--set teacher.path= --set student.init=teacher": ["student.init", "teacher.path"],
    "--set teacher.path={b}/no_head": ["teacher", "mlm_head", 'student.init = "random", loss.kl = 0 and loss.mse = 0'],
    "--set teacher.path={b}/no_head --set student.init=random": ["no MLM head", "loss.kl = 0, loss.mse = 0"],
    "--set data.path={b}/nothing_held_out": ["{b}/nothing_held_out", "--held-out"],
    "eval {w}/teacher --data {b}/nothing_held_out": ["{b}/nothing_held_out", "--held-out"],
    "--set student.max_positions=16": ["24", "16", "student.max_positions"],
    "--set student.init=random --set student.max_positions=32 --set teacher.path={b}/few_positions": ["24", "16"],
    "--set train.accumulation=3": ["16", "24", "train.accumulation"],
    "--set train.batch_rows=12": ["12", "16", "devices"],
    "--set mesh.data=3": ["8 devices", "[mesh]"],
    "--set mesh.data=1 --set mesh.tensor=8": ["tensor", "8", "4"],  # heads
    "--set optimizer.freeze=['nothing']": ["optimizer.freeze", "nothing"],
    "--set train.eval_rows=-1": ["train.eval_rows"],
    "--set train.profile_at=1 --set train.profile_steps=0": ["train.profile_steps"],
    "eval {w}/teacher --data {w}/rows --rows -3": ["rows"],
    "eval {w}/teacher --data {w}/rows --step 3": ["step"],
}
SOMETHING_ELSE_THERE = {
    "--output {b}/used": ["{b}/used", "something other than a run"],
    "--output {w}/rows": ["{w}/rows", "something other than a run"],
    "--output {b}/foreign": ["{b}/foreign", "something other than a run"],
    "--output {b}/file": ["{b}/file", "is a file"],
    "--output {b}/file/run": ["{b}/file/run"],
    "eval {b}/foreign --data {w}/rows": ["{b}/foreign"],
    "export {b}/foreign {o}": ["{b}/foreign"],
    "export {w}/teacher {b}/used": ["{b}/used", "not an empty folder"],
    "export {w}/teacher {b}/file/out": ["{b}/file"],
    "report {b}/foreign": ["{b}/foreign"],
    "report {w}/teacher": ["{w}/teacher"],
    "prepare {w}/text.txt --output {w}/rows --tokenizer {w}/teacher": ["{w}/rows"],
    "prepare {b}/empty.txt --output {o} --tokenizer {w}/teacher": ["no text"],
    "demo --output {b}/used": ["{b}/used", "demonstration"],
    "demo --output {b}/file": ["{b}/file"],
}
BAD = NO_SUCH_FOLDER | NOT_A_BERT | ANOTHER_VOCABULARY | NOT_A_CONFIG | IMPOSSIBLE | SOMETHING_ELSE_THERE


def command_line(words: str, **folders: Path) -> list[str]:
    """The words, with `train run.toml --output OUT` in front where there are only flags, and folders for letters."""
    result = words.split()
    if result[0].startswith("--"):
        result = ["train", "{w}/run.toml", *(() if "--output" in result else ("--output", "{o}")), *result]
    elif result[0] == "train":
        result += ["--output", "{o}"]
    return [placed(word, **folders) for word in result]


def placed(text: str, **folders: Path) -> str:
    for name in ("small vocabulary", "few positions", "no head", "other words", "nothing held out"):
        text = text.replace("{b}/" + name.replace(" ", "_"), "{b}/" + name)
    for letter, folder in folders.items():
        text = text.replace(f"{{{letter}}}", str(folder))
    return text


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(words, workshop, bad, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = file_hashes(bad), file_hashes(workshop)
    folders = {"w": workshop, "b": bad, "o": tmp_path / "out"}
    assert cli.main(command_line(words, **folders)) == 2
    message = capsys.readouterr().err
    assert message.startswith("distil-jax: ") and message.endswith((".\n", "?\n")) and message.count("\n") == 1
    lacking = [part for part in BAD[words] if placed(part, **folders) not in message]
    assert not lacking, message
    assert (file_hashes(bad), file_hashes(workshop)) == before
    assert list(tmp_path.iterdir()) == []


# Paths with a ~. {t} is the home, as a person writes it; each command names something there that is missing or wrong.
AT_HOME = (
    "prepare {t}/none.txt --output {o} --tokenizer {w}/teacher",
    "prepare {t}/none*.txt --output {o} --tokenizer {w}/teacher",
    "prepare {w}/text.txt --output {o} --tokenizer {t}/none",
    "prepare {w}/text.txt --output {t}/used --tokenizer {w}/teacher",
    "train {t}/none.toml",
    "train {t}/broken.toml",
    "--output {t}/file",
    "--set data.path={t}/none",
    "--set teacher.path={t}/none",
    "--set student.init={t}/none",
    "eval {t}/none --data {w}/rows",
    "eval {w}/teacher --data {t}/none",
    "eval {w}/teacher --data {w}/rows --teacher {t}/none",
    "eval {w}/teacher --task {t}/none.toml",
    "export {t}/none {o}",
    "export {w}/teacher {t}/used",
    "finetune {t}/none --task {h}/task.toml --output {o}",
    "finetune {w}/teacher --task {t}/none.toml --output {o}",
    "finetune {w}/teacher --task {h}/task.toml --teacher {t}/none --output {o}",
    "finetune {w}/teacher --task {h}/task.toml --output {t}/file",
    "finetune {w}/teacher --task {h}/task.toml --output {o} --set task.train={t}/none.csv",
    "finetune {w}/teacher --task {h}/task.toml --output {o} --set task.dev={t}/none.csv",
    "finetune {w}/teacher --task {h}/task.toml --output {o} --set task.test={t}/none.csv",
    "compare {t}/none --tasks {h}/task.toml --output {o}",
    "compare teacher={t}/none --tasks {h}/task.toml --output {o}",
    "compare {w}/teacher --tasks {t}/none.toml --output {o}",
    "compare {w}/teacher --tasks {h}/task.toml --output {t}/file",
    "report {t}/none",
    "report {w}/teacher --output {t}/file",
    "doctor {t}/none",
    "demo --output {t}/file",
    "plan {t}/none.toml",
    "plan {w}/run.toml --output {t}/file",
    "bench table {t}/none.json",
    "bench data --rows {t}/none",
    "bench data --text {t}/none.txt --tokenizer {w}/teacher",
    "bench data --text {w}/text.txt --tokenizer {t}/none",
    "bench step --shape tiny --rows {t}/none",
    "bench step --shape tiny --output {t}/none/results.json",
)
# The arguments that are text and no paths.
TEXTS = {
    "train": {"set"},
    "eval": set(),
    "prepare": {"text_field"},
    "finetune": {"set"},
    "compare": {"set", "distil"},
    "report": {"text"},
    "export": {"license", "language"},
    "demo": {"set"},
    "plan": {"set", "topology", "sweep"},
    "bench": {"set", "topology", "peer", "dropout", "batches", "lengths", "vocabularies", "tokens", "measurement"},
}


def home_words(words: str, tilde: str, **folders: Path) -> list[str]:
    if words.startswith("plan"):
        pytest.importorskip("libtpu")
    return [word.replace("{t}", tilde) for word in command_line(words, **folders)]


@pytest.fixture(scope="module")
def home(bad) -> Path:
    (bad / "task.toml").write_text(f'[task]\ntrain = "{bad}/task.csv"\n')
    (bad / "task.csv").write_text("text,label\n" + "".join(f"the cat {number},{number % 2}\n" for number in range(50)))
    return bad


@pytest.mark.parametrize("words", AT_HOME)
def test_a_tilde_is_the_home_wherever_a_path_is_taken(words, workshop, home, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    before = file_hashes(home), file_hashes(workshop)
    folders = {"w": workshop, "h": home, "o": tmp_path / "out"}
    assert cli.main(home_words(words, "~", **folders)) == 2
    message = capsys.readouterr().err
    named = str(home) + words.partition("{t}")[2].partition(" ")[0]
    assert message.startswith("distil-jax: ") and message.count("\n") == 1 and named in message
    assert (file_hashes(home), file_hashes(workshop)) == before and list(tmp_path.iterdir()) == []

    assert cli.main(home_words(words, "~nobody-is-called-so", **folders)) == 2
    message = capsys.readouterr().err
    assert message.startswith("distil-jax: There is no home folder ~nobody-is-called-so") and message.count("\n") == 1
    assert (file_hashes(home), file_hashes(workshop)) == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", cli._VERBS)
def test_every_path_of_a_verb_is_tried_above(verb):
    """A new argument is either tried with a ~, or put into the table of those that are no paths."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"distil_jax.commands.{verb}").add_arguments(parser)
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parsers = [parser, *(kind for action in commands for kind in action.choices.values())]
    taken = {
        action.dest
        for each in parsers
        for action in each._actions
        if action.type is None and action.choices is None and action.nargs != 0
    }
    lines = [command_line(words) for words in AT_HOME]
    parsed = [vars(parser.parse_args(line[1:])) for line in lines if line[0] == verb]
    tried = {name for values in parsed for name, value in values.items() if name != "set" and "{t}" in str(value)}
    assert tried == taken - TEXTS.get(verb, set())


def test_every_text_of_a_configuration_is_a_path_or_a_field():
    def texts(kind):
        for field in fields(kind):
            hint = get_type_hints(kind)[field.name]
            if is_dataclass(hint):
                yield from texts(hint)
            elif hint is str and not field.metadata.get("path"):
                yield field.name

    assert {*texts(Config), *texts(FinetuneConfig)} == {"label"}


def test_what_is_really_called_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/somebody")
    assert user_path("~") == Path("/home/of/somebody") and user_path("~/a/b") == user_path(Path("~/a/b")) == Path(
        "/home/of/somebody/a/b"
    )
    assert user_path("./~/a") == tmp_path / "~" / "a" == user_path(user_path("./~/a"))
    (tmp_path / "~$letter.txt").write_text("open in an editor")
    assert user_path("~$letter.txt") == tmp_path / "~$letter.txt" and expand_home("~$letter.txt") == "~$letter.txt"
    for other in ("a/~", "hub:~x", "a~", "", "teacher", "auto"):
        assert expand_home(other) == other
    with pytest.raises(InputError, match=r"There is no home folder ~\$other.txt.* or as ./~\$other.txt\."):
        user_path("~$other.txt")


def test_a_run_notes_where_its_paths_led(workshop, tmp_path, monkeypatch):
    """And an export stands at home, and not in a folder that is called ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(workshop))
    paths = ("data.path", "teacher.path", "student.init", "compute.cache")
    config = load("~/run.toml", [f"{path}=~/teacher" for path in paths])
    result = {config.data.path, config.teacher.path, config.student.init, config.compute.cache}
    assert result == {str(workshop / "teacher")}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cli.main(["export", str(workshop / "teacher"), "~/student"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and (tmp_path / "home/student/config.json").is_file()


def test_the_process_ends_as_the_function_does(workshop, tmp_path):
    """The real thing, `python -m distil_jax`: status 2, one line, no traceback, nothing written."""
    words = command_line("--set train.stepz=3", w=workshop, o=tmp_path / "out")
    ended = subprocess.run(
        [sys.executable, "-m", "distil_jax", *words],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == "" and ended.stderr.startswith("distil-jax: ") and ended.stderr.count("\n") == 1
    assert "Traceback" not in ended.stderr and "train.steps" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])  # found at the end, or at once
def test_who_has_read_enough_gets_no_traceback(unbuffered):
    """As `head` does: what it reads from is closed before all is said."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "distil_jax", "bench", "table"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": unbuffered},
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")
