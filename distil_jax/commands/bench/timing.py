"""Times calls in alternation, and measures the speed of matrix products alone as a reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np

from distil_jax.schema import InputError, require

T = TypeVar("T")
Call = Callable[[], Any]  # returns when its work is done

_MATMUL_ROUNDS = 5


@dataclass(frozen=True)
class Measurement:
    """The results of one measurement.

    Attributes:
      lines: the rows of its table, from column to value; None: there is no value.
      products: by library, TFLOP/s of matrix products alone, if they were measured.
    """

    lines: list[dict[str, Any]]
    products: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """The timing of consecutive optimiser steps, with one wait for the device after the last."""

    seconds: float
    tokens: int  # without padding
    positions: int  # with padding
    waited: float = 0.0  # seconds in which the host waited for rows


def alternate(sides: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """Calls every side once per round with the index of the round, and returns the results by side.

    Whatever slows the machine down for a while then affects all sides, so that ratios within a round stay fair.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    for index in range(rounds):
        for name, side in sides.items():
            results[name].append(side(index))
    return results


@dataclass(frozen=True)
class TimedCall:
    """A call that is timed in the process in which it runs."""

    call: Call

    def seconds(self, times: int) -> list[float]:
        """Makes the call `times` times, and returns the seconds of each."""
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            self.call()
            seconds.append(time.perf_counter() - start)
        return seconds


def medians(calls: Mapping[str, TimedCall], *, times: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call by round: the median of `times` calls, measured in alternation."""
    for call in calls.values():
        call.seconds(1)  # compiles, and warms up
    sides = {name: lambda _, call=call: 1e3 * float(np.median(call.seconds(times))) for name, call in calls.items()}
    return alternate(sides, rounds)


def spread(name: str, values: Sequence[float], divisors: Sequence[float] | None = None) -> dict[str, float]:
    """Median, lowest and highest over the rounds, of `values`, or of the ratios `values / divisors` of each round."""
    if divisors is not None:
        values = [value / divisor for value, divisor in zip(values, divisors, strict=True)]
    return {name: float(np.median(values)), f"{name}_lowest": min(values), f"{name}_highest": max(values)}


def matmuls(rows: int, width: int, inner: int, dtype: str, pairs: int) -> TimedCall:
    """A call that multiplies x [rows, width] by [width, inner] and then by [inner, width], `pairs` times, in XLA."""
    shapes = ((rows, width), (width, inner), (inner, width))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, up, down = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    up, down = up * width**-0.5, down * inner**-0.5  # keeps the values finite, because infinities may change the speed
    chain = jax.jit(lambda x, up, down: jax.lax.fori_loop(0, pairs, lambda _, x: (x @ up) @ down, x))
    return TimedCall(lambda: jax.block_until_ready(chain(x, up, down)))


def matmul_rates(
    makers: Mapping[str, Callable[..., TimedCall]], rows: int, width: int, inner: int, dtype: str
) -> dict[str, float]:
    """TFLOP/s of matrix products alone, by library, as an upper bound for whatever is built of them."""
    # On an accelerator there must be enough of them to hide the time of the dispatch.
    total_flops = 2e9 if jax.default_backend() == "cpu" else 2e13
    pairs = max(1, int(total_flops / (4 * rows * width * inner)))
    calls = {name: make(rows, width, inner, dtype, pairs) for name, make in makers.items()}
    flops = 4 * rows * width * inner * pairs
    milliseconds = medians(calls, times=1, rounds=_MATMUL_ROUNDS)
    return {name: flops / float(np.median(by_round)) / 1e9 for name, by_round in milliseconds.items()}


def require_positive(**values: int) -> None:
    """Checks that the values of flags are at least 1; a keyword is the flag's name with underscores.

    Raises:
      InputError: a value is below 1.
    """
    for name, value in values.items():
        require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, not {value}.")


def parse_list(flag: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The numbers in the value of a flag, where they are separated by commas.

    Args:
      flag: its name, for the error message.
      text: its value.
      kind: `int` or `float`.

    Raises:
      InputError: the value is something else.
    """
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} takes numbers separated by commas, not {text!r}.") from error
