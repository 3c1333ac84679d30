"""Objectives, optimisers, teachers and loops of a user's own, as the README of the package shows them."""

import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_params, run_numbers, same_leaves

import distil_jax as dj
from distil_jax import cli
from distil_jax.config.load import load, load_task
from distil_jax.objective.masking import most_targets
from distil_jax.runtime.assemble import assemble
from distil_jax.runtime.loop import run_program
from distil_jax.runtime.run_folder import open_model
from distil_jax.workflows.finetune import finetune
from distil_jax.workflows.train import compile_run, train

README = (Path(__file__).parents[1] / "distil_jax" / "README.md").read_text()
KERNELS = ("query", "key", "value", "attention_output", "intermediate", "output")
KEY = jax.random.key(7)
STEPS = 10


@pytest.fixture(scope="module")
def examples():
    """The names that the README's blocks define, one after the other."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        assert len(block.splitlines()) < 30
        exec(compile(block, "distil_jax/README.md", "exec"), names)
    return names


@dataclass(frozen=True)
class Sgd:
    """Smooth: rounding in a gradient is rounding in the parameters."""

    learning_rate: float = 1e-2

    def make(self):
        return optax.sgd(self.learning_rate, momentum=0.9)


def step_with_gradients(state, teacher_params, batch):
    grads, metrics = dj.gradients(state, teacher_params, batch)
    state, metrics = dj.apply_gradients(state, grads, metrics)
    return state, (metrics, grads)


def trajectory(config, teacher_params, batch, sizes=None):
    """Losses, gradients and last parameters of ten steps, on one device or on a mesh of these sizes."""
    state = dj.init_state(KEY, config)
    if sizes is None:
        step = jax.jit(step_with_gradients)
    else:
        mesh, shapes = dj.make_mesh(dj.MeshConfig(*sizes)), dj.abstract_state(config)
        model = config.teacher_model
        teacher_shapes = dj.abstract_params(model) if model else jax.eval_shape(lambda: teacher_params)
        step = dj.jit_step(step_with_gradients, mesh, shapes, teacher_shapes)
        state = jax.device_put(state, dj.shardings_of(shapes, mesh))
        teacher_params = jax.device_put(teacher_params, dj.shardings_of(teacher_shapes, mesh))
        batch = dj.put_rows(batch, mesh)
    losses, gradients = [], []
    for _ in range(STEPS):
        state, (metrics, grads) = step(state, teacher_params, batch)
        assert float(metrics["skipped"].value()) == 0
        losses.append(float(metrics["loss"].value()))
        gradients.append(jax.device_get(grads))
    return np.array(losses), gradients, jax.device_get(state.params)


def variant(name, examples):
    """(config, teacher_params, batch) of one of the README's examples."""
    config, soft, batch = examples["config"], examples["soft"], examples["batch"]
    if name == "objective":
        config = replace(config, objective=examples["WithHidden"](), optimizer=Sgd())
        return config, examples["teacher_params"], batch
    if name in ("Lion", "Muon"):
        return replace(config, optimizer=examples[name]()), examples["teacher_params"], batch
    if name == "teacher":
        return replace(soft, teacher=examples["WordsTeacher"](), optimizer=Sgd()), examples["words_params"], batch
    batch = batch.replace(teacher_logits=examples["stored"])
    return replace(soft, teacher=dj.LogitsFromBatch(), optimizer=Sgd()), None, batch


@pytest.mark.parametrize("name", ["objective", "Lion", "Muon", "teacher", "logits"])
def test_an_example_is_the_same_on_one_device_and_on_eight_accumulated_and_not(name, examples):
    config, teacher_params, batch = variant(name, examples)
    losses, gradients, params = trajectory(config, teacher_params, batch)
    assert losses[-1] < losses[0]
    # Lion and Muon's Adam move by the sign of a gradient, or nearly so, and rounding turns the sign of the smallest.
    least = 1e-5 if name in ("Lion", "Muon") else -1
    moved = jax.tree.map(lambda *leaves: np.min(np.abs(leaves), axis=0) > least, *gradients)
    assert np.mean(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved)])) > 0.6
    for sizes, accumulation in ((None, 2), ((4, 2, 1), 1), ((4, 2, 1), 2)):
        changed = replace(config, accumulation=accumulation)
        other_losses, other_gradients, other_params = trajectory(changed, teacher_params, batch, sizes)
        np.testing.assert_allclose(other_losses, losses, rtol=1e-6)
        close(other_gradients[0], gradients[0])
        close(jax.tree.map(np.where, moved, other_params, params), params)


