"""How fast a step can be at best: each limit of the machine on its own; the slowest is the roof."""

from __future__ import annotations

from dataclasses import dataclass

from distil_jax.machines.aot import Compiled
from distil_jax.machines.chips import BETWEEN_SLICES, CHIPS, Chip

ASSUMPTIONS = (
    "The step is the real one, compiled by libtpu for that topology; nothing was run.",
    "FLOPs, traffic and exchanges are counted in the compiled text, loops as often as they run. FLOPs are those of "
    "matrix products.",
    "Traffic is what every fusion reads and writes in HBM; what the compiler keeps in the chip's own memory is free.",
    "Peaks are the makers': products in bfloat16, HBM, links between chips. An all-reduce moves its bytes twice, any "
    "other exchange once.",
    f"Slices meet over {BETWEEN_SLICES * 8 / 1e9:.0f} Gbit/s a host, and exchange the gradients alone.",
    "The step is as long as the slowest of these, as if everything overlapped: a bound that no run beats, not a "
    "promise. Input, evaluation and checkpoints are left out.",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step, each as if it were the only limit."""

    products: float
    memory: float
    links: float
    network: float

    @property
    def seconds(self) -> float:
        """The roof."""
        return max(self.products, self.memory, self.links, self.network)

    @property
    def roof(self) -> str:
        """Its name."""
        named = {"products": self.products, "HBM": self.memory, "links": self.links, "network": self.network}
        return max(named, key=named.get)


def roofline(compiled: Compiled, slices: int) -> Roofline:
    """The roofline of a compiled step on the chips it was compiled for."""
    chip = chip_of(compiled)
    moved = sum((2 if kind == "all-reduce" else 1) * each for kind, each in compiled.exchanged.items())
    # A slice reduces its gradients first; each of its chips then meets its like with an equal part of them.
    part = compiled.student * slices / compiled.chips
    across = 2 * part * (slices - 1) / slices * compiled.chips / compiled.hosts
    return Roofline(
        products=compiled.flops / chip.flops,
        memory=compiled.hbm_bytes / chip.bandwidth,
        links=moved / chip.links,
        network=across / BETWEEN_SLICES,
    )


def chip_of(compiled: Compiled) -> Chip:
    """The data sheet of the chips."""
    return CHIPS[compiled.kind]
