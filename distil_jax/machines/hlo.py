"""Costs of a compiled program, read from its text: matrix products, memory traffic, and communication.

XLA's own cost analysis counts the body of a loop once, however often it runs; here every instruction counts as often as
it is executed.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4}
_BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
# Instructions that move nothing: names for what is there, and the far ends of what was counted at its start.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done", "after-all"}
_FREE |= {"partition-id", "replica-id", "while", "conditional", "call", "async-done", "opt-barrier", "iota"}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    kind: str
    dims: tuple[int, ...]
    in_vmem: bool  # memory space 1 of a TPU: on the chip, not in HBM

    @property
    def bytes(self) -> float:
        return _BYTES.get(self.kind, 0) * math.prod(self.dims)

    @property
    def hbm_bytes(self) -> float:
        return 0 if self.in_vmem else self.bytes


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str  # what follows the operands

    def calls(self, *keys: str) -> list[str]:
        """The computations that it names under these keys, alone or in a list."""
        named = [each for key in keys for each in re.findall(rf"\b{key}=(%?[\w.\-]+|\{{[^}}]*\}})", self.text)]
        return [name for each in named for name in re.findall(r"[\w.\-]+", each)]


@dataclass
class Costs:
    """Costs of one execution on one device.

    Attributes:
      flops: of matrix products (and convolutions, which TPUs make of them): two per multiply-add.
      hbm_bytes: read and written by everything else than names.
      exchanged: bytes by kind of collective: of what goes in or comes out, whichever is more.
      collectives: how many of each kind.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    exchanged: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Program:
    """The text of a compiled program (`compiled.as_text()`), by computation."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[1], {})
                self.entry = head[1] if line.startswith("ENTRY") else self.entry
            elif " = " in line and (instruction := _instruction(line)):
                current[instruction.name] = instruction

    @cached_property
    def costs(self) -> Costs:
        """Costs of the whole program, with loops; of a conditional, those of the branch that moves the most."""
        return self._costs(self.entry)

    def _costs(self, entry: str) -> Costs:
        costs = Costs()
        for name, times in self._executed(entry, 1):
            computation = self.computations[name]
            for instruction in computation.values():
                costs.flops += times * self._flops(computation, instruction)
                costs.hbm_bytes += times * self._traffic(computation, instruction)
                self._exchange(costs, computation, instruction, times)
        return costs

    def _executed(self, name: str, times: float) -> Iterator[tuple[str, float]]:
        """Every computation that runs as such (not inside a fusion), with how often."""
        yield name, times
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                body, condition = instruction.calls("body")[0], instruction.calls("condition")[0]
                yield from self._executed(body, times * self._trips(instruction, condition))
            elif instruction.opcode == "conditional":
                branches = instruction.calls("branch_computations", "true_computation", "false_computation")
                yield from self._executed(max(branches, key=lambda each: self._costs(each).hbm_bytes), times)
            elif instruction.opcode in ("call", "async-start"):
                for called in instruction.calls("to_apply", "calls"):
                    yield from self._executed(called, times)

    def _trips(self, loop: Instruction, condition: str) -> int:
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        # A scan counts from 0 up to a constant.
        constants = [
            int(match[1])
            for each in self.computations[condition].values()
            if each.opcode == "constant" and (match := re.match(r"(\d+)\)", each.text))
        ]
        if len(constants) != 1:
            raise ValueError(f"The loop {loop.name} does not say how often it runs.")
        return constants[0]

    def _exchange(self, costs: Costs, inside: dict[str, Instruction], instruction: Instruction, times: float) -> None:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "fusion":
            fused = self.computations[instruction.calls("calls")[0]]
            # A TPU writes a reduce-scatter as an all-reduce of which each chip keeps its slice.
            sliced = any(each.opcode == "dynamic-slice" for each in fused.values())
            for each in fused.values():
                scatters = sliced and each.opcode == "all-reduce"
                self._exchange(costs, fused, replace(each, opcode="reduce-scatter") if scatters else each, times)
        elif opcode in COLLECTIVES:
            given = sum(each.bytes for name in instruction.operands for each in inside[name].arrays)
            result = sum(each.bytes for each in instruction.arrays)
            if opcode != instruction.opcode:  # an asynchronous start names its operands beside its results
                result -= given
            costs.exchanged[opcode] += times * max(given, result)
            costs.collectives[opcode] += times

    def _flops(self, inside: dict[str, Instruction], instruction: Instruction) -> float:
        if instruction.opcode == "fusion":
            fused = self.computations[instruction.calls("calls")[0]]
            return sum(self._flops(fused, each) for each in fused.values())
        if instruction.opcode == "dot":
            left = inside[instruction.operands[0]].arrays[0].dims
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)[1]
            inner = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
            return 2 * math.prod(instruction.arrays[0].dims) * inner
        if instruction.opcode == "convolution":
            return _convolution_flops(inside, instruction)
        if instruction.opcode == "custom-call":  # a kernel says itself what it does
            match = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.text)
            return float(match[1]) if match else 0
        return 0

    def _traffic(self, inside: dict[str, Instruction], instruction: Instruction) -> float:
        operands = [inside[name] for name in instruction.operands if name in inside]
        match instruction.opcode:
            case opcode if opcode in _FREE or opcode.endswith("-done"):
                return 0
            case "custom-call" if re.search(r'"(AllocateBuffer|ConcatBitcast|Assume\w+)"', instruction.text):
                return 0
            case "copy-start" | "slice-start":  # from one memory into the other, or within HBM
                return max((each.hbm_bytes for each in instruction.arrays[:2]), default=0)
            case "fusion":
                fused = self.computations[instruction.calls("calls")[0]]
                return _fusion_traffic(fused, instruction, operands)
            case "dynamic-slice":
                moved = (*instruction.arrays, *instruction.arrays)
            case "dynamic-update-slice":
                moved = (*operands[1].arrays, *operands[1].arrays)
            case _:
                moved = (*instruction.arrays, *(each for value in operands for each in value.arrays))
        return sum(each.hbm_bytes for each in moved)


def _fusion_traffic(fused: dict[str, Instruction], instruction: Instruction, operands: list[Instruction]) -> float:
    """Reads and writes of a fusion; of what it slices or updates in place, only the slice moves."""
    users = defaultdict(list)
    for each in fused.values():
        for place, name in enumerate(each.operands):
            users[name].append((each, place))
    total = 0.0
    parameters = {int(each.text.split(")")[0]): each for each in fused.values() if each.opcode == "parameter"}
    for number, operand in enumerate(operands):
        whole = sum(each.hbm_bytes for each in operand.arrays)
        if not whole or number not in parameters:
            continue
        parts = [_part_read(fused, user, place) for user, place in users[parameters[number].name]]
        known = bool(parts) and None not in parts
        total += min(whole, sum(parts)) if known else whole
    updates = [each for each in fused.values() if each.opcode == "dynamic-update-slice"]
    written = sum(each.hbm_bytes for each in instruction.arrays)
    if updates and written:
        changed = sum(fused[each.operands[1]].arrays[0].bytes for each in updates)
        in_place = sum(each.arrays[0].bytes for each in updates)
        written = max(0.0, written - in_place) + changed
    return total + written


def _part_read(fused: dict[str, Instruction], user: Instruction, place: int) -> float | None:
    """How much of its operand an instruction reads, or None where it reads all of it."""
    if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
        return sum(each.bytes for each in user.arrays)
    if user.opcode == "dynamic-update-slice" and place == 0:
        return 0.0
    return None


def _convolution_flops(inside: dict[str, Instruction], instruction: Instruction) -> float:
    """Multiply-adds that meet real numbers: a TPU writes a batch axis as a dilated, padded window."""
    left, right = (inside[name].arrays[0].dims for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    lhs, rhs, out = labels.groups()
    spatial = sorted(set(lhs) - set("bf"))
    window = {
        key: re.search(rf"\b{key}=([\dx_\-]+)", instruction.text)
        for key in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
    }

    def number(key: str, axis: int, default: int) -> int:
        match = window[key]
        return int(match[1].split("x")[axis].split("_")[0]) if match else default  # the low one of low_high

    pairs = 1
    for axis, label in enumerate(spatial):
        size, stride, low = number("size", axis, 1), number("stride", axis, 1), number("pad", axis, 0)
        spread, step = number("lhs_dilate", axis, 1), number("rhs_dilate", axis, 1)
        length = left[lhs.index(label)]
        reach = (length - 1) * spread + 1
        met = 0
        for place in range(instruction.arrays[0].dims[out.index(label)]):
            for tap in range(size):
                at = place * stride - low + tap * step
                met += 0 <= at < reach and at % spread == 0
        pairs *= met
    batch = instruction.arrays[0].dims[out.index("b")]
    features = instruction.arrays[0].dims[out.index("f")]
    return 2 * pairs * batch * features * right[rhs.index("i")]


def _instruction(line: str) -> Instruction | None:
    name, _, rest = line.strip().partition(" = ")
    kind, rest = _until(rest) if rest.startswith("(") else rest.split(" ", 1)
    match = re.match(r"\s*([a-z][\w\-]*)\(", rest)
    if not match:
        return None
    inside, after = _until(rest[match.end() - 1 :])
    leaf = match[1] in ("constant", "parameter")  # what stands in their parentheses is no operand
    return Instruction(
        name=name.removeprefix("ROOT ").removeprefix("%"),
        opcode=match[1],
        arrays=tuple(
            Array(kind, tuple(int(n) for n in dims.split(",") if n), "S(1)" in (layout or ""))
            for kind, dims, layout in _SHAPE.findall(kind)
        ),
        operands=() if leaf else tuple(_NAME.findall(inside)),
        text=inside[1:] + after if leaf else after,
    )


def _until(text: str) -> tuple[str, str]:
    """The parenthesised beginning of `text`, and the rest."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    return text, ""
