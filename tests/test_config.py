"""Configs: every key checked, every mistake one sentence, nothing lost on the way through TOML."""

import dataclasses
import math
import subprocess
import sys
import tomllib
import typing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tomli_w

from distil_jax.config.load import load, load_task, read_toml
from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import LossConfig, MaskingConfig, TaskLossConfig
from distil_jax.config.run import EMBEDDED_TEACHER, Config, TrainConfig, check_seeds
from distil_jax.config.step import OptimizerConfig, StepConfig
from distil_jax.config.task import FinetuneConfig
from distil_jax.data.prepare import PrepareConfig
from distil_jax.io import huggingface
from distil_jax.machines.flops import step_flops
from distil_jax.models.encoder import count_parameters
from distil_jax.models.student import choose_layers
from distil_jax.objective.masking import most_targets
from distil_jax.runtime import run_folder
from distil_jax.runtime.assemble import student_model
from distil_jax.schema import InputError, build, differences, to_dict

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))  # those of tasks: test_tasks.py
ABLATION = Path(__file__).parents[1] / "configs" / "ablation"


def write(folder, text):
    path = folder / "config.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[trane]\nsteps = 1", "Unknown config key trane: did you mean train"),
        ("[train]\nstep = 1", "Unknown config key train.step: did you mean train.steps"),
        ('[train]\nsteps = "many"', "train.steps must be of type int"),
        ("[train]\nsteps = 1.5", "train.steps must be of type int"),
        ("[train]\nsteps = true", "train.steps must be of type int"),
        ('[loss]\nsoft_positions = "some"', "'all' or 'targets'"),
        ("[student]\nlayers = 3", "student.layers must be a list"),
        ("[student]\nlayers = [0, 'a']", "not valid TOML|student.layers"),
        ("train = 3", "train must be a table"),
        ("[train]\nsteps = 1\nepochs = 2", "either train.steps or train.epochs"),
        ("[train]\naccumulation = -1\nsteps = 1", "train.accumulation must not be negative"),
        ("[student]\nlayers = [0, 1]\nnum_layers = 3", "names 2 layers"),
        ("[student]\nlayers = [0, 1]", r"student\.init = 'random' copies none"),
        ("[loss]\nkl = 1.0", "need a teacher"),
        ('[student]\ninit = "teacher"', "needs a teacher"),
        ('[teacher]\npath = "t"\n[loss]\nkl = 0\nmlm = 0\ncosine = 0', "nothing to minimise"),
        ('[teacher]\npath = "t"\n[loss]\ntemperature = 0.0', "temperature must be above 0"),
        ("[mesh]\ndata = -1\nfsdp = -1", "at most one of them -1"),
        ("[masking]\nmask = 0.8\nrandom = 0.3", "shares that add up to at most 1"),
        ("this is no toml", "is not valid TOML"),
        pytest.param("seed = " + "9" * 5_000, "is not valid TOML", id="more digits than Python reads"),
        pytest.param("seed = 0x" + "f" * 5_000, "seed must be a number of at most 63 bits", id="a hexadecimal giant"),
        pytest.param("[loss]\nkl = 0x" + "f" * 5_000, "loss.kl must be a number of at most 63 bits", id="no float"),
        pytest.param(f"data = [0x{'f' * 5_000}]", "data must be a table", id="a giant in a list"),
        pytest.param(f'[data]\n"{"x" * 9_000}" = 1', "Unknown config key .{,2000}$", id="a long name"),
        ('[data]\n"a\\n\\u001b[31m" = 1', r"data.a\\n\\x1b\[31m: the keys there are path\.$"),
        ("[task]\nx = 1\n[data]\nx = 1", "configures a fine-tuning"),
        ("[train]\nlr = 1", "train.lr: the keys there are batch_rows"),
        ("[train]\nlearning_rate = 1", r"did you mean optimizer\.learning_rate\?"),
        ("[optimiser]\nsteps = 1", r"did you mean optimizer\?"),
        ("steps = 1", r"did you mean optimizer\.steps or train\.steps\?"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        load(write(tmp_path, text))


# Every number that a config holds, and what it cannot be.
BOUNDS = {
    "seed": (-1, 2**32),
    "student.num_layers": (0,),
    "student.hidden_size": (0,),
    "student.num_heads": (0,),
    "student.intermediate_size": (0,),
    "student.max_positions": (0,),
    "student.token_types": (-1,),
    "student.hidden_dropout": (-0.1, 1.0),
    "student.attention_dropout": (-0.1, 1.0),
    "masking.rate": (0.0, 1.0),
    "masking.mask": (-0.1, 1.1),
    "masking.random": (-0.1, 1.1),
    "masking.smoothing": (-0.1,),
    "masking.mask_token_id": (-1,),
    "loss.kl": (-0.1,),
    "loss.mlm": (-0.1,),
    "loss.cosine": (-0.1,),
    "loss.mse": (-0.1,),
    "loss.temperature": (0.0,),
    "loss.chunk": (-1,),
    "optimizer.learning_rate": (0.0,),
    "optimizer.beta1": (-0.1, 1.0),
    "optimizer.beta2": (-0.1, 1.0),
    "optimizer.eps": (0.0,),
    "optimizer.weight_decay": (-0.1,),
    "optimizer.warmup": (-0.1, 1.1),
    "optimizer.clip": (0.0,),
    "optimizer.steps": (-1, 2**31),
    "train.batch_rows": (0, 2**24 + 1),
    "train.steps": (-1, 2**31),
    "train.epochs": (-1.0, 2.0**31),
    "train.accumulation": (-1,),
    "train.tokens_per_device": (0,),
    "train.log_every": (0,),
    "train.eval_every": (-1,),
    "train.eval_rows": (-1,),
    "train.checkpoint_every": (-1,),
    "train.keep_checkpoints": (0,),
    "train.patience": (-1,),
    "train.skips_allowed": (-1,),
    "train.spike_factor": (-1.0, 0.5),
    "train.spike_steps": (0,),
    "train.hang_seconds": (-1.0,),
    "train.profile_at": (-1,),
    "train.profile_steps": (0,),
    "mesh.data": (0, -2, 2**20 + 1),
    "mesh.fsdp": (0, -2, 2**20 + 1),
    "mesh.tensor": (0, -2, 2**20 + 1),
}
TASK_BOUNDS = {
    "seed": (-1, 2**32),
    "task.dev_share": (0.0, 1.0),
    "task.train_rows": (-1,),
    "task.max_length": (7,),
    "task.stride": (-1,),
    "task.max_answer": (0,),
    "model.hidden_dropout": (-0.1, 1.0),
    "model.attention_dropout": (-0.1, 1.0),
    "model.head_dropout": (-0.1, 1.0),
    "loss.task": (-0.1,),
    "loss.soft": (-0.1,),
    "loss.temperature": (0.0,),
}


def numbers_of(kind, where=""):
    """The names of a config's numbers, and whether each is a float."""
    for name, hint in typing.get_type_hints(kind).items():
        kinds = {hint, *typing.get_args(hint)}
        if dataclasses.is_dataclass(hint):
            yield from numbers_of(hint, f"{where}{name}.")
        elif kinds & {int, float}:
            yield where + name, float in kinds


def test_every_number_of_a_config_has_bounds_and_is_finite(tmp_path):
    """Numbers of the task's config that the training's has too are bounded there."""
    lists = {"student.layers"}
    derived = {"loss.targets_per_row"}  # from the masking
    known = dict(numbers_of(Config))
    assert known.keys() - lists - derived == BOUNDS.keys()
    assert dict(numbers_of(FinetuneConfig)).keys() - BOUNDS.keys() == TASK_BOUNDS.keys() - BOUNDS.keys()
    path = write(tmp_path, '[teacher]\npath = "t"')

    def task(overrides):
        return load_task("sst2", ["model.path=m", *overrides])

    for bounds, floats, read in (
        (BOUNDS, known, lambda overrides: load(path, overrides)),
        (TASK_BOUNDS, dict(numbers_of(FinetuneConfig)), task),
    ):
        for name, values in bounds.items():
            for value in (*values, *(("inf", "-inf", "nan") if floats[name] else ())):
                with pytest.raises(InputError) as error:
                    read([f"{name}={value}"])
                assert name.rpartition(".")[2] in str(error.value).lower().replace("mesh sizes", name), (name, value)


def test_numbers_are_bounded_in_python_too():
    inf, nan = math.inf, math.nan
    for make in (
        partial(LossConfig, kl=inf),
        partial(LossConfig, temperature=nan),
        partial(TaskLossConfig, soft=nan),
        partial(OptimizerConfig, learning_rate=inf),
        partial(OptimizerConfig, weight_decay=nan),
        partial(TrainConfig, steps=1, hang_seconds=inf),
        partial(MaskingConfig, smoothing=-inf),
        partial(ModelConfig, 90, initializer_range=nan),
        partial(ModelConfig, 90, layer_norm_eps=0.0),
        partial(PrepareConfig, ("t",), tokenizer="t", held_out=nan),
        partial(PrepareConfig, ("t",), tokenizer="t", max_unknown=inf),
        partial(PrepareConfig, ("t",), tokenizer="t", train_vocabulary=-5),
        partial(PrepareConfig, ("t",), train_vocabulary=10**12),
        partial(check_seeds, 3, -1),
    ):
        with pytest.raises(InputError):
            make()


def test_a_config_that_is_not_there_names_those_that_are():
    with pytest.raises(InputError, match="distilbert_base_uncased"):
        load("distilbert_base_unkased")


GIANTS = ["train.steps=" + "9" * 5_000, "train.steps=" + "[" * 5_000, "data.path=\udcff"]


@pytest.mark.parametrize("override", ["train.steps", "train.stepz=3", "loss=4", "train.steps=x", *GIANTS])
def test_bad_overrides(tmp_path, override):
    with pytest.raises(InputError):
        load(write(tmp_path, ""), [override])


def test_overrides_win_and_are_typed(tmp_path):
    overrides = ["train.steps=7", "data.path=a/b", "teacher.path=t", "student.layers=[1, 3]"]
    config = load(write(tmp_path, "[train]\nsteps = 5"), overrides)
    assert (config.train.steps, config.data.path, config.student.layers) == (7, "a/b", (1, 3))


def test_how_long_a_run_is_can_be_said_in_the_other_unit(tmp_path):
    for file, override, expected in (
        ("epochs = 3", ["train.steps=7"], (7, 0)),
        ("steps = 5", ["train.epochs=2"], (0, 2)),
        ("steps = 5", ["train.steps=0", "train.epochs=2"], (0, 2)),
        ("epochs = 3", ["train.steps=0"], (0, 3)),
    ):
        train = load(write(tmp_path, f"[train]\n{file}"), override).train
        assert (train.steps, train.epochs) == expected
    assert load_task("squad", ["model.path=x", "train.steps=7"]).train.steps == 7
    for override in (["train.steps=7", "train.epochs=2"], ["train.epochs=inf"], ["train.epochs=nan"]):
        with pytest.raises(InputError, match=r"train\.epochs"):
            load(write(tmp_path, ""), override)


def test_without_a_teacher_it_is_masked_lm_training(tmp_path):
    config = load(write(tmp_path, ""))
    assert (config.loss.kl, config.loss.cosine, config.loss.mlm, config.student.init) == (0, 0, 2, "random")


def test_the_defaults_are_the_published_recipe(tmp_path):
    config = load(write(tmp_path, '[teacher]\npath = "bert"'))
    loss, optimizer, masking = config.loss, config.optimizer, config.masking
    assert (loss.kl, loss.mlm, loss.cosine, loss.temperature) == (5, 2, 1, 2)
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.eps) == (5e-4, 0.9, 0.98, 1e-6)
    assert (optimizer.weight_decay, optimizer.warmup, optimizer.clip) == (0, 0.05, 5)
    assert (masking.rate, masking.mask, masking.random, masking.smoothing) == (0.15, 0.8, 0.1, 0.7)
    assert (config.student.hidden_dropout, config.student.attention_dropout, config.train.epochs) == (0.1, 0.1, 3)