def close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)


def test_the_published_objective_given_as_ones_own_compiles_to_the_same_program(step_config, teacher_params, rows):
    batch = dj.Batch(rows.input_ids, rows.segment_ids, rows.position_ids, rows.input_ids, row_index=rows.row_index)
    most = most_targets(rows.input_ids.shape[1], 0.15)
    config = replace(step_config, targets_per_row=most)
    costs = []
    for own in (config, replace(config, objective=dj.Distillation(config.loss, most))):
        state = jax.eval_shape(lambda own=own: dj.init_state(KEY, own))
        program = jax.jit(dj.train_step).lower(state, teacher_params, batch).compile()
        costs.append((program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes))
    assert costs[0] == costs[1] and min(costs[0]) > 0


# Optimisers


def test_muon_orthogonalises_every_kernel_of_every_layer(teacher_config):
    params = random_params(teacher_config, seed=5)
    numbers = dj.muon_dimension_numbers
    optimizer = optax.contrib.muon(1.0, adam_learning_rate=0.0, muon_weight_dimension_numbers=numbers)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    inputs = {"attention_output": 2}
    for name in KERNELS:
        update = np.asarray(updates["layers"][name]["kernel"])
        rows = np.prod(update.shape[1 : 1 + inputs.get(name, 1)])
        for matrix in update.reshape(len(update), rows, -1):
            values = np.linalg.svd(matrix, compute_uv=False) / max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5
            assert values.min() > 0.4 and values.max() < 1.3, name
    others = {name: part for name, part in updates.items() if name != "layers"}
    others |= {name: part["bias"] for name, part in updates["layers"].items()}
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(others)), "Adam's, whose rate is 0"


def test_muon_counts_axes_without_a_stack_too(teacher_config):
    params = dj.layers_apart(random_params(teacher_config, seed=5))
    numbers = dj.muon_dimension_numbers(params)
    assert numbers["layers_0"]["attention_output"]["kernel"] == ((0, 1), (2,))
    assert numbers["layers_0"]["query"]["kernel"] == ((0,), (1, 2))
    assert numbers["layers_0"]["query"]["bias"] is None and numbers["mlm"]["transform"]["kernel"] is None


def test_moments_lie_as_their_parameters_and_other_arrays_on_every_device(step_config):
    mesh = dj.make_mesh(dj.MeshConfig(4, 2, 1))
    chain = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=8), optax.trace(0.9))
    shapes = dj.abstract_state(replace(step_config, optimizer=chain))
    layout = dj.shardings_of(shapes, mesh)
    factored, trace = layout.opt_state
    assert trace.trace == layout.params
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves((factored.count, factored.v_row)))


# Teachers


@pytest.fixture(scope="module")
def stored_logits(teacher_config, teacher_params, rows):
    """Logits of a teacher for the real vocabulary, and the batch that they are of."""
    labels = jnp.where(jnp.arange(rows.input_ids.shape[1]) % 5 == 1, rows.input_ids, dj.IGNORED)
    labels = jnp.where(rows.segment_ids > 0, labels, dj.IGNORED)
    batch = dj.Batch(rows.input_ids, rows.segment_ids, rows.position_ids, labels)
    encoded = jax.jit(lambda p: dj.MaskedLm(teacher_config).apply({"params": p}, batch))(teacher_params)
    return np.asarray(dj.logits(encoded.features, encoded.head)[..., : teacher_config.vocab_size]), batch


