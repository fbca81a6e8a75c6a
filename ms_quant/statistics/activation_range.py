"""How large activations get inside each block, against what float16 holds.

Weights that fit float16 say nothing of the activations: a residual stream of 190,000 is computed
without a word in float32 and bfloat16, and is inf, then NaN, in a runtime that computes in float16.
Calibration records the largest magnitude of every place of a block::

    {"largest": {"mlp.down_proj input": [41216.0, 133]}, "divided": {"mlp.up_proj": {"133": 2}}}

is a value and its channel, and the rows of ``up_proj`` that were divided by a power of two (of
the exponent) so that its consumers' inputs fit; their columns were multiplied by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.models.block_spec import BlockSpec, LinearGroup
from ms_quant.models.config import ModelConfig
from ms_quant.models.edge import Edge
from ms_quant.models.names import block_prefix

KEY = "activation_ranges"
LARGEST = float(np.finfo(np.float16).max)
MARGIN = LARGEST / 2
"""Above this a warning is given: other text than the calibration's may well double a maximum."""
MAX_EXPONENT = 40

Divided = dict[str, np.ndarray]
"""Path of a linear in its block to int32 (out,): row i is divided by 2 to the power of entry i."""


class Extreme(NamedTuple):
    """The largest magnitude of a place of a block."""

    block: int
    place: str
    value: float
    channel: int

    def __str__(self) -> str:
        return (
            f"{block_prefix(self.block)[:-1]}: {self.place} reaches {self.value:,.0f} in channel "
            f"{self.channel}"
        )


@dataclass
class BlockRanges:
    """The largest magnitude of each channel of every place of a block, over all batches.

    Attributes:
        index: the block.
        absmax: place to float32 (channels,).
    """

    index: int
    absmax: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, place: str, x: np.ndarray) -> None:
        """Adds a batch, float32 (..., channels).

        Raises:
            MsQuantError: a value is NaN or infinite.
        """
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        found = np.maximum(rows.max(axis=0), -rows.min(axis=0))
        if not np.isfinite(found).all():
            raise BadFileError(
                f"{block_prefix(self.index)[:-1]}: {place} holds NaN or infinite values in "
                "calibration, expected none"
            )
        if place in self.absmax:
            np.maximum(self.absmax[place], found, out=self.absmax[place])
        else:
            self.absmax[place] = found

    def merge(self, other: BlockRanges) -> None:
        """Adds what another part of the data has shown."""
        for place, absmax in other.absmax.items():
            self.add(place, absmax[None])

    def extremes(self) -> list[Extreme]:
        """The largest value of each place."""
        tops = {place: int(absmax.argmax()) for place, absmax in self.absmax.items()}
        return [
            Extreme(self.index, place, float(self.absmax[place][channel]), channel)
            for place, channel in tops.items()
        ]

    def check_float16(self) -> None:
        """Refuses a block that a runtime in float16 cannot compute.

        Raises:
            MsQuantError: names block, place, channel and value, of the first such place.
        """
        first = next((found for found in self.extremes() if found.value > LARGEST), None)
        if first is not None:
            raise BadFileError(
                f"{first} of the calibration data, expected at most {LARGEST:,.0f}, what float16 "
                "holds: a float16 runtime would compute inf, then NaN; this model needs a runtime "
                "that computes in bfloat16"
            )

    def facts(self, divided: Divided) -> dict[str, Any]:
        """The entry of a block in the record."""
        facts: dict[str, Any] = {
            "largest": {found.place: [found.value, found.channel] for found in self.extremes()}
        }
        if divided:
            facts["divided"] = {
                path: {str(row): int(exponents[row]) for row in np.flatnonzero(exponents)}
                for path, exponents in divided.items()
            }
        return facts

    def divisions(self, config: ModelConfig) -> Divided:
        """Rows of linears that must be divided so that what they make fits float16.

        Only a linear whose output reaches its consumers channel by channel is divided (``up_proj``,
        ``v_proj``): multiplying the consumers' columns by the same powers of two changes nothing
        else, not even a bit.
        """
        divided, block = {}, config.block(self.index)
        for edge in block.linear_edges:
            largest = self.rows(block, edge)
            if largest.max(initial=0) > LARGEST:
                with np.errstate(divide="ignore"):
                    exponents = np.ceil(np.log2(largest / MARGIN))
                divided[edge.producer] = np.where(largest > LARGEST, exponents, 0).astype(np.int32)
        return divided

    def rows(self, block: BlockSpec, edge: Edge) -> np.ndarray:
        """float32 (rows of the producer,): what dividing each row of it by something divides."""
        size = block.linears[edge.producer].out_features
        made = self._of(output_of(edge.producer), size)
        if edge.averaged:
            return edge.read(made)
        groups = [block.group(name) for name in edge.consumers]
        read = [self._of(input_of(group), group.in_features) for group in groups]
        return np.maximum.reduce([edge.read(made), *(edge.rows(one, 0) for one in read)])

    def _of(self, place: str, size: int) -> np.ndarray:
        """The largest magnitudes of a place; 0 where no token came, as at an expert."""
        return self.absmax.get(place, np.zeros(size, np.float32))

    def floor(self, block: BlockSpec, group: LinearGroup) -> np.ndarray:
        """float32 (in,): a smoothing vector that divides a group's input, and is below it
        anywhere, would bring that near the end of float16."""
        edge = block.producer_of(group)
        if edge is not None and not edge.norm:
            return edge.columns(self.rows(block, edge)) / np.float32(MARGIN)
        return self._of(input_of(group), group.in_features) / np.float32(MARGIN)


