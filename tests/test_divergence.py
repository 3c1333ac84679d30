"""When a run is given up: too many steps without numbers in a row, or a loss far above what it was."""

import json

import pytest

from distil_jax.config.run import TrainConfig
from distil_jax.runtime.divergence import Divergence
from distil_jax.runtime.exit_codes import Diverged

CONFIG = TrainConfig(steps=1, skips_allowed=2, spike_factor=3.0, spike_steps=4)


def looked(losses, config=CONFIG, restarts=False):
    """The step that was the end, or None; a loss of None is a skipped step. `restarts`: goes on anew at every step."""
    divergence = Divergence(config)
    for step, loss in enumerate(losses, 1):
        if restarts:
            divergence = Divergence(config, json.loads(json.dumps(divergence.memory)))
        try:
            divergence.update(step, float("nan") if loss is None else loss, skipped=loss is None)
        except Diverged:
            return step
    return None


def test_skips_count_in_a_row():
    assert looked([1.0, None, None, 1.0, None, None, 1.0]) is None
    assert looked([1.0, None, None, None]) == 4
    assert looked([None], TrainConfig(steps=1, skips_allowed=0)) == 1


@pytest.mark.parametrize(("tail", "end"), [([3.1] * 4, 44), ([3.1] * 3 + [2.9] + [3.1] * 3, None), ([2.9] * 50, None)])
def test_a_loss_far_above_its_median_for_long(tail, end):
    assert looked([1.0] * 40 + tail) == end


def test_a_negative_loss_has_no_factor():
    """As that of an objective of one's own: it improves, and then is 0."""
    assert looked([-0.3 - 0.005 * step for step in range(120)] + [0.0] * 50) is None


def test_high_losses_do_not_become_usual():
    assert looked([1.0] * 40 + ([5.0] * 3 + [1.0]) * 100 + [5.0] * 4) == 444


def test_the_beginning_and_a_factor_of_0_judge_nothing():
    assert looked([1.0] * 5 + [100.0] * 10) is None
    assert looked([1.0] * 40 + [1e9] * 50, TrainConfig(steps=1, spike_factor=0.0)) is None


@pytest.mark.parametrize("losses", [[1.0] * 30 + [3.1] * 4, [1.0, None, None, None], [1.0] * 300 + [None, 3.1] * 4])
def test_a_run_that_is_stopped_at_every_step_ends_at_the_same_one(losses):
    assert looked(losses, restarts=True) == looked(losses) is not None
