"""The tensors of a proven rank in the form that a model's parameters have.

On the device with the UNZIP unit the parameters are the stored tensors. Elsewhere a compressed
linear is a plain W8A8 one of golden-stick: its weight decoded, its ``deq_scale`` float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from ms_quant.formats.golden_stick.format import FLOAT32
from ms_quant.models.names import block_prefix
from sparse_compress.codec import CORES
from sparse_compress.layouts import EMBEDDING, HEAD, Layout
from sparse_compress.layouts.coding import PARAMETERS
from sparse_compress.layouts.partition import fused_shape
from sparse_compress.ranks.pack import deq_floats
from sparse_compress.ranks.tensors import RankTensors, decode_weight
from sparse_compress.serve.rank import Rank

Kind = tuple[str, tuple[int, ...]]
"""Type, by the name that NumPy has for it, and shape."""


@dataclass(frozen=True)
class Parameter:
    """A tensor as a model takes it.

    Attributes:
        kind: its type and shape.
        make: reads it, or makes it of what is stored.
    """

    kind: Kind
    make: Callable[[], np.ndarray]


def rank_parameters(
    rank: Rank, decoded: bool, head: bool = False, workers: int = CORES
) -> dict[str, Parameter]:
    """Every tensor of a rank by the name of its parameter.

    Args:
        rank: the rank, proven.
        decoded: whether compressed linears are decoded.
        head: whether the model has a parameter of its own for a tied head.
        workers: how many threads decode a weight.
    """
    tensors, result = rank.tensors, dict[str, Parameter]()
    for name in rank.layout.tensors():
        info = tensors.info(name)
        result[name] = Parameter((info.dtype.name, info.shape), partial(tensors.read, name))
    for group, fused in rank.compressed() if decoded else ():
        shape = fused_shape(group, rank.layout.tp)
        weight = partial(decode_weight, rank.layout, tensors, fused, group, workers)
        result[f"{fused}.weight"] = Parameter(("int8", shape), weight)
        scale = f"{fused}.deq_scale"
        result[scale] = Parameter((FLOAT32.name, shape[:1]), partial(_scales, tensors, scale))
        del result[f"{fused}.index"]
    if head and rank.layout.config.tied and HEAD not in result:
        result[HEAD] = result[EMBEDDING]
    return result


def _scales(tensors: RankTensors, name: str) -> np.ndarray:
    return deq_floats(tensors.read(name), name)


def kind_problems(
    rank: Rank, ours: Mapping[str, Parameter], theirs: Mapping[str, Kind]
) -> Iterator[str]:
    """Where a rank's tensors and a model's parameters are not the same, one line each.

    Args:
        rank: the rank.
        ours: its tensors.
        theirs: the model's parameters by name.
    """
    for name, kind in theirs.items():
        if name not in ours:
            yield (
                f"{rank.name}: tensor {name!r} is missing, expected {_text(kind)} as the model has"
            )
        elif ours[name].kind != kind:
            yield (
                f"{rank.name}: tensor {name!r} is {_text(ours[name].kind)}, expected {_text(kind)} "
                "as the model has"
            )
    for name, parameter in ours.items():
        if name not in theirs:
            yield (
                f"{rank.name}: tensor {name!r} is {_text(parameter.kind)}, which the model has no "
                "parameter for"
            )


def _text(kind: Kind) -> str:
    return f"{kind[0]} {list(kind[1])}"


def flat_description(layout: Layout) -> dict[str, str]:
    """The description of the decoded checkpoint, as golden-stick has it for plain W8A8.

    Returns:
        Tensor name, as Hugging Face has it, to ``W8A8`` or ``FLOAT``.
    """
    quantized = {
        f"{block_prefix(index)}{member}"
        for index, group, fused in layout.linears()
        if fused in layout.compressed
        for member in group.members
    }
    result = {}
    for name in layout.config.parameter_shapes():
        path, _, suffix = name.rpartition(".")
        kind = "W8A8" if path in quantized else "FLOAT"
        suffixes = (
            ("weight", *PARAMETERS) if path in quantized and suffix == "weight" else (suffix,)
        )
        result.update({f"{path}.{each}": kind for each in suffixes})
    return result
