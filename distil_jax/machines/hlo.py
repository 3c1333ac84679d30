"""Costs of a compiled program, from its HLO text: FLOPs of matrix products, HBM traffic and collectives.

XLA's own cost analysis counts the body of a loop only once. Here an instruction counts as often as it is executed.
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
# Instructions without memory traffic of their own. An asynchronous operation is counted at its start, not at its end.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done", "after-all"}
_FREE |= {"partition-id", "replica-id", "while", "conditional", "call", "async-done", "opt-barrier", "iota"}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str  # in HLO's notation, such as "f32"
    dims: tuple[int, ...]
    in_vmem: bool  # in memory space 1 of a TPU, which is on the chip, instead of HBM

    @property
    def bytes(self) -> float:
        return _BYTES.get(self.dtype, 0) * math.prod(self.dims)

    @property
    def hbm_bytes(self) -> float:
        return 0 if self.in_vmem else self.bytes


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str  # the text after the operands; of a constant or a parameter, also its value or number

    def called(self, *keys: str) -> list[str]:
        """The names of the computations in these attributes, each of which holds one name or a list."""
        names = []
        for key in keys:
            for value in re.findall(rf"\b{key}=(%?[\w.\-]+|\{{[^}}]*\}})", self.attributes):
                names += re.findall(r"[\w.\-]+", value)
        return names


@dataclass
class Costs:
    """Costs of one execution on one device.

    Attributes:
      flops: of matrix products and of convolutions, which TPUs use for them; two per multiply-add.
      hbm_bytes: bytes that are read from HBM and written to it.
      collective_bytes: by kind of collective, bytes of the operands or of the results, whichever are more.
      collective_counts: number of collectives by kind.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collective_bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    collective_counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Program:
    """A compiled program, parsed from its HLO text (`compiled.as_text()`): the instructions of each computation."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[1], {})
                self.entry = header[1] if line.startswith("ENTRY") else self.entry
            elif " = " in line and (instruction := _parse_instruction(line)):
                current[instruction.name] = instruction

    @cached_property
    def costs(self) -> Costs:
        """Costs of the whole program. Of a conditional, the branch with the most HBM traffic counts."""
        return self._costs(self.entry)

    def _costs(self, entry: str) -> Costs:
        costs = Costs()
        for name, times in self._executed(entry, 1):
            computation = self.computations[name]
            for instruction in computation.values():
                costs.flops += times * self._flops(computation, instruction)
                costs.hbm_bytes += times * self._hbm_bytes(computation, instruction)
                self._add_collectives(costs, computation, instruction, times)
        return costs

    def _executed(self, name: str, times: float) -> Iterator[tuple[str, float]]:
        """This computation and those that it runs, apart from fusions, with how many times each is executed."""
        yield name, times
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                body, condition = instruction.called("body")[0], instruction.called("condition")[0]
                yield from self._executed(body, times * self._trip_count(instruction, condition))
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations", "true_computation", "false_computation")
                yield from self._executed(max(branches, key=lambda branch: self._costs(branch).hbm_bytes), times)
            elif instruction.opcode in ("call", "async-start"):
                for called in instruction.called("to_apply", "calls"):
                    yield from self._executed(called, times)

    def _trip_count(self, loop: Instruction, condition: str) -> int:
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        # Otherwise take the loop for a scan, which counts from 0 up to the only constant in its condition.
        constants = [
            int(match[1])
            for instruction in self.computations[condition].values()
            if instruction.opcode == "constant" and (match := re.match(r"(\d+)\)", instruction.attributes))
        ]
        if len(constants) != 1:
            raise ValueError(f"The trip count of the loop {loop.name} is unknown.")
        return constants[0]

    def _add_collectives(
        self, costs: Costs, computation: dict[str, Instruction], instruction: Instruction, times: float
    ) -> None:
        """Adds an instruction of `computation` that is executed `times` times, if it is or holds a collective."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "fusion":
            fused = self._fused(instruction)
            # On TPUs, a reduce-scatter is a fusion of an all-reduce with the slice of it that each chip keeps.
            sliced = any(inner.opcode == "dynamic-slice" for inner in fused.values())
            for inner in fused.values():
                if sliced and inner.opcode == "all-reduce":
                    inner = replace(inner, opcode="reduce-scatter")
                self._add_collectives(costs, fused, inner, times)
        elif opcode in COLLECTIVES:
            operand_bytes = sum(array.bytes for name in instruction.operands for array in computation[name].arrays)
            result_bytes = sum(array.bytes for array in instruction.arrays)
            if opcode != instruction.opcode:  # the result of an asynchronous start also holds the operands
                result_bytes -= operand_bytes
            costs.collective_bytes[opcode] += times * max(operand_bytes, result_bytes)
            costs.collective_counts[opcode] += times

    def _fused(self, fusion: Instruction) -> dict[str, Instruction]:
        return self.computations[fusion.called("calls")[0]]

    def _flops(self, computation: dict[str, Instruction], instruction: Instruction) -> float:
        """FLOPs of one execution of an instruction of `computation`."""
        if instruction.opcode == "fusion":
            fused = self._fused(instruction)
            return sum(self._flops(fused, inner) for inner in fused.values())
        if instruction.opcode == "dot":
            left = computation[instruction.operands[0]].arrays[0].dims
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
            contracted = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
            return 2 * math.prod(instruction.arrays[0].dims) * contracted
        if instruction.opcode == "convolution":
            return _convolution_flops(computation, instruction)
        if instruction.opcode == "custom-call":  # a Pallas kernel's own cost estimate
            match = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
            return float(match[1]) if match else 0
        return 0

    def _hbm_bytes(self, computation: dict[str, Instruction], instruction: Instruction) -> float:
        """HBM traffic of one execution of an instruction of `computation`."""
        operands = [computation[name] for name in instruction.operands if name in computation]
        match instruction.opcode:
            case opcode if opcode in _FREE or opcode.endswith("-done"):
                return 0
            case "custom-call" if re.search(r'"(AllocateBuffer|ConcatBitcast|Assume\w+)"', instruction.attributes):
                return 0
            case "copy-start" | "slice-start":  # between HBM and VMEM, or within HBM
                return max((array.hbm_bytes for array in instruction.arrays[:2]), default=0)
            case "fusion":
                return _fusion_hbm_bytes(self._fused(instruction), instruction, operands)
            case "dynamic-slice":
                moved = (*instruction.arrays, *instruction.arrays)
            case "dynamic-update-slice":
                moved = (*operands[1].arrays, *operands[1].arrays)
            case _:
                moved = (*instruction.arrays, *(array for operand in operands for array in operand.arrays))
        return sum(array.hbm_bytes for array in moved)