@pytest.mark.parametrize("chunk", [0, 32])
@pytest.mark.parametrize("positions", ["all", "targets"])
def test_logits_that_come_with_the_batch_are_as_good_as_the_teacher(
    step_config, student_params, teacher_params, stored_logits, chunk, positions
):
    loss = replace(step_config.loss, cosine=0.0, chunk=chunk, soft_positions=positions)
    config, (stored, batch) = replace(step_config, loss=loss, targets_per_row=12), stored_logits
    expected = jax.jit(dj.gradients)(dj.init_state(KEY, config, params=student_params), teacher_params, batch)
    config, batch = replace(config, teacher=dj.LogitsFromBatch()), batch.replace(teacher_logits=stored)
    actual = jax.jit(dj.gradients)(dj.init_state(KEY, config, params=student_params), None, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_a_teacher_may_pad_its_vocabulary_too(step_config, student_params, stored_logits):
    """To the student's stored size, with whatever logits: they are of no token."""
    stored, batch = stored_logits
    loss = replace(step_config.loss, cosine=0.0)
    config = replace(step_config, loss=loss, teacher=dj.LogitsFromBatch())
    state = dj.init_state(KEY, config, params=student_params)
    padded = np.pad(stored, ((0, 0), (0, 0), (0, 128 - stored.shape[-1])), constant_values=9.0)
    expected, actual = (
        jax.jit(dj.gradients)(state, None, batch.replace(teacher_logits=logits)) for logits in (stored, padded)
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_an_optimiser_may_make_arrays(step_config):
    """Also where a state is only traced, first of all."""
    config = replace(step_config, optimizer=Momentum(decay=0.5))
    dj.make_optimizer.cache_clear()
    dj.abstract_state(config)
    state = dj.init_state(KEY, config)
    assert jax.tree.structure(state.opt_state[0].trace) == jax.tree.structure(state.params)


def test_an_evaluation_compares_with_logits_too(step_config, student_params, teacher_params, stored_logits):
    stored, batch = stored_logits
    state = dj.init_state(KEY, step_config, params=student_params)
    expected = jax.jit(dj.eval_step)(state, teacher_params, batch)
    config = replace(step_config, teacher=dj.LogitsFromBatch(), loss=replace(step_config.loss, cosine=0.0))
    state = dj.init_state(KEY, config, params=student_params)
    actual = jax.jit(dj.eval_step)(state, None, batch.replace(teacher_logits=stored))
    assert actual.keys() == expected.keys() == {"mlm", "accuracy", "kl", "agreement"}
    for name, mean in expected.items():
        np.testing.assert_allclose(actual[name].value(), mean.value(), rtol=1e-5)
    state = dj.init_state(KEY, replace(step_config, objective=Scaled()), params=student_params)
    terms = jax.jit(dj.eval_step)(state, teacher_params, batch)
    assert terms.keys() == {*expected, "cosine", "norm"} and terms["mlm"].value() == expected["mlm"].value()


@pytest.mark.parametrize("chunk", [0, 32])
def test_an_id_whose_logit_is_minus_infinity_has_no_probability(step_config, student_params, stored_logits, chunk):
    """As in a store of each position's likeliest ids."""
    stored, batch = stored_logits
    cut = np.sort(stored, axis=-1)[..., -8:-7]
    few = np.where(stored >= cut, stored, -np.inf)
    loss = dj.LossConfig(kl=1.0, mlm=0.0, cosine=0.0, temperature=2.0, chunk=chunk)
    config = replace(step_config, loss=loss, teacher=dj.LogitsFromBatch())
    state = dj.init_state(KEY, config, params=student_params)
    grads, metrics = jax.jit(dj.gradients)(state, None, batch.replace(teacher_logits=few.astype(np.float16)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))

    encoded = dj.MaskedLm(step_config.student).apply({"params": student_params}, batch)
    student = np.asarray(dj.logits(encoded.features, encoded.head), np.float64)[..., : few.shape[-1]] / 2
    teacher = few.astype(np.float16).astype(np.float64) / 2
    student -= np.log(np.exp(student).sum(-1, keepdims=True))
    teacher -= np.log(np.exp(teacher).sum(-1, keepdims=True))
    probs = np.exp(teacher)
    kl = 4 * np.where(probs > 0, probs * (np.where(probs > 0, teacher, 0) - student), 0).sum(-1)
    np.testing.assert_allclose(metrics["kl"].value(), kl[batch.segment_ids > 0].mean(), rtol=1e-5)


# Mistakes


def lowered(config, batch, teacher_params=None):
    return jax.eval_shape(dj.gradients, jax.eval_shape(lambda: dj.init_state(KEY, config)), teacher_params, batch)


@dataclass(frozen=True)
class Named(dj.Distillation):
    """The published objective with a term under another name."""

    name: str = "loss"

    def loss(self, student, teacher, batch, counts):
        loss, terms = super().loss(student, teacher, batch, counts)
        return loss, terms | {self.name: terms["mlm"]}


@dataclass(frozen=True)
class Holding:
    """Frozen, and yet not hashable."""

    weights: list = field(default_factory=lambda: [1.0, 2.0])


def test_mistakes_are_one_sentence(step_config, stored_logits, teacher_params):
    stored, batch = stored_logits
    with_logits = replace(step_config, loss=replace(step_config.loss, cosine=0.0), teacher=dj.LogitsFromBatch())
    with pytest.raises(dj.InputError, match=r"set Batch\.teacher_logits"):
        lowered(with_logits, batch)
    with pytest.raises(dj.InputError, match="cosine compares hidden states, and the teacher has none"):
        lowered(replace(step_config, teacher=dj.LogitsFromBatch()), batch.replace(teacher_logits=stored))
    wide = np.zeros((*stored.shape[:2], 200), np.float32)
    with pytest.raises(dj.InputError, match="logits for 200 ids and the student for 128"):
        lowered(with_logits, batch.replace(teacher_logits=wide))
    for name in ("loss", "tokens", "step", "my term"):
        with pytest.raises(dj.InputError, match=f"cannot be called '{name}'"):
            lowered(replace(step_config, objective=Named(step_config.loss, name=name)), batch, teacher_params)
    for part in ("objective", "optimizer", "teacher"):
        with pytest.raises(dj.InputError, match=rf"StepConfig\.{part} must be hashable"):
            replace(step_config, **{part: Holding()})
    with pytest.raises(dj.InputError, match=r"16 rows .* do not divide into 3 micro-batches"):
        lowered(replace(step_config, accumulation=3), batch, teacher_params)
    with pytest.raises(dj.InputError, match=r"Encoded, such as .*, and not "):
        lowered(replace(with_logits, teacher=lambda params, batch: batch.teacher_logits), batch, teacher_params)
    with pytest.raises(dj.InputError, match="is no objective: it needs the methods counts, loss and combine"):
        lowered(replace(step_config, objective="kl"), batch, teacher_params)
    with pytest.raises(dj.InputError, match=r"is no optimiser: .* a method make"):
        lowered(replace(step_config, optimizer="lion"), batch, teacher_params)
    defaults = replace(step_config, optimizer=dj.OptimizerConfig())
    state = dj.init_state(KEY, defaults)  # which needs no length of a schedule
    with pytest.raises(dj.InputError, match=r"optimizer\.steps must be above 0"):
        jax.eval_shape(dj.train_step, state, teacher_params, batch)


# In the loop


@dataclass(frozen=True)
class Scaled:
    """The published objective, with a norm of the hidden states beside it."""

    weight: float = 0.1
    published: dj.Distillation = dj.Distillation()

    def counts(self, batch):
        return self.published.counts(batch) | {"norm": jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)}

    def loss(self, student, teacher, batch, counts):
        terms = self.published.loss(student, teacher, batch, counts)[1]
        terms["norm"] = dj.Mean.of(jnp.mean(student.hidden**2, axis=-1), where=batch.segment_ids > 0)
        return self.combine(terms, counts), terms

    def combine(self, terms, counts):
        return self.published.combine(terms, counts) + self.weight * terms["norm"].total / counts["norm"]


@dataclass(frozen=True)
class Momentum:
    learning_rate: float = 1e-3
    decay: float = 0.9

    def make(self):
        return optax.sgd(jnp.float32(self.learning_rate), momentum=self.decay)


SETTINGS = ("train.steps=6", "train.checkpoint_every=3", "train.eval_every=3", "train.tensorboard=false")


def test_a_run_of_ones_own_parts_resumes_bit_for_bit_and_only_with_equal_ones(workshop, tmp_path, capsys):
    config = load(workshop / "run.toml", SETTINGS)
    own = {"objective": Scaled(), "optimizer": Momentum()}
    train(config, tmp_path / "run", **own)
    printed = capsys.readouterr().out
    assert "objective Scaled, optimizer Momentum" in printed and re.search(r"step +6 .*loss .*mlm .*norm ", printed)
    before, whole = run_numbers(tmp_path / "run"), open_model(tmp_path / "run")
    first = next(line for line in before if line["kind"] == "train")
    assert {"norm", "loss"} <= first.keys() and "learning_rate" not in first
    assert "norm" in before[-1] and before[-1]["kind"] == "held_out"
    assert whole.metadata["custom"]["optimizer"] == {"class": "Momentum", "learning_rate": 1e-3, "decay": 0.9}
    assert whole.metadata["custom"]["objective"]["published"]["config"]["class"] == "LossConfig"

    cli.main(["export", str(tmp_path / "run"), str(tmp_path / "model")])
    card = (tmp_path / "model" / "README.md").read_text()
    assert (
        "own parts, instead of the recipe's: objective `Scaled`, optimizer `Momentum`" in card and "AdamW" not in card
    )

    # The command line does not know the parts, also where nothing is saved yet.
    unsaved = shutil.copytree(tmp_path / "run", tmp_path / "unsaved", ignore=shutil.ignore_patterns("checkpoints"))
    for run, output in ((tmp_path / "run", tmp_path / "new"), (unsaved, unsaved)):
        assert cli.main(["train", str(run), "--output", str(output)]) == 2
        assert "own (objective, optimizer), which the command line does not know" in capsys.readouterr().err
    with pytest.raises(dj.InputError, match=r"optimizer: .*Momentum.* -> as configured.*: go on with it from Python"):
        train(config, unsaved)

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    changed = (
        ({"objective": Scaled(weight=0.2), "optimizer": Momentum()}, "objective: .*'weight': 0.1.* -> .*0.2"),
        ({"objective": Scaled()}, "optimizer: .*Momentum.* -> as configured"),
        ({"objective": dj.Distillation(), "optimizer": Momentum()}, "objective: .*Scaled.* -> .*'Distillation'"),
        ({"objective": Scaled(), "optimizer": optax.sgd(1e-3)}, "optimizer is, and .* put it into a dataclass"),
        ({"objective": Scaled(), "optimizer": Sgd()}, "optimizer: .*Momentum.* -> .*Sgd"),
    )
    for parts, message in changed:
        with pytest.raises(dj.InputError, match=message):
            train(config, tmp_path / "run", **parts)
    train(config, tmp_path / "run", **own)
    assert run_numbers(tmp_path / "run") == before
    assert same_leaves(open_model(tmp_path / "run").params, whole.params)


def test_what_cannot_be_written_down_is_refused_before_a_run_begins(workshop, tmp_path):
    config = load(workshop / "run.toml", SETTINGS)
    with pytest.raises(dj.InputError, match=r"its optimizer is, and .* cannot be written: put it into a dataclass"):
        train(config, tmp_path / "run", optimizer=optax.chain(optax.sgd(0.1)))
    with pytest.raises(dj.InputError, match="put an OptimizerConfig into the config"):
        train(config, tmp_path / "run", optimizer=dj.OptimizerConfig(steps=9))
    with pytest.raises(dj.InputError, match="give teacher too"):
        train(config, tmp_path / "run", teacher_params={})
    with pytest.raises(dj.InputError, match="rows carry no logits"):
        train(config, tmp_path / "run", teacher=dj.LogitsFromBatch(), objective=dj.Distillation())
    with pytest.raises(dj.InputError, match="There are two teachers"):
        train(config, tmp_path / "run", teacher=TableTeacher(), objective=dj.Distillation())
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class TableTeacher:
    """Logits for every token, from a table."""

    def __call__(self, params, batch):
        return dj.Encoded(logits=params["table"][batch.input_ids])


def test_a_teacher_that_is_a_function_and_metrics_that_nobody_knows(workshop, tmp_path, capsys):
    settings = ["train.steps=2", "train.tensorboard=false", "teacher.path=", "train.eval_every=0"]
    sizes = {"hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "max_positions": 32}
    settings += [f"student.{name}={size}" for name, size in sizes.items()]
    config = load(workshop / "run.toml", settings)
    vocab_size = assemble(config).step.student.vocab_size
    teacher, params = TableTeacher(), {"table": np.zeros((vocab_size, vocab_size))}
    objective = dj.Distillation(dj.LossConfig(cosine=0.0))
    metrics = train(config, tmp_path / "run", teacher=teacher, teacher_params=params, objective=objective)
    assert metrics["kl"] > 0 and "teacher TableTeacher" in capsys.readouterr().out
    (of_teacher,) = [line for line in run_numbers(tmp_path / "run") if line["kind"] == "teacher"]
    assert of_teacher["mlm"] == pytest.approx(np.log(vocab_size)), "all words of the vocabulary are equally likely"
    with pytest.raises(dj.InputError, match="other teacher weights"):
        other = jax.tree.map(lambda leaf: leaf + 1, params)
        train(config, tmp_path / "run", teacher=teacher, teacher_params=other, objective=objective)

    def step(state, teacher_params, rows, weights):
        state, metrics = dj.mask_and_train_step(state, teacher_params, rows, weights)
        return state, {"mine": metrics["mlm"]}

    def make():
        program = compile_run(assemble(config))
        return replace(program, step=dj.jit_step(step, program.mesh, dj.abstract_state(program.step_config), None))

    run_program(make, tmp_path / "other")
    assert re.search(r"step +2  mine [\d.]+  [\d.]+ steps/s", capsys.readouterr().out)
    assert run_numbers(tmp_path / "other")[1].keys() == {"step", "kind", "mine", "skipped"}


@dataclass(frozen=True)
class Smoothed:
    """A task's cross entropy, and a term that keeps its logits small."""

    task: dj.TaskObjective
    weight: float = 0.1

    def counts(self, batch):
        return self.task.counts(batch) | {"small": jnp.sum(batch.segment_ids[:, 0] > 0, dtype=jnp.float32)}

    def loss(self, student, teacher, batch, counts):
        _, terms = self.task.loss(student, teacher, batch, counts)
        terms["small"] = dj.Mean.of(jnp.mean(student**2, axis=-1), where=batch.segment_ids[:, 0] > 0)
        return self.combine(terms, counts), terms

    def combine(self, terms, counts):
        return self.task.combine(terms, counts) + self.weight * terms["small"].total / jnp.maximum(counts["small"], 1)


def test_a_task_takes_parts_of_ones_own_too(workshop, tmp_path):
    lines = [f"the {animal} sees the {other},{animal}" for animal in ("cat", "dog") for other in ("bird", "fish")]
    (tmp_path / "task.csv").write_text("\n".join(["text,label", *lines * 4]) + "\n")
    (tmp_path / "task.toml").write_text(f'[task]\ntrain = "{tmp_path}/task.csv"\ndev = "{tmp_path}/task.csv"\n')
    settings = ("train.steps=2", "train.batch_rows=8", "train.tensorboard=false", f"model.path={workshop / 'teacher'}")
    config = load_task(tmp_path / "task.toml", settings)
    objective = Smoothed(dj.TaskObjective(dj.HeadConfig("sequence", 2), dj.TaskLossConfig()))
    metrics = finetune(config, tmp_path / "run", objective=objective, optimizer=Momentum())
    assert 0 <= metrics["dev"]["accuracy"] <= 1
    assert {"task", "small"} <= run_numbers(tmp_path / "run")[-2].keys()
    with pytest.raises(dj.InputError, match=r"objective: .*Smoothed.* -> as configured"):
        finetune(config, tmp_path / "run", optimizer=Momentum())
