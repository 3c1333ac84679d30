"""Plans: what is counted in compiled text, against arithmetic; a real TPU compiler, where its package is installed."""

import importlib.util
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax import cli
from distil_jax.config.load import load
from distil_jax.config.model import ModelConfig
from distil_jax.config.run import EMBEDDED_TEACHER
from distil_jax.config.step import StepConfig
from distil_jax.machines.aot import Compiled, memory_needed
from distil_jax.machines.chips import CHIPS
from distil_jax.machines.flops import step_flops
from distil_jax.machines.hlo import Program
from distil_jax.machines.roofline import roofline
from distil_jax.machines.workload import read_workload
from distil_jax.schema import InputError
from distil_jax.workflows import plan

GIB = 2**30


def costs_of(function, *arguments):
    return Program(jax.jit(function).lower(*arguments).compile().as_text()).costs


def test_products_in_loops_count_as_often_as_they_run():
    x, w = jnp.ones((6, 4)), jnp.ones((3, 5, 4, 4))

    def once(x, w):
        return jnp.tanh(x @ w), None

    def twice(x, w):
        return jax.lax.scan(once, x, w)[0], None

    nested = costs_of(lambda x, w: jax.lax.scan(twice, x, w)[0], x, w)
    assert nested.flops == 15 * 2 * 6 * 4 * 4
    assert costs_of(lambda x: x @ x.T, x).flops == 2 * 6 * 6 * 4


def test_of_a_choice_one_branch_counts():
    x = jnp.ones((64, 64))
    product = 2 * 64**3
    two = costs_of(lambda choose, x: jax.lax.cond(choose, lambda: x @ x, lambda: x), True, x)
    three = costs_of(lambda number, x: jax.lax.switch(number, [lambda: x, lambda: x @ x @ x, lambda: x @ x]), 1, x)
    assert (two.flops, three.flops) == (product, 2 * product)


def test_a_batch_axis_that_a_tpu_writes_as_a_dilated_window():
    """Attention scores [8, 12, 512, 512] over 64, as libtpu 0.0.42 writes them."""
    text = """
ENTRY %main (q: bf16[8,512,12,64], k: bf16[8,512,12,64]) -> bf16[8,12,512,512] {
  %q = bf16[8,512,12,64]{1,3,2,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[8,512,12,64]{1,3,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[8,12,512,512]{2,3,1,0:T(8,128)} convolution(%q, %k), WINDOW, dim_labels=0b1f_0o1i->01bf
}
""".replace("WINDOW", "window={size=8x12 stride=7x11 lhs_dilate=8x12}")
    assert Program(text).costs.flops == 2 * 8 * 12 * 512 * 512 * 64


def test_traffic_is_what_is_read_and_written():
    text = """
%fused (p0: f32[10,64], p1: s32[]) -> f32[1,64] {
  %p0 = f32[10,64]{1,0} parameter(0)
  %p1 = s32[]{} parameter(1)
  %zero = s32[]{} constant(0)
  ROOT %slice = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
}

ENTRY %main (a: f32[10,64], i: s32[]) -> f32[1,64] {
  %a = f32[10,64]{1,0} parameter(0)
  %i = s32[]{:S(1)} parameter(1)
  %one = f32[1,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%fused
  %near = f32[1,64]{1,0:T(8,128)S(1)} negate(%one)
  ROOT %sum = f32[1,64]{1,0} add(%one, %near)
}
"""
    row = 64 * 4
    # The fusion reads and writes one row; negate reads one and keeps its result on the chip; add reads one, writes one.
    assert Program(text).costs.hbm_bytes == 2 * row + row + 2 * row


def test_the_formula_is_the_arithmetic_of_the_published_recipe():
    """MFLOP a token without attention: teacher 170 + 47, student 255 + 141 (issue: 613)."""
    teacher = ModelConfig(vocab_size=30_522)
    step = StepConfig(replace(teacher, num_layers=6, token_types=0), teacher, targets_per_row=77)
    attention = 4 * 512 * 768 * (12 + 3 * 6)
    heads = 4 * 2 * 768**2 + 4 * 2 * 768 * (30_592 - 30_522)
    assert round((step_flops(step, 512) - attention - heads) / 1e6) == 170 + 47 + 255 + 141 - 1  # rounded four times


def test_the_roof_is_the_slowest_limit():
    base = Compiled(
        "TPU v5 lite", 32, 8, 32, 1, "", 1.0, 4e8, 4e8, 8e8, 1e8, 9e9, True, 1e12, 1e9, {"all-reduce": 1e8}, {}
    )
    assert roofline(base, 1).bottleneck == "compute" and roofline(base, 1).network == 0
    assert roofline(replace(base, hbm_bytes=1e12), 1).bottleneck == "HBM"
    assert (
        roofline(replace(base, collective_bytes={"all-reduce": 4e9}), 1).seconds == 2 * 4e9 / CHIPS["TPU v5 lite"].links
    )
    # 16 chips a slice reduce first; then 4 chips of a host exchange 2 x 25 MB each, half of it across.
    np.testing.assert_allclose(roofline(base, 2).network, 4 * 2 * 25e6 * 0.5 / 12.5e9)
    assert roofline(replace(base, parameters=4e8 / 16), 2).network == roofline(base, 2).network, "fsdp changes nothing"


@pytest.fixture
def compiled_as(monkeypatch):
    """Replaces the compiler by a rule: (job) -> peak GiB per chip."""

    def use(peak):
        def compile_for(job):
            accumulation = job.config.train.accumulation or 2
            fixed = ("TPU v5 lite", 4, 1, 4, accumulation, "", 1.0, GIB / 4, GIB / 4, GIB / 2, GIB / 8)
            gib = peak(job)
            return Compiled(*fixed, gib * GIB, gib <= 16, 1e12, 1e9, {"all-reduce": GIB / 4}, {"all-reduce": 3.0})

        monkeypatch.setattr(plan, "compile_for", compile_for)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    return use


