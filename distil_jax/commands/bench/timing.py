"""Clocks and floors: work measured in alternation, and how fast a bare matrix product is on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np

from distil_jax.schema import InputError, require

T = TypeVar("T")
Call = Callable[[], Any]  # comes back when its work is done

_READINGS = 5  # of the rate of bare products


@dataclass(frozen=True)
class Measured:
    """The results of one measurement.

    Attributes:
      lines: one a result, each a flat table; a number that there is none of is None.
      products: TFLOP/s of bare matrix products by library, where they were measured.
    """

    lines: list[dict[str, Any]]
    products: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Optimiser steps in a row, with one wait for the device at their end."""

    seconds: float
    tokens: int  # real ones, no padding
    positions: int  # with the padding
    waited: float = 0.0  # seconds in which the host had no rows to give to the device


def alternate(sides: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """Calls every side with the number of the round, one after the other, round after round.

    What slows the machine down for a while then slows all sides down, and quotients within a round stay fair.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            results[name].append(side(number))
    return results


@dataclass(frozen=True)
class Timed:
    """A call, with the clock in the process in which it runs."""

    call: Call

    def seconds(self, times: int) -> list[float]:
        """The seconds of each of so many calls."""
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            self.call()
            seconds.append(time.perf_counter() - began)
        return seconds


def medians(calls: Mapping[str, Timed], *, times: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the median of `times` in each round, in alternation."""
    for call in calls.values():
        call.seconds(1)  # compiled and warm
    sides = {name: lambda _, call=call: 1e3 * float(np.median(call.seconds(times))) for name, call in calls.items()}
    return alternate(sides, rounds)


def spread(name: str, values: Sequence[float], below: Sequence[float] | None = None) -> dict[str, float]:
    """Median, lowest and highest over the rounds, of `values` or of `values / below` taken within each round."""
    values = list(values) if below is None else [one / other for one, other in zip(values, below, strict=True)]
    return {name: float(np.median(values)), f"{name}_lowest": min(values), f"{name}_highest": max(values)}


def products(rows: int, width: int, inner: int, dtype: str, pairs: int) -> Timed:
    """A call of XLA: `pairs` times [rows, width] x [width, inner], and back."""
    shapes = ((rows, width), (width, inner), (inner, width))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, up, down = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    up, down = up * width**-0.5, down * inner**-0.5  # values keep their size: infinities have another speed
    chain = jax.jit(lambda x, up, down: jax.lax.fori_loop(0, pairs, lambda _, x: (x @ up) @ down, x))
    return Timed(lambda: jax.block_until_ready(chain(x, up, down)))


def product_rates(
    makers: Mapping[str, Callable[..., Timed]], rows: int, width: int, inner: int, dtype: str
) -> dict[str, float]:
    """TFLOP/s of each library's bare matrix products: the floor of whatever is built of them."""
    # Enough of them that on an accelerator they are not lost in their dispatch.
    wanted = 2e9 if jax.default_backend() == "cpu" else 2e13
    pairs = max(1, int(wanted / (4 * rows * width * inner)))
    calls = {name: make(rows, width, inner, dtype, pairs) for name, make in makers.items()}
    flops = 4 * rows * width * inner * pairs
    milliseconds = medians(calls, times=1, rounds=_READINGS)
    return {name: flops / float(np.median(each)) / 1e9 for name, each in milliseconds.items()}


def positive(**values: int) -> None:
    """Refuses numbers below 1, by the names of their flags.

    Raises:
      InputError: there is one.
    """
    for name, value in values.items():
        require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, not {value}.")


def numbers(flag: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The numbers of a flag that takes several.

    Raises:
      InputError: something else.
    """
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} takes numbers with commas between, not {text!r}.") from error
