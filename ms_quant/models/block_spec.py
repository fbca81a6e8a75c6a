"""What one block of a decoder is made of: the only thing that the rest of the house asks about an
architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ms_quant.models.families import LinearGroup


@dataclass(frozen=True)
class LinearSpec:
    """A linear.

    Attributes:
        out_features: rows of its weight.
        in_features: columns of its weight.
        bias: whether it has one.
    """

    out_features: int
    in_features: int
    bias: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.out_features, self.in_features

    @property
    def size(self) -> int:
        """How many weights there are."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class BlockSpec:
    """One block. Blocks of one model may differ.

    Attributes:
        index: which block it is.
        linears: path in the block to linear, in the order of the model.
        groups: the linears that can be quantized, by the input that they read.
        tensors: every tensor, by its name in the block, to its shape, in the order of the model.
    """

    index: int
    linears: Mapping[str, LinearSpec]
    groups: tuple[LinearGroup, ...]
    tensors: Mapping[str, tuple[int, ...]]

    @cached_property
    def _group_of(self) -> dict[str, LinearGroup]:
        return {member: group for group in self.groups for member in group.members}

    def group_of(self, member: str) -> LinearGroup | None:
        """The group of a linear, by its path in the block."""
        return self._group_of.get(member)

    def in_features(self, group: LinearGroup) -> int:
        """How many inputs the linears of a group have."""
        return self.linears[group.members[0]].in_features

    @property
    def loose_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors that belong to no linear: norms."""
        return {
            name: shape
            for name, shape in self.tensors.items()
            if name.rpartition(".")[0] not in self.linears
        }

    @property
    def size(self) -> int:
        """How many weights the linears have."""
        return sum(linear.size for linear in self.linears.values())
