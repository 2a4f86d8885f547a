"""What the training software does that a plan does not decide, so that costs can follow it.

The default is this project's own runtime. Others stand for software whose published runs are held
against the cost models: the same plan takes another time and other bytes where gradients are kept
in float32, or where nothing is reduced before the last backward has ended.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Bytes are per element of a trainable parameter; ``None`` means: as the parameter has.

    Attributes:
        name: of the software, for people.
        gradient_bytes: of a gradient as it is accumulated over micro-batches.
        gradient_passes: how often an update goes over the gradients: 1, or 3 where they are read
            for their norm, too, and zeroed.
        reduced_bytes: of a gradient on its way over data-parallel links.
        reduces_whole: gradients are all-reduced even where every rank updates only its shard.
        gathered_bytes: of a parameter on its way over data-parallel links.
        master_bytes: of a copy of the parameter in higher precision that the optimizer updates.
        state_bytes: of each tensor that the optimizer keeps per parameter.
        overlaps_reduction: gradients are reduced beside backward, rather than after it.
        overlaps_gathering: sharded parameters are gathered ahead of their use.
        copies_gradients: whole gradients are copied into buckets to be reduced.
        gathers_each: every parameter is gathered and reduced by a collective of its own, rather
            than all of a layer by one.
        fuses_pointwise: neighbouring elementwise ops run as one kernel, as compilers and
            hand-written kernels have it.
        float8_products: linear layers within layers multiply in 8 bits.
        graphs: kernels are replayed, so the host's launches never hold the device up.
        regathers: what ranks gather as a product's operand is kept in parts and gathered again in
            backward, beside the product that does not need it (Korthikanti et al. 2022, section
            4.2.2).
        fuses_accumulation: the products that make gradients of weights add to what was accumulated,
            rather than a kernel of its own.
        ends_together: all ranks end a step together, as where each of them returns its loss; else
            those of a zero-bubble schedule go on to the next at their own time.
        checkpoints_regions: named ops are recomputed as a region of their own, around which
            autograd saves what it always does; else the whole layer is recomputed, but for the
            results of the other ops.
    """

    name: str = "autoshard"
    gradient_bytes: int | None = None
    gradient_passes: int = 1
    reduced_bytes: int | None = None
    reduces_whole: bool = False
    gathered_bytes: int | None = None
    master_bytes: int = 0
    state_bytes: int | None = None
    overlaps_reduction: bool = True
    overlaps_gathering: bool = True
    copies_gradients: bool = True
    gathers_each: bool = False
    fuses_pointwise: bool = False
    float8_products: bool = False
    graphs: bool = False
    regathers: bool = False
    fuses_accumulation: bool = False
    ends_together: bool = True
    checkpoints_regions: bool = False

    def update_bytes(self, element_bytes: float, states: int) -> float:
        """What an optimizer's update moves per element of a parameter.

        The copy in higher precision and the optimizer's states are read and written, and so is the
        parameter, which is only written where it is such a copy's shadow.

        Args:
            element_bytes: of the parameter; the mean, of several.
            states: tensors that the optimizer keeps per parameter.
        """
        moved = self.gradient_passes * (self.gradient_bytes or element_bytes)
        moved += 2 * self.master_bytes + 2 * states * (self.state_bytes or element_bytes)
        return moved + (element_bytes if self.master_bytes else 2 * element_bytes)


OWN = Software()
"""This project's runtime."""
