"""What a configuration becomes on a mesh, before anything is compiled."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tomli_w
from jax.experimental import pallas as pl

from distil_jax.config.load import load
from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import LossConfig
from distil_jax.config.run import STUDENT_SHAPE, ComputeConfig, MeshConfig, TeacherConfig, TrainConfig
from distil_jax.config.step import StepConfig
from distil_jax.io import huggingface
from distil_jax.models import tpu_attention
from distil_jax.runtime import attention
from distil_jax.runtime.assemble import (
    assemble,
    check_batch,
    micro_batches,
    resolve_compute,
    teacher_compute,
    teacher_shapes,
)
from distil_jax.runtime.attention import resolve_attention
from distil_jax.runtime.program import describe_micro_batches
from distil_jax.runtime.run_folder import open_model
from distil_jax.schema import InputError, to_dict
from distil_jax.training.sharding import check_mesh, make_mesh, shardings_of


@pytest.mark.parametrize(
    ("mesh", "settings", "expected"),
    [
        ((8, 1, 1), {"batch_rows": 1024}, 8),  # 128 rows of 512 a device, 16 at a time
        ((4, 2, 1), {"batch_rows": 1024}, 8),  # fsdp cuts the batch too
        ((2, 1, 4), {"batch_rows": 1024}, 32),  # tensor does not
        ((8, 1, 1), {"batch_rows": 1024, "tokens_per_device": 100}, 128),  # never less than a row
        ((8, 1, 1), {"batch_rows": 24}, 1),
        ((8, 1, 1), {"batch_rows": 8 * 34, "tokens_per_device": 512 * 16}, 17),  # pieces are equal: 2 rows, not 16
        ((8, 1, 1), {"batch_rows": 1024, "accumulation": 2}, 2),
    ],
)
def test_micro_batches_keep_to_the_tokens_of_a_device(mesh, settings, expected):
    assert micro_batches(TrainConfig(steps=1, **settings), make_mesh(MeshConfig(*mesh)), 512) == expected


@pytest.mark.parametrize("settings", [{"batch_rows": 20}, {"batch_rows": 16, "accumulation": 3}])
def test_batches_that_do_not_divide_are_refused(settings):
    with pytest.raises(InputError, match=f"batch_rows {settings['batch_rows']} does not divide"):
        micro_batches(TrainConfig(steps=1, **settings), make_mesh(MeshConfig()), 512)


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ((1, 1, 8), {}, "num_heads 4 does not divide by mesh.tensor = 8"),
        ((1, 8, 1), {"hidden_size": 36}, "hidden_size 36 does not divide by mesh.fsdp = 8"),
        ((1, 1, 4), {"intermediate_size": 50}, "intermediate_size 50 does not divide by mesh.tensor = 4"),
        ((1, 3, 1), {"hidden_size": 36}, "128 does not divide by mesh.fsdp x mesh.tensor = 3"),
    ],
)
def test_a_mesh_that_cuts_a_model_unevenly_is_refused(sizes, change, message):
    model = replace(ModelConfig(90, hidden_size=32, num_heads=4, intermediate_size=48), **change)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    with pytest.raises(InputError, match=message):
        check_mesh(mesh, StepConfig(model, loss=LossConfig(kl=0, cosine=0)))


def test_a_teacher_lies_as_the_student_does_or_whole():
    model = ModelConfig(90, hidden_size=32, num_heads=4, intermediate_size=48, dtype="bfloat16")
    mesh = make_mesh(MeshConfig(1, 4, 2))
    for sharded in (True, False):
        shapes = teacher_shapes(TeacherConfig(sharded=sharded), model)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(shapes))
        shardings = jax.tree.leaves(shardings_of(shapes, mesh))
        assert all(each.is_fully_replicated for each in shardings) != sharded


def test_a_teacher_may_compute_more_finely_than_the_student():
    compute = ComputeConfig(dtype="bfloat16", unroll="no", remat="full")
    assert teacher_compute(TeacherConfig(), compute).dtype == "bfloat16"
    assert teacher_compute(TeacherConfig(dtype="float32"), compute).dtype == "float32"
    assert teacher_compute(TeacherConfig(), compute).remat == "none", "nothing is computed again without a gradient"


def test_what_auto_means_depends_on_the_machine():
    result = {name: resolve_compute(ComputeConfig(), name) for name in ("cpu", "gpu", "tpu")}
    assert [each.dtype for each in result.values()] == ["float32", "bfloat16", "bfloat16"]
    assert [each.remat for each in result.values()] == ["none", "none", "dots"]
    assert [each.unroll for each in result.values()] == ["yes", "no", "no"]
    assert resolve_compute(ComputeConfig(remat="full"), "tpu").remat == "full"


def test_what_is_computed_again_saves_memory():
    """On a CPU in a loop over the layers alone: that is what auto takes, and the other is refused."""
    result = resolve_compute(ComputeConfig(remat="full"), "cpu")
    assert (result.remat, result.unroll) == ("full", "no")
    with pytest.raises(InputError, match='"full" saves no memory on a CPU'):
        resolve_compute(ComputeConfig(remat="full", unroll="yes"), "cpu")
    assert resolve_compute(ComputeConfig(remat="full", unroll="yes"), "tpu").unroll == "yes"


BASE = ModelConfig(90, hidden_size=256, num_heads=4, intermediate_size=48)
STEP = StepConfig(replace(BASE, num_layers=1), teacher=BASE)


def mesh_of(platform, tensor=1, capability=None):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    return SimpleNamespace(devices=np.array([device]), shape={"tensor": tensor})


@pytest.mark.parametrize(
    ("wanted", "mesh", "length", "took", "message"),
    [
        ("auto", mesh_of("tpu"), 128, "pallas_tpu", "attention: pallas_tpu for the student and the teacher"),
        ("pallas", mesh_of("tpu", 2), 128, "pallas_tpu", "pallas_tpu for the student"),
        ("xla", mesh_of("tpu"), 128, "xla", "xla (as asked) for the student"),
        ("auto", mesh_of("tpu"), 100, "xla", "rows of 100, and it takes multiples of 128"),
        ("auto", mesh_of("tpu", 4), 128, "xla", "1 heads of 64, which do not fill 128 lanes"),
        ("auto", mesh_of("gpu", capability="9.0"), 64, "pallas_gpu", "pallas_gpu for the student and the teacher"),
        ("auto", mesh_of("gpu", capability="9.0"), 100, "xla", "rows of 100, and it takes multiples of 64"),
        ("auto", mesh_of("gpu", capability="7.5"), 128, "xla", "compute capability 8.0 or above"),
        ("auto", mesh_of("gpu", capability="gfx942"), 128, "xla", "compute capability 8.0 or above"),
        ("auto", mesh_of("cpu"), 128, "xla", "there is no kernel for a cpu"),
    ],
)
def test_attention_is_the_fastest_that_is_lawful_and_says_so(wanted, mesh, length, took, message):
    step, sentence = resolve_attention(STEP, wanted, mesh, length)
    assert step.student.attention == step.teacher.attention == took
    assert message in sentence


def test_a_kernel_that_cannot_be_is_refused_where_it_was_asked_for():
    with pytest.raises(InputError, match="cannot be for the student: there is no kernel for a cpu"):
        resolve_attention(STEP, "pallas", mesh_of("cpu"), 128)


def test_a_kernel_is_tried_before_it_is_trusted(monkeypatch):
    tried = partial(attention._try_kernel, "pallas_tpu", (4, 64), 128, "float32")
    name, why = tried()
    assert name == "xla" and why.startswith("the kernel does not compile here: ValueError: Only interpret mode")
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    assert tried() == ("pallas_tpu", "")
    monkeypatch.setattr(tpu_attention, "NEVER", 0.0)  # a kernel that looks across segments
    jax.clear_caches()
    name, why = tried()
    assert name == "xla" and "off by" in why


class NotToBeHad(Exception):
    """As Mosaic's and Triton's are: of no class that one could name."""


@pytest.mark.parametrize("error", [NotToBeHad("no\n such  layout"), TypeError("no layout"), KeyError("layout")])
def test_a_kernel_that_fails_in_any_way_means_xla_where_nobody_asked_for_it(monkeypatch, error):
    tried = []

    def one_row(heads, length, implementation, dtype):
        if implementation == "xla":
            return (np.ones(3),)
        tried.append((heads, length))
        raise error

    here = SimpleNamespace(devices=np.array([SimpleNamespace(platform="cpu")]), shape={"tensor": 2})
    monkeypatch.setattr(attention, "choose_attention", lambda *_, **__: ("pallas_tpu", ""))
    monkeypatch.setattr(attention, "_one_row", one_row)
    step, message = resolve_attention(STEP, "auto", here, 128)
    assert step.student.attention == step.teacher.attention == "xla"
    assert f"xla (the kernel does not compile here: {type(error).__name__}: " in message and "layout" in message
    assert "\n" not in message
    assert tried == [((2, 64), 128)], "once for both models, with the heads that one device has"
    with pytest.raises(InputError, match=f"cannot be for the student.*{type(error).__name__}"):
        resolve_attention(STEP, "pallas", here, 128)


# What a config asks for is done or refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("student.init={teacher}", "student.hidden_size=64"),
            r"num_layers = 2 \(4\), .*hidden_size = 64 \(32\)",
        ),
        (("student.init={teacher}", "student.num_layers=4", "student.num_heads=2"), r"num_heads = 2 \(4\)\. Set"),
        (("student.init={teacher}", "student.num_layers=4", "student.intermediate_size=8"), r"intermediate_size = 8"),
        (("student.init={teacher}", "student.num_layers=4", "student.max_positions=24"), r"max_positions = 24 \(32\)"),
        (("student.init={teacher}", "student.num_layers=4", "student.token_types=0"), r"token_types = 0 \(2\)"),
        (("student.init={teacher}", "student.num_layers=4", "student.positions=sinusoidal"), r"\('learned'\)"),
        (("student.init={teacher}", "student.num_layers=4", "student.layers=[0,1,2,3]"), "copies none"),
        (("student.init={teacher}", "student.num_layers=4", "student.fold_token_types=true"), "leave it out"),
        (("student.init=random", "student.layers=[1,3]"), "copies none"),
        (("student.init=random", "student.fold_token_types=true"), "leave it out"),
        (("student.positions=sinusoidal", "student.fold_token_types=true"), "leave it out"),
        (("student.token_types=2", "student.fold_token_types=true"), "leave it out"),
        (("masking.mask_token_id=7",), "masking.mask_token_id is 7, but the .MASK. of the rows' tokenizer is 4"),
        (("train.steps=30",), "optimizer.steps = 20, and the run has 30 steps"),
        (("train.batch_rows=1000", "train.accumulation=1"), r"only \d+ rows .* set train.batch_rows = \d+ or less"),
        (("teacher.path=", "student.init=random", "teacher.dtype=bfloat16"), "set teacher.path, or leave it out"),
    ],
)
def test_what_would_be_ignored_is_refused(workshop, settings, message):
    settings = [each.format(teacher=workshop / "teacher") for each in settings]
    with pytest.raises(InputError, match=message):
        assemble(load(workshop / "run.toml", settings))


def test_a_narrower_student_needs_one_answer(workshop):
    """All that the refusal names, set at once, is enough."""
    narrow = ["student.hidden_size=16"]
    with pytest.raises(InputError) as error:
        assemble(load(workshop / "run.toml", narrow))
    named = re.findall(r"(\w+\.\w+) = (\S+?)(?=[ .]|$)", str(error.value))
    assert named == [("student.init", '"random"'), ("loss.cosine", "0")]
    parts = assemble(load(workshop / "run.toml", [*narrow, *map("=".join, named)]))
    assert parts.step.student.hidden_size == 16 and parts.student_params is None


def test_a_teacher_without_a_head_needs_one_answer(workshop, tmp_path):
    config, params = huggingface.load(workshop / "teacher")
    body = {name: tree for name, tree in params.items() if name != "mlm"}
    huggingface.save(tmp_path / "bare", replace(config, mlm_head=False), body, tokenizer=workshop / "teacher")
    bare = [f"teacher.path={tmp_path / 'bare'}"]
    with pytest.raises(InputError) as error:
        assemble(load(workshop / "run.toml", bare))
    named = re.findall(r"(\w+\.\w+) = (\S+?)(?=[ .,]|$)", str(error.value).partition(", or set ")[2])
    assert [key for key, _ in named] == ["student.init", "loss.kl", "loss.mse"]
    parts = assemble(load(workshop / "run.toml", [*bare, *map("=".join, named)]))
    assert not parts.step.teacher.mlm_head and parts.step.student.mlm_head


def test_the_batch_that_is_named_can_be(workshop):
    for mesh in ({"data": 8}, {"data": 1}):
        devices = make_mesh(MeshConfig(**mesh), jax.devices()[: mesh["data"]])
        for accumulation in (0, 2):
            train = TrainConfig(steps=1, batch_rows=48, accumulation=accumulation)
            with pytest.raises(InputError, match=r"train.batch_rows = \d+ or less") as error:
                check_batch(train, 41, devices)
            named = replace(train, batch_rows=int(re.search(r"= (\d+)", str(error.value))[1]))
            check_batch(named, 41, devices)
            assert named.batch_rows >= 32 and micro_batches(named, devices, 16)
    with pytest.raises(InputError, match="train on 8 rows or more"):
        check_batch(TrainConfig(steps=1, batch_rows=8), 7, make_mesh(MeshConfig()))


def test_a_resolved_config_tells_what_the_student_is(workshop, tmp_path):
    teacher = open_model(workshop / "teacher").config
    from_folder = (f"student.init={workshop / 'teacher'}", "student.num_layers=4", "student.hidden_size=32")
    random = ("student.init=random", "student.hidden_size=64", "student.positions=sinusoidal", "loss.cosine=0")
    sinusoidal = ("student.positions=sinusoidal",)
    for settings, folded in (((), True), (sinusoidal, False), (random, False), (from_folder, False)):
        parts = assemble(load(workshop / "run.toml", settings))
        student, model = parts.config.student, parts.step.student
        assert [getattr(student, name) for name in STUDENT_SHAPE] == [getattr(model, name) for name in STUDENT_SHAPE]
        assert student.fold_token_types is folded
        assert student.resolved(model, teacher) == student
        # And as a config it makes the same student.
        (tmp_path / "config.toml").write_text(tomli_w.dumps(to_dict(parts.config)))
        again = assemble(load(tmp_path / "config.toml"))
        assert (again.config, again.step) == (parts.config, parts.step)


def test_it_is_said_where_a_device_has_more_at_a_time_than_asked_for():
    mesh, model = make_mesh(MeshConfig()), replace(BASE, num_layers=1)
    for settings, message in (
        ({"batch_rows": 64}, ""),
        ({"batch_rows": 64, "accumulation": 2, "tokens_per_device": 300}, "512 tokens .* train.accumulation is 2"),
        ({"batch_rows": 64, "tokens_per_device": 100}, "128 tokens of a device .* a row is the least"),
    ):
        train = TrainConfig(steps=1, **settings)
        step = StepConfig(model, loss=LossConfig(kl=0, cosine=0), accumulation=micro_batches(train, mesh, 128))
        result = describe_micro_batches(train, step, mesh, 128)
        assert re.search(message, result) if message else not result
