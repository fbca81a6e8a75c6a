"""What one block of a decoder is made of: the only thing that the rest of the house asks about an
architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from ms_quant.models.edge import Edge
from ms_quant.models.rotary_rows import RotaryRows

if TYPE_CHECKING:
    from typing import Self

    from ms_quant.budget import Budget
    from ms_quant.models.block_forward import Positions
    from ms_quant.models.cache import AnyCache

Parallel = Literal["column", "row", "replicated"]
Part = Literal["attention", "dense", "shared", "experts"]
"""What a linear is for: attention, an MLP, one beside routed experts, or routed experts."""


@dataclass(frozen=True)
class Division:
    """How a linear is divided over tensor-parallel ranks.

    Attributes:
        parallel: ``"column"`` (outputs are split over ranks), ``"row"`` (inputs are split) or
            ``"replicated"`` (every rank has all of it).
        unit: what is never cut, as the config counts it: ``"num_attention_heads"``.
        units: how many of them there are.
        copied: whether units that are fewer than the ranks are held by several ranks each.
        parts: how many linears are one in it; each is divided by itself.
    """

    parallel: Parallel
    unit: str = ""
    units: int = 1
    copied: bool = False
    parts: int = 1


REPLICATED = Division("replicated")


@dataclass(frozen=True)
class LinearSpec:
    """A linear.

    Attributes:
        out_features: rows of its weight.
        in_features: columns of its weight.
        bias: whether it has one.
        division: how it is divided over ranks.
        reads_stream: whether its input is the residual stream behind a norm; or its rows, of an
            embedding, are that of tokens.
        writes_stream: whether its output is added to the residual stream.
        heads_axis: the axis of its weight along the values of all attention heads: 0 (rows), -1
            (columns) or None.
        scores: whether attention scores are products of its outputs: queries or keys.
        norms: paths of norms whose outputs, in turn, are its inputs, where no edge says so.
        rotary_rows: its rows that make rotary pairs of neighbours; None where halves make them.
    """

    out_features: int
    in_features: int
    bias: bool = False
    division: Division = REPLICATED
    reads_stream: bool = False
    writes_stream: bool = False
    heads_axis: Literal[0, -1] | None = None
    scores: bool = False
    norms: tuple[str, ...] = ()
    rotary_rows: RotaryRows | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.out_features, self.in_features

    @property
    def size(self) -> int:
        """How many weights there are."""
        return self.out_features * self.in_features

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Suffix to shape."""
        bias: dict[str, tuple[int, ...]] = {"bias": (self.out_features,)} if self.bias else {}
        return {"weight": self.shape, **bias}