def input_of(group: LinearGroup) -> str:
    """The place that a group's linears read."""
    return f"{group.members[0]} input"


def output_of(path: str) -> str:
    """The place that a linear writes."""
    return f"{path} output"


def read_divided(entries: Any, config: ModelConfig, where: str) -> list[Divided]:
    """The divisions of each block.

    Args:
        entries: what :meth:`BlockRanges.facts` made for each block; None for none.
        config: the model's shape.
        where: what holds them, for errors.

    Raises:
        MsQuantError: an entry is no such division.
    """
    if entries is None:
        return [{} for _ in range(config.num_blocks)]
    if not isinstance(entries, Sequence) or len(entries) != config.num_blocks:
        raise BadFileError(f"{where} is {entries!r:.80}, expected an entry for each block")
    blocks = zip(entries, config.stored_blocks, strict=True)
    return [_divided(entry, block, f"{where}: {block.index}") for entry, block in blocks]


def _divided(entry: Any, block: BlockSpec, where: str) -> Divided:
    parts = entry.get("divided", {}) if isinstance(entry, Mapping) else None
    if not isinstance(parts, Mapping):
        raise BadFileError(f"{where} is {entry!r:.80}, expected what was measured")
    producers, found = {edge.producer for edge in block.linear_edges}, {}
    for path, rows in parts.items():
        place = f"{where}: divided: {path}"
        if path not in producers or not isinstance(rows, Mapping):
            raise BadFileError(f"{place} is {rows!r:.80}, expected rows of {sorted(producers)}")
        found[path] = _exponents(rows, block.linears[path].out_features, place)
    return found


def _exponents(rows: Mapping[str, Any], count: int, place: str) -> np.ndarray:
    exponents = np.zeros(count, np.int32)
    for row, exponent in rows.items():
        known = row.isascii() and row.isdecimal() and len(row) < 10 and int(row) < count
        if not known or type(exponent) is not int or not 0 < exponent <= MAX_EXPONENT:
            raise BadFileError(
                f"{place}: {row} is {exponent!r:.80}, expected an exponent of 1 to {MAX_EXPONENT} "
                f"by a row below {count}"
            )
        exponents[int(row)] = exponent
    return exponents


NOT_LOOKED_AT = (
    "not looked at: nothing was calibrated; ms-quant eval --float16 computes as a float16 runtime"
)


def float16_facts(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a record says of activations in float16.

    Args:
        record: the content of ``ms_quant.json``.
        where: that file, for errors.

    Returns:
        ``float16_range``, the largest activation in one line, or that none was looked at; and
        ``float16_warnings``, sentences about those that come near the end of float16, if any do.

    Raises:
        MsQuantError: an entry is malformed.
    """
    entries = record.get(KEY) or []
    if not isinstance(entries, list):
        raise BadFileError(f"{where}: {KEY} is {entries!r:.80}, expected an entry for each block")
    found = [
        extreme
        for index, entry in enumerate(entries)
        for extreme in _extremes(index, entry, f"{where}: {KEY}: {index}")
    ]
    worst = max(found, key=lambda extreme: extreme.value, default=None)
    if worst is None:
        return {"float16_range": NOT_LOOKED_AT}
    share = f"{worst}, {100 * worst.value / LARGEST:.2g} % of what float16 holds"
    warnings = [*_near(found, worst), *_divisions(entries)]
    return {"float16_range": share, **({"float16_warnings": warnings} if warnings else {})}


def _extremes(index: int, entry: Any, where: str) -> Iterator[Extreme]:
    largest = entry.get("largest") if isinstance(entry, Mapping) else None
    if not isinstance(largest, Mapping) or not isinstance(entry.get("divided", {}), Mapping):
        raise BadFileError(f"{where} is {entry!r:.80}, expected what was measured")
    for place, found in largest.items():
        if not isinstance(found, list) or list(map(type, found)) != [float, int]:
            raise BadFileError(f"{where}: {place} is {found!r:.80}, expected a value and a channel")
        yield Extreme(index, place, *found)


def _near(found: Sequence[Extreme], worst: Extreme) -> Iterator[str]:
    near = sum(extreme.value > MARGIN for extreme in found)
    if near:
        others = f" ({near - 1} more places are above half of it)" if near > 1 else ""
        yield (
            f"{worst} of the calibration data, float16 holds at most {LARGEST:,.0f}{others}: other "
            "text may overflow"
        )


def _divisions(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    paths = [
        f"{block_prefix(index)}{path}"
        for index, entry in enumerate(entries)
        for path in entry.get("divided", ())
    ]
    if paths:
        yield (
            f"rows of {len(paths)} linears, the first {paths[0]}, were divided by powers of two "
            "and the columns that read them multiplied, so that float16 holds what they make"
        )
