"""Peak rates and memory of accelerators, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      flops: peak FLOP/s of dense bfloat16 matmuls (float16 on a V100).
      memory: bytes.
      bandwidth: bytes/s between the chip and its memory (HBM).
      links: bytes/s that the chip can send over all its ICI or NVLink links, within a slice or a machine.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float


_GIB, _TERA, _GIGA = 2**30, 1e12, 1e9
# By `device.device_kind` in JAX.
CHIPS = {
    "TPU v4": Chip(275 * _TERA, 32 * _GIB, 1228 * _GIGA, 300 * _GIGA),
    "TPU v5 lite": Chip(197 * _TERA, 16 * _GIB, 819 * _GIGA, 200 * _GIGA),
    "TPU v5": Chip(459 * _TERA, 95 * _GIB, 2765 * _GIGA, 600 * _GIGA),
    "TPU v6 lite": Chip(918 * _TERA, 32 * _GIB, 1640 * _GIGA, 448 * _GIGA),
    "NVIDIA H200": Chip(989 * _TERA, 141 * _GIGA, 4800 * _GIGA, 450 * _GIGA),
    "NVIDIA H100 80GB HBM3": Chip(989 * _TERA, 80 * _GIGA, 3350 * _GIGA, 450 * _GIGA),
    "NVIDIA A100-SXM4-80GB": Chip(312 * _TERA, 80 * _GIGA, 2039 * _GIGA, 300 * _GIGA),
    "Tesla V100-SXM2-16GB": Chip(125 * _TERA, 16 * _GIGA, 900 * _GIGA, 150 * _GIGA),
}
SLICE_NETWORK = 12.5 * _GIGA  # bytes/s per host between slices: a network card of 100 Gbit/s