@dataclass(frozen=True)
class NormSpec:
    """An RMS norm.

    Attributes:
        size: of its gain.
        reads_stream: whether it normalises the residual stream.
        eps: what is added to the mean square; None is the config's ``rms_norm_eps``.
        made_by: path of a linear whose first outputs it alone reads, and normalises.
        behind: full path of the norm whose output it normalises.
        writes_stream: whether its output is added to the residual stream.
    """

    size: int
    reads_stream: bool = True
    eps: float | None = None
    made_by: str = ""
    behind: str = ""
    writes_stream: bool = False

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Suffix to shape."""
        return {"weight": (self.size,)}


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that read the same input, and so share activation parameters.

    Attributes:
        name: its name in the block: ``"qkv"``, ``"experts.3.gate_up"``.
        kind: what recipes call it, in whatever module it is: ``"gate_up"``.
        linears: path in the block to linear.
        fused: path of the single linear that serving runtimes fuse them into.
        part: what it is for.
    """

    name: str
    kind: str
    linears: Mapping[str, LinearSpec] = field(hash=False)
    fused: str
    part: Part = "dense"

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Paths of the linears, relative to the block."""
        return tuple(self.linears)

    @cached_property
    def first(self) -> LinearSpec:
        """The first linear. Inputs and division are the same for all."""
        return self.linears[self.members[0]]

    @property
    def routed(self) -> bool:
        """Whether it sees only the tokens that a router sends to it."""
        return self.part == "experts"

    @property
    def in_features(self) -> int:
        """How many inputs its linears have."""
        return self.first.in_features

    @property
    def bias(self) -> bool:
        """Whether its linears have a bias."""
        return self.first.bias

    @property
    def parallel(self) -> Parallel:
        """How its linears are divided over ranks."""
        return self.first.division.parallel

    def only(self, member: str) -> LinearGroup:
        """One linear of it, as a runtime has it that fuses nothing."""
        return replace(self, linears={member: self.linears[member]}, fused=member)


@dataclass(frozen=True)
class CacheSpec:
    """A tensor of attention that is in int8 with a cache of static scales.

    Attributes:
        tap: what shows it, (B, heads, S, D).
        scales: how many it has: one for each channel of all heads, or one for each head.
        heads: whether each head has one, of all its channels.
        outside: in the vendor's ranges of heads one in so many values of a window may lie outside;
            0 for none.
    """

    tap: str
    scales: int
    heads: bool = False
    outside: int = 0


class Operators(Protocol):
    """What a branch computes with: the block's norms and linears, and who looks on.

    Attributes:
        budget: what bounds its memory.
    """

    budget: Budget

    def norm(self, path: str, x: np.ndarray) -> np.ndarray:
        """The norm at a path, float32 of the same shape."""

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        """The linear at a path, float32 (rows, out) of (..., in)."""

    def parameter(self, name: str) -> np.ndarray:
        """A float32 tensor of the block by its name there, such as a router's bias."""

    def between(self, place: str, x: np.ndarray) -> np.ndarray:
        """A tensor between two operators, as it is stored there."""

    def shows(self, tap: str) -> bool:
        """Whether anybody looks at a tap."""

    def show(self, tap: str, x: np.ndarray) -> None:
        """Shows what a tap names."""


class Branch(ABC):
    """A residual branch of a block, x + outer(inner(norm(x))): its parts and what it computes.

    Attributes:
        title: what the branch is called: ``"attention"``.
        modules: path in the block to norm or linear, in the order of the model.
        groups: the linears that can be quantized, by the input that they read.
        edges: what makes the inputs of its linears.
        last: paths of the linears that ``outer`` computes.
        taps: what ``show`` is called with.
        cached: what is in int8 with a cache of static scales, by the path of the linear that makes
            it, or of what holds its scales.
        rotary: whether it has a rotary embedding.
    """

    title: ClassVar[str]
    modules: Mapping[str, LinearSpec | NormSpec]
    groups: tuple[LinearGroup, ...]
    edges: tuple[Edge, ...]
    last: tuple[str, ...]
    taps: tuple[str, ...] = ()
    cached: Mapping[str, CacheSpec] = MappingProxyType({})
    rotary: bool = False

    @abstractmethod
    def inner(self, ops: Operators, x: np.ndarray, at: Positions, cache: AnyCache | None) -> Any:
        """What the linears of ``last`` read.

        Args:
            ops: the block.
            x: float32 (B, S, hidden).
            at: the positions of the S tokens.
            cache: what is cached of the tokens before, to which theirs is added.
        """

    @abstractmethod
    def outer(self, ops: Operators, inner: Any) -> np.ndarray:
        """What is added to the stream, float32 (rows, hidden), which the caller may change."""


BEFORE, AFTER = "hidden states", "output"