def test_toml_round_trip_keeps_everything(tmp_path):
    config = load(write(tmp_path, '[teacher]\npath = "bert"\n[student]\nlayers = [0, 5]\n[optimizer]\nfreeze = ["a"]'))
    assert load(write(tmp_path, tomli_w.dumps(to_dict(config)))) == config
    assert hash(config) == hash(load(write(tmp_path, tomli_w.dumps(to_dict(config)))))


def test_what_follows_from_masking_is_no_key(tmp_path):
    """Old run folders may hold it, unread as it was."""
    path = write(tmp_path, "[teacher]\npath = 'bert'\n[loss]\nmlm = 1.0\ntargets_per_row = 3")
    with pytest.raises(InputError, match=r"Unknown config key loss\.targets_per_row"):
        load(path)
    assert run_folder.config_from(read_toml(path)).loss == LossConfig(mlm=1.0)


def test_a_run_folder_stands_for_its_configuration(tmp_path):
    """What followed from other choices follows anew, so that each can be changed by one override."""
    text = """[loss]
kl = 1.0
targets_per_row = 3
[teacher]
path = "bert"
[student]
layers = [0, 5]
fold_token_types = true
[optimizer]
steps = 12
[train]
steps = 12
"""
    write(tmp_path, text)
    config = load(tmp_path)
    assert (config.loss.kl, config.train.steps, config.optimizer.steps) == (1.0, 12, 0)  # 0: as long as the run
    assert (config.student.layers, config.student.fold_token_types) == ((0, 5), True)
    other = load(tmp_path, [f"student.init={tmp_path}", "train.epochs=2"])
    assert (other.student.layers, other.student.fold_token_types) == ((), None)
    assert (other.train.steps, other.train.epochs, other.optimizer.steps) == (0, 2, 0)
    write(tmp_path, text.replace("[train]\nsteps = 12", "[train]\nsteps = 9"))
    assert load(tmp_path).optimizer.steps == 12
    write(tmp_path, '[task]\ntrain = "my.csv"')
    with pytest.raises(InputError, match=f"finetune MODEL --task {tmp_path}"):
        load(tmp_path)