SMALL = ["plan", "demo_student", "--set", f"teacher.path={EMBEDDED_TEACHER}", "--set", "train.batch_rows=64"]
SMALL += ["--set", "compute.remat=none"]


def test_a_sweep_is_a_table_and_a_picture(compiled_as, capsys, tmp_path):
    compiled_as(lambda job: 20.0 if job.topology == "v5e:2x2" else 5.0)
    command = [*SMALL, "--sweep", "v5e:2x2,2*v5e:2x4", "--sequence-length", "128", "--output", str(tmp_path)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\| v5e:2x2 .*20.0 of 16 \|\s+NO \|", shown) and re.search(r"\| 2\*v5e:2x4 .*\|\s+yes \|", shown)
    assert "There is no prepared data" in shown and "This is a lower bound, not a prediction" in shown
    assert (tmp_path / "plan.md").read_text().count("| v5e:2x2") == 1
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("peak", "advice"),
    [
        (lambda job: 80 / job.config.train.accumulation, "It fits with --set train.accumulation=8."),
        (lambda job: 8 if job.step.student.remat == "dots" else 17, "accumulation=16 --set compute.remat=dots."),
        (
            lambda job: 8 if job.config.mesh.fsdp == 4 else 17,
            "--set mesh.data=-1 --set mesh.fsdp=4 --set mesh.tensor=1.",
        ),
        (lambda job: 17, "use more or larger chips."),
    ],
    ids=["smaller micro-batches", "remat", "fsdp", "nothing"],
)
def test_what_does_not_fit_is_refused_with_the_smallest_change(compiled_as, capsys, peak, advice):
    compiled_as(lambda job: 16.5 if job.config.train.accumulation == 0 else peak(job))
    assert cli.main([*SMALL, "--topology", "v5e:2x2", "--sequence-length", "128"]) == 2
    printed = capsys.readouterr()
    assert "NO: 16.5 GiB per chip, which has 16" in printed.out
    assert printed.err.endswith(advice + "\n") and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (76.12G) "
            "exceeds available HBM (15.75G).",
            76.12,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.0M of 256.00M hbm.",
            0.5,
        ),
        ("INTERNAL: Used 1.0G of nothing", None),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None),
    ],
)
def test_what_libtpu_says_of_too_little_memory_is_understood(message, gib):
    assert memory_needed(message) == (gib and gib * GIB)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5e"], "'v5e' is not a topology"),
        (["--sweep", "v5e:2x2,0*v5e:2x4"], "'0*v5e:2x4' is not a topology"),
        (["--sequence-length", "4096"], "longer than the 128 positions"),
        (["--set", "teacher.path=nowhere/to/be/found"], "nowhere/to/be/found"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(compiled_as, capsys, flags, message):
    compiled_as(lambda job: pytest.fail("compiled"))
    assert cli.main([*SMALL, *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_libtpu_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(SMALL) == 2
    assert "pip install 'distil-jax[tpu]'" in capsys.readouterr().err


def test_rows_have_a_length(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for length in ("0", "-5"):
        assert cli.main([*SMALL, "--sequence-length", length]) == 2
        assert f"--sequence-length must be at least 1, not {length}." in capsys.readouterr().err


def test_the_presets_need_neither_data_nor_teacher_at_hand():
    workload = read_workload(load("distilbert_base_multilingual"), tokens=4e9)
    assert workload.step.teacher.vocab_size == 119_547 and workload.step.student.dtype == "bfloat16"
    assert workload.steps == 22_888 and len(workload.assumptions) == 2
    with pytest.raises(InputError, match="size of the vocabulary is unknown"):
        read_workload(load("demo_teacher"))


def test_a_run_is_planned_by_its_folder_and_gives_a_student(finished_run, workshop):
    whole = read_workload(load(finished_run, ["compute.dtype=auto", "teacher.dtype=auto"]))  # it ran on a CPU
    begun = read_workload(load(workshop / "run.toml", [f"student.init={finished_run}"]))
    assert whole.step.student == begun.step.student and whole.step.student.num_layers == 2
    assert whole.steps == begun.steps == 12


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_real_step_compiles_for_a_tpu(capsys):
    """By libtpu, for four v5e chips: FLOPs as by formula, gradients exchanged once, nothing else but a few numbers."""
    assert cli.main([*SMALL, "--topology", "v5e:2x2", "--sequence-length", "128"]) == 0
    shown = dict(re.findall(r"^\| ([^|]*?) +\| +([^|]*?) \|$", capsys.readouterr().out, re.MULTILINE))
    assert shown["chips, hosts"] == "4 x TPU v5 lite, 1" and shown["fits"].startswith("yes")
    assert abs(float(re.search(r"([\d.]+) of the formula", shown["FLOPs per step and chip"])[1]) - 1) < 0.02
    kind, megabytes = re.fullmatch(r"\d+ ([a-z-]+), ([\d.]+) MB", shown["collectives per step and chip"]).groups()
    parameters = 1_222_528  # the demonstration's student; its vocabulary needs no padding
    assert kind == "all-reduce" and 4 * parameters / 1e6 - 0.1 <= float(megabytes) <= 1.05 * 4 * parameters / 1e6


def test_a_topology_that_libtpu_does_not_know(capsys):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    assert cli.main([*SMALL, "--topology", "v5e:3x7"]) == 2
    assert "libtpu knows no topology 'v5e:3x7'" in capsys.readouterr().err
