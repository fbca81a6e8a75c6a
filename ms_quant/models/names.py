"""Names of blocks, groups and linears: the only place that makes and parses text paths."""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = "model.layers."
_BLOCK = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_EXPERT = re.compile(r"(.+\.experts)\.(0|[1-9][0-9]{0,8})\.([^.]+)", re.DOTALL)

_OF_EXPERT = re.compile(r"(?:.+\.)?experts\.(0|[1-9][0-9]{0,8})\.", re.DOTALL)


class LinearId(NamedTuple):
    """A linear of a decoder.

    Attributes:
        block: the block that it is in.
        member: its path in the block, without the expert's number: ``"self_attn.q_proj"`` or
            ``"mlp.experts.gate_proj"``.
        expert: the number of the expert that it is of, or None.

    Examples:
        >>> str(LinearId(3, "mlp.experts.gate_proj", 17))
        'model.layers.3.mlp.experts.17.gate_proj'
        >>> parse_linear("model.layers.3.mlp.experts.17.gate_proj").expert
        17
    """

    block: int
    member: str
    expert: int | None = None

    @property
    def inner(self) -> str:
        """The path in the block, with the expert's number."""
        if self.expert is None:
            return self.member
        module, _, name = self.member.rpartition(".")
        return f"{module}.{self.expert}.{name}"

    def __str__(self) -> str:
        return f"{block_prefix(self.block)}{self.inner}"


class GroupId(NamedTuple):
    """A group of linears that read one input: ``model.layers.0.qkv``."""

    block: int
    name: str

    def __str__(self) -> str:
        return f"{block_prefix(self.block)}{self.name}"


def block_name(index: int) -> str:
    """The path of a block."""
    return f"{PREFIX}{index}"


def block_prefix(index: int) -> str:
    """What the names of all tensors of a block begin with."""
    return f"{PREFIX}{index}."


def in_block(name: str) -> tuple[int, str] | None:
    """The block of a tensor or a module and its name there; None for what is in no block."""
    found = _BLOCK.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def expert_of(path: str) -> int | None:
    """The expert that a linear, a group or a tensor of a block is of, by its path there; None for
    what is of no expert."""
    found = _OF_EXPERT.match(path)
    return int(found[1]) if found else None


def expert_path(module: str, expert: int) -> str:
    """The path of an expert in its block: ``"mlp.experts.17"``."""
    return f"{module}.{expert}"


def linear_id(block: int, inner: str) -> LinearId:
    """The linear of a block at a path in it."""
    found = _EXPERT.fullmatch(inner)
    if found:
        return LinearId(block, f"{found[1]}.{found[3]}", int(found[2]))
    return LinearId(block, inner)


def parse_linear(path: str) -> LinearId:
    """The linear at a full path.

    Raises:
        ValueError: the path is in no block.
    """
    found = in_block(path)
    if found is None:
        raise ValueError(f"{path!r} is in no block")
    return linear_id(*found)


def short_name(path: str) -> str:
    """A path without what all of them begin with, for tables."""
    return path.removeprefix(PREFIX)
