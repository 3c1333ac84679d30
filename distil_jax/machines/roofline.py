"""A lower bound on the time of a step: the longest of its compute, memory and communication times at peak rates."""

from __future__ import annotations

from dataclasses import dataclass

from distil_jax.machines.aot import Compiled
from distil_jax.machines.chips import CHIPS, SLICE_NETWORK, Chip

ASSUMPTIONS = (
    "The real train step was compiled by libtpu for the topology. Nothing was run.",
    "FLOPs, HBM traffic and collectives are counted in the compiled program, and those in loops once per iteration. "
    "Only the FLOPs of matrix products count.",
    "HBM traffic is what each fusion reads from HBM and writes to it. What the compiler keeps in VMEM is free.",
    "Peak rates are those of the data sheets: bfloat16 matrix products, HBM, links between chips. An all-reduce moves "
    "its bytes twice, any other collective once.",
    f"Slices exchange only gradients, over a network of {SLICE_NETWORK * 8 / 1e9:.0f} Gbit/s per host.",
    "The time of a step is the longest of these times, as if they overlapped perfectly. This is a lower bound, not a "
    "prediction. Input, evaluation and checkpoints are not included.",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds that each resource of the machine needs for one step at its peak rate."""

    compute: float
    memory: float  # HBM
    links: float  # within a slice
    network: float  # between slices

    @property
    def seconds(self) -> float:
        """The lower bound on the time of a step."""
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def bottleneck(self) -> str:
        """The resource that needs the most time."""
        seconds = {"compute": self.compute, "HBM": self.memory, "links": self.links, "network": self.network}
        return max(seconds, key=seconds.get)


def roofline(compiled: Compiled, slices: int) -> Roofline:
    """The roofline of a compiled step on the chips it was compiled for.

    Args:
      compiled: a step that fits.
      slices: number of slices.
    """
    chip = chip_of(compiled)
    link_bytes = sum((2 if kind == "all-reduce" else 1) * size for kind, size in compiled.collective_bytes.items())
    # Gradients are first reduced within each slice. Then each chip all-reduces an equal part of them with the chips at
    # the same place in the other slices.
    part = compiled.student * slices / compiled.chips
    network_bytes = 2 * part * (slices - 1) / slices * compiled.chips / compiled.hosts  # per host
    return Roofline(
        compute=compiled.flops / chip.flops,
        memory=compiled.hbm_bytes / chip.bandwidth,
        links=link_bytes / chip.links,
        network=network_bytes / SLICE_NETWORK,
    )


def chip_of(compiled: Compiled) -> Chip:
    """The data sheet of the chips that the step was compiled for."""
    return CHIPS[compiled.kind]