def test_differences_name_mathematics_only(tmp_path):
    first = load(write(tmp_path, "[train]\nsteps = 5\nbatch_rows = 8"))
    harmless = ["train.accumulation=2", "mesh.fsdp=2", "train.log_every=1", "compute.remat=full", "data.path=x"]
    assert differences(first, load(write(tmp_path, "[train]\nsteps = 5\nbatch_rows = 8"), harmless)) == []
    changed = load(write(tmp_path, "[train]\nsteps = 6\nbatch_rows = 8"), ["loss.mlm=1.0"])
    assert differences(first, changed) == ["loss.mlm: 2.0 -> 1.0", "train.steps: 5 -> 6"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_begins_with_a_header(path):
    load(path)
    header = path.read_text().split("\n\n")[0].splitlines()
    assert len(header) >= 3 and all(line.startswith("#") for line in header)


@pytest.mark.parametrize(
    ("name", "vocab_size", "body"),
    [
        ("distilbert_base_uncased", 30_522, 66_362_880),
        ("distilbert_base_cased", 28_996, 65_190_912),
        ("distilbert_base_multilingual", 119_547, 134_734_080),
    ],
)
def test_full_size_students_have_the_published_size(name, vocab_size, body):
    config = load(name)
    assert config.train.batch_rows == 1024 and config.train.epochs == 3
    teacher = ModelConfig(vocab_size)  # BERT-base
    student = student_model(config.student, teacher, vocab_size)
    assert count_parameters(dataclasses.replace(student, mlm_head=False)) == body
    assert count_parameters(student) == body + (768 * 768 + 768) + 2 * 768 + vocab_size
    assert choose_layers(teacher.num_layers, student.num_layers) == (0, 2, 4, 7, 9, 11)


@pytest.mark.parametrize(
    "name", ["small", "distilbert_base_uncased", "distilbert_base_cased", "distilbert_base_multilingual"]
)
def test_a_preset_serves_any_teacher(name):
    for layers, half in ((1, 1), (4, 2), (5, 2), (6, 3), (12, 6), (24, 12)):
        teacher = ModelConfig(90, num_layers=layers, hidden_size=32, num_heads=4)
        student = student_model(load(name).student, teacher, 90)
        assert (student.num_layers, student.hidden_size) == (half, 32)


def test_model_config_refuses_what_cannot_be():
    with pytest.raises(InputError, match="does not divide into 5 heads"):
        ModelConfig(vocab_size=10, hidden_size=32, num_heads=5)
    with pytest.raises(InputError, match="vocab_size must be at least 1"):
        ModelConfig(vocab_size=0)
    with pytest.raises(InputError, match="lacks vocab_size"):
        build(ModelConfig, {"num_layers": 2})


def test_print_config_needs_no_data_and_no_device(tmp_path):
    path = write(tmp_path, "[train]\nsteps = 5")
    command = [sys.executable, "-m", "distil_jax", "train", str(path), "--print-config", "--set", "seed=9"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert build(Config, tomllib.loads(done.stdout)).seed == 9


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("without_kl", {"loss.kl": "0.0"}),
        ("without_cosine", {"loss.cosine": "0.0"}),
        ("without_mlm", {"loss.mlm": "0.0"}),
        ("random_init", {"student.init": "random"}),
        ("undistilled", {"loss.kl": "0.0", "loss.cosine": "0.0"}),
        ("undistilled_equal_compute", {"loss.kl": "0.0", "loss.cosine": "0.0", "train.steps": "1550"}),
        ("kl_at_targets", {"loss.soft_positions": "targets"}),
        ("kl_at_targets_equal_compute", {"loss.soft_positions": "targets", "train.steps": "974"}),
    ],
)
def test_an_ablation_changes_what_its_name_says(name, changes):
    all_losses, changed = (load(ABLATION / f"{each}.toml", ["teacher.path=t"]) for each in ("all_losses", name))
    result = dict(line.split(": ") for line in differences(all_losses, changed))
    assert {key: values.split(" -> ")[1] for key, values in result.items()} == changes


@pytest.mark.parametrize("name", ["undistilled", "kl_at_targets"])
def test_equal_compute_is_equal(name):
    """In FLOPs of matrix products, for the embedded teacher, half of its layers and rows of 128."""
    teacher = huggingface.read_config(EMBEDDED_TEACHER)
    student = replace(teacher, num_layers=2, token_types=0)

    def flops(name):
        config = load(ABLATION / f"{name}.toml", ["teacher.path=t"])
        step = StepConfig(student, teacher, config.loss, targets_per_row=most_targets(128, 0.15))
        return config.train.steps * step_flops(step, 128)

    assert flops(f"{name}_equal_compute") == pytest.approx(flops("all_losses"), rel=0.01)
    assert flops(name) < 0.6 * flops("all_losses")