def _fusion_hbm_bytes(fused: dict[str, Instruction], fusion: Instruction, operands: list[Instruction]) -> float:
    """HBM traffic of a fusion. If it slices an array or updates it in place, only the slice counts."""
    users = defaultdict(list)
    for instruction in fused.values():
        for position, name in enumerate(instruction.operands):
            users[name].append((instruction, position))
    parameters = {int(each.attributes.split(")")[0]): each for each in fused.values() if each.opcode == "parameter"}
    read = 0.0
    for number, operand in enumerate(operands):
        whole = sum(array.hbm_bytes for array in operand.arrays)
        if not whole or number not in parameters:
            continue
        parts = [_bytes_read(user, position) for user, position in users[parameters[number].name]]
        known = bool(parts) and None not in parts
        read += min(whole, sum(parts)) if known else whole
    updates = [instruction for instruction in fused.values() if instruction.opcode == "dynamic-update-slice"]
    written = sum(array.hbm_bytes for array in fusion.arrays)
    if updates and written:
        updated = sum(fused[update.operands[1]].arrays[0].bytes for update in updates)
        in_place = sum(update.arrays[0].bytes for update in updates)
        written = max(0.0, written - in_place) + updated
    return read + written


def _bytes_read(user: Instruction, position: int) -> float | None:
    """Bytes that an instruction reads of its operand at `position`, or None if it reads all of it."""
    if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
        return sum(array.bytes for array in user.arrays)
    if user.opcode == "dynamic-update-slice" and position == 0:
        return 0.0
    return None


def _convolution_flops(computation: dict[str, Instruction], convolution: Instruction) -> float:
    """FLOPs of a convolution, without multiplications by padding.

    They matter because libtpu turns a batched matmul into a convolution: the batch axis becomes a spatial axis with a
    dilated and padded window, most of which is padding.
    """
    left, right = (computation[name].arrays[0].dims for name in convolution.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    left_labels, right_labels, output_labels = labels.groups()
    output = dict(zip(output_labels, convolution.arrays[0].dims, strict=True))

    def window(key: str, axis: int, default: int) -> int:
        match = re.search(rf"\b{key}=([\dx_\-]+)", convolution.attributes)
        return int(match[1].split("x")[axis].split("_")[0]) if match else default  # of padding LOW_HIGH, the low one

    multiplications = 1
    for axis, label in enumerate(sorted(set(left_labels) - set("bf"))):  # spatial axes are labelled 0, 1 and so on
        size, stride, padding = window("size", axis, 1), window("stride", axis, 1), window("pad", axis, 0)
        left_dilation, right_dilation = window("lhs_dilate", axis, 1), window("rhs_dilate", axis, 1)
        dilated = (left[left_labels.index(label)] - 1) * left_dilation + 1
        inside = 0  # pairs of an output position and a window element at which there is an input element
        for position in range(output[label]):
            for element in range(size):
                index = position * stride - padding + element * right_dilation
                inside += 0 <= index < dilated and index % left_dilation == 0
        multiplications *= inside
    return 2 * multiplications * output["b"] * output["f"] * right[right_labels.index("i")]


def _parse_instruction(line: str) -> Instruction | None:
    """The instruction in a line `NAME = TYPE OPCODE(OPERANDS), ATTRIBUTES`, or None if there is none."""
    name, _, rest = line.strip().partition(" = ")
    result, rest = _split_parenthesis(rest) if rest.startswith("(") else rest.split(" ", 1)
    match = re.match(r"\s*([a-z][\w\-]*)\(", rest)
    if not match:
        return None
    operands, attributes = _split_parenthesis(rest[match.end() - 1 :])
    leaf = match[1] in ("constant", "parameter")  # their parentheses hold a value or a number instead of operands
    return Instruction(
        name=name.removeprefix("ROOT ").removeprefix("%"),
        opcode=match[1],
        arrays=tuple(
            Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(1)" in (layout or ""))
            for dtype, dims, layout in _SHAPE.findall(result)
        ),
        operands=() if leaf else tuple(_NAME.findall(operands)),
        attributes=operands[1:] + attributes if leaf else attributes,
    )


def _split_parenthesis(text: str) -> tuple[str, str]:
    """Splits `text`, which begins with a parenthesis, after the matching one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""
