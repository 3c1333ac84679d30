"""A run, compiled for the machine: the mesh, the step, the evaluation, and the state before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from distil_jax.commands.assemble import Parts, teacher_shapes
from distil_jax.commands.evaluate import held_out_numbers
from distil_jax.training.sharding import jit_eval, jit_step, make_mesh, put_params, shardings_of
from distil_jax.training.state import TrainState, abstract_state, init_state
from distil_jax.training.step import mask_and_eval_step, mask_and_train_step


@dataclass(frozen=True, eq=False)
class Program:
    """A run, compiled for the machine: the mesh, the step, the evaluation, and where its state lives."""

    parts: Parts
    mesh: jax.sharding.Mesh
    step: Callable
    eval_step: Callable
    state_sharding: Any
    teacher_params: Any

    def held_out(self, state: TrainState) -> dict[str, float]:
        config = self.parts.config.train
        return held_out_numbers(
            self.eval_step,
            state,
            self.teacher_params,
            self.parts.rows("held_out"),
            self.parts.held_out_weights,
            mesh=self.mesh,
            batch_rows=config.batch_rows // self.parts.step.accumulation,
            limit=config.eval_rows,
        )


def compile_run(parts: Parts) -> Program:
    """Mesh, shardings and jitted steps; nothing is computed yet (XLA compiles at the first call)."""
    mesh = make_mesh(parts.config.mesh)
    state_shapes = abstract_state(parts.step)
    shapes, teacher_params = None, None
    if parts.teacher_params is not None:
        shapes = teacher_shapes(parts.config.teacher, parts.step.teacher)
        teacher_params = put_params(parts.teacher_params, shardings_of(shapes, mesh))
    return Program(
        parts=parts,
        mesh=mesh,
        step=jit_step(mask_and_train_step, mesh, state_shapes, shapes),
        eval_step=jit_eval(mask_and_eval_step, mesh, state_shapes, shapes),
        state_sharding=shardings_of(state_shapes, mesh),
        teacher_params=teacher_params,
    )


def first_state(program: Program) -> TrainState:
    """The student before its first step, made where it will live."""
    make = partial(init_state, jax.random.key(program.parts.config.seed), program.parts.step)
    return jax.jit(lambda params: make(params=params), out_shardings=program.state_sharding)(
        program.parts.student_params
    )
