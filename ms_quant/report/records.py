"""What a report knows, wherever it was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.report.parts import Sentence

FLOAT = "FLOAT"


@dataclass(frozen=True)
class Group:
    """A group of linears that read one input; or all such groups of a block's experts together.

    Attributes:
        path: its full path, with ``*`` for the numbers of experts.
        block: the block that it is in; None where there are none.
        kind: its name there, which groups of other blocks have, too.
        scheme: name of its scheme; ``"FLOAT"`` where it stays float.
        algorithm: names of its algorithms; "" where they are not known.
        count: how many groups it stands for.
        weights: how many weights it has.
        bytes: what is stored of its linears; None where it is not told apart.
        error: relative error of its outputs, of the worst of several; None where not measured.
        worst: path of the worst of several; its own else.
        chosen: what the algorithms chose; of several nothing.
        input: how large its input is, as ``ms_quant.json`` states it; of several nothing.
        first: full path of its first linear.
    """

    path: str
    block: int | None
    kind: str
    scheme: str
    algorithm: str = ""
    count: int = 1
    weights: int = 0
    bytes: int | None = None
    error: float | None = None
    worst: str = ""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    input: Mapping[str, Any] = field(default_factory=dict)
    first: str = ""

    @property
    def quantized(self) -> bool:
        """Whether it does not stay float."""
        return self.scheme != FLOAT


@dataclass(frozen=True)
class Further:
    """What another package says of a checkpoint of its own format.

    Attributes:
        schemes: path of a group to its scheme.
        bytes: path of a group to what is stored of it.
        sentences: for the summary.
        parts: sections of the page.
    """

    schemes: Mapping[str, str]
    bytes: Mapping[str, int]
    sentences: Sequence[Sentence] = ()
    parts: Sequence[Markup] = ()


@dataclass(frozen=True)
class Facts:
    """What a page shows of a checkpoint or a running job.

    Attributes:
        place: the checkpoint or the job.
        format: what to call it.
        model: family and number of blocks, in words.
        groups: what became of each group.
        record: the content of ``ms_quant.json`` or of the job; {} where others made it.
        output_bytes: bytes of its tensors; None of a job.
        float_bytes: those of what is in no group: embedding, head, norms.
        source_bytes: bytes of the model that it was made from; None where that is not known.
        cache: how keys and values are cached, in words.
        blocks: how many blocks there are; None where that is not known.
        finished: how many blocks are finished; None of what is finished whole.
        stored: gives what is stored of a weight, by the full path of its linear: a quantized
            linear, or an array of a type of its own; None where it is float.
        linears: paths of all linears of each group, by the path of the group.
        further: what another package says of it.
    """

    place: Path
    format: str
    model: str
    groups: Sequence[Group]
    record: Mapping[str, Any]
    output_bytes: int | None = None
    float_bytes: int = 0
    source_bytes: int | None = None
    cache: str = ""
    blocks: int | None = None
    finished: int | None = None
    stored: Callable[[str], QuantizedLinear | np.ndarray | None] | None = None
    linears: Mapping[str, Sequence[str]] = field(default_factory=dict)
    further: Further | None = None

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.place.absolute().name


@dataclass(frozen=True)
class FloatWeights:
    """The float model that a checkpoint is compared with.

    Attributes:
        place: its directory.
        bytes: of its tensors.
        weight: gives a float32 weight by the full path of its linear.
        same: whether it is, file by file, what the checkpoint's record says it was made from; None
            where that is not recorded.
    """

    place: Path
    bytes: int
    weight: Callable[[str], np.ndarray]
    same: bool | None = None