@dataclass(frozen=True)
class BlockSpec:
    """One block. Blocks of one model may differ.

    Attributes:
        index: which block it is.
        branches: its residual branches, in order.
        modules: path in the block to norm or linear, in the order of the model.
    """

    index: int
    branches: tuple[Branch, ...]
    modules: Mapping[str, LinearSpec | NormSpec]

    @classmethod
    def of(
        cls,
        index: int,
        branches: Sequence[Branch],
        around: Mapping[str, LinearSpec | NormSpec] = MappingProxyType({}),
    ) -> Self:
        """The block of some branches, and what is around them. The first norm comes first in
        checkpoints, then all linears, then the other norms."""
        modules = {path: spec for branch in branches for path, spec in branch.modules.items()}
        modules |= around
        ranks = {path: isinstance(spec, NormSpec) for path, spec in modules.items()}
        first = next((path for path, is_norm in ranks.items() if is_norm), "")
        order = sorted(modules, key=lambda path: path != first and 1 + ranks[path])
        return cls(index, tuple(branches), {path: modules[path] for path in order})

    @cached_property
    def linears(self) -> dict[str, LinearSpec]:
        """Path in the block to linear, in the order of the model."""
        return {p: spec for p, spec in self.modules.items() if isinstance(spec, LinearSpec)}

    @cached_property
    def norms(self) -> dict[str, NormSpec]:
        """Path in the block to norm."""
        return {p: spec for p, spec in self.modules.items() if isinstance(spec, NormSpec)}

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor, by its name in the block, to its shape, in the order of the model."""
        return {
            f"{path}.{suffix}": shape
            for path, spec in self.modules.items()
            for suffix, shape in spec.tensors.items()
        }

    @cached_property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linears that can be quantized, by the input that they read."""
        return tuple(group for branch in self.branches for group in branch.groups)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """What makes the inputs of linears."""
        return tuple(edge for branch in self.branches for edge in branch.edges)

    @property
    def linear_edges(self) -> Iterable[Edge]:
        """The edges from one linear to others."""
        return (edge for edge in self.edges if not edge.norm)

    @cached_property
    def cached(self) -> dict[str, CacheSpec]:
        """What is in int8 with a cache of static scales, keys before values, by the path of the
        linear that makes it, or of what holds its scales."""
        return {path: one for branch in self.branches for path, one in branch.cached.items()}

    @cached_property
    def taps(self) -> tuple[str, ...]:
        """What a forward shows beside the outputs of norms and linears."""
        return tuple(tap for branch in self.branches for tap in branch.taps)

    @cached_property
    def rotary(self) -> bool:
        """Whether there is a rotary embedding."""
        return any(branch.rotary for branch in self.branches)

    @cached_property
    def hidden(self) -> tuple[str, ...]:
        """What the residual stream is called before, between and after the branches."""
        between = (f"{BEFORE} after {branch.title}" for branch in self.branches[:-1])
        return BEFORE, *between, AFTER

    @cached_property
    def _groups(self) -> dict[str, LinearGroup]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _group_of(self) -> dict[str, LinearGroup]:
        return {member: group for group in self.groups for member in group.members}

    @cached_property
    def _edge_of(self) -> dict[str, Edge]:
        names = ((path, edge) for edge in self.edges for path in edge.floats)
        members = (
            (member, edge)
            for edge in self.edges
            for name in edge.consumers
            for member in self._groups[name].members
        )
        return {**dict(names), **dict(members)}

    def group(self, name: str) -> LinearGroup:
        """The group of a name."""
        return self._groups[name]

    def group_of(self, member: str) -> LinearGroup | None:
        """The group of a linear, by its path in the block; None for one that stays float."""
        return self._group_of.get(member)

    def edge_of(self, member: str) -> Edge | None:
        """What makes the input of a linear, by its path in the block."""
        return self._edge_of.get(member)

    def producer_of(self, group: LinearGroup) -> Edge | None:
        """What makes the input of a group."""
        return self._edge_of.get(group.members[0])

    def readers(self, edge: Edge) -> list[str]:
        """Paths of all linears that read an edge."""
        groups = (self._groups[name] for name in edge.consumers)
        return [*(member for group in groups for member in group.members), *edge.floats]

    def branch_of(self, group: LinearGroup) -> int:
        """Which branch a group is in."""
        path = group.members[0]
        return next(i for i, branch in enumerate(self.branches) if path in branch.modules)

    @property
    def loose_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors that belong to no group: of norms and of linears that stay float."""
        return {
            name: shape
            for name, shape in self.tensors.items()
            if name.rpartition(".")[0] not in self._group_of
        }

    @cached_property
    def size(self) -> int:
        """How many weights the linears have."""
        return sum(linear.size for linear in self.linears.values())

    @cached_property
    def routed_size(self) -> int:
        """How many of them are of routed experts."""
        return sum(
            linear.size
            for group in self.groups
            if group.routed
            for linear in group.linears.values()
        )
