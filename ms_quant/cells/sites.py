"""Sites: the places in a network that can be replaced by something quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from mindspore import Tensor, nn

from ms_quant.cells.recorder import Recorder
from ms_quant.cells.tree import linears
from ms_quant.errors import BadArgumentError
from ms_quant.numerics.affine import check_finite

SCORES = "*q_proj", "*k_proj"
"""What the linears of queries and keys are called where nobody says it."""

Show = Callable[[str, Tensor], None]
"""Called with the name of a tap and the tensor that comes there."""


@dataclass(frozen=True)
class Site:
    """A place in a network that can be replaced: today a linear.

    What is observed there are its taps. A linear has one, its input, which is called by the
    linear's own path; an attention would have ``PATH.q``, ``PATH.k`` and ``PATH.v``. Taps that see
    the same tensor are one group.

    Attributes:
        path: of the Cell.
        cell: the float Cell that is there.
        taps: name of each tap, unlike any other of the network, to its channels.
        scores: whether its outputs are multiplied into attention scores: queries or keys.
        watch: gives the Cell that stands in this one's place while the network is observed: it
            shows each tap's tensor and computes the same.
    """

    path: str
    cell: nn.Cell
    taps: Mapping[str, int]
    scores: bool
    watch: Callable[[Show], nn.Cell]


def linear_site(path: str, cell: nn.Cell, scores: bool = False) -> Site:
    """The site of a linear."""

    def watch(show: Show) -> nn.Cell:
        return Recorder(cell, lambda x: show(path, x))

    return Site(path, cell, {path: int(cell.weight.shape[1])}, scores, watch)


def sites(
    network: nn.Cell,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    scores: Sequence[str] = SCORES,
) -> dict[str, Site]:
    """The chosen sites of a network by path, in definition order.

    Args:
        network: it.
        include, exclude: patterns of those that are chosen and of those that are not.
        scores: patterns of linears whose outputs are multiplied into attention scores. Nothing
            need be called as the default says.

    Raises:
        MsQuantError: there are none, or a pattern matches nothing.
    """
    cells = dict(linears(network))
    if not cells:
        raise BadArgumentError(f"{network.cls_name}: holds no Dense or Linear, nothing to quantize")
    chosen = select(cells, include, exclude)
    _refuse_unmatched(cells, () if tuple(scores) == SCORES else scores)
    return {path: linear_site(path, cells[path], _is_of(path, scores)) for path in chosen}


def select(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The names that an include pattern matches and no exclude pattern does.

    Raises:
        MsQuantError: a pattern matches nothing.
    """
    names = list(names)
    _refuse_unmatched(names, (*include, *exclude))
    return [name for name in names if _is_of(name, include) and not _is_of(name, exclude)]


def _is_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unmatched(names: Iterable[str], patterns: Sequence[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:4])
            raise BadArgumentError(
                f"pattern {pattern!r} matches no linear, expected one of: {shown}, ..."
            )


def weight_and_bias(site: Site) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 (out, in) weight and (out,) bias of a linear.

    Raises:
        MsQuantError: the Cell has an activation inside, or a value is NaN or inf.
    """
    if getattr(site.cell, "activation", None) is not None:
        raise BadArgumentError(
            f"{site.path}: a Dense with a built-in activation cannot be replaced, expected "
            "activation=None with the activation as a Cell of its own"
        )
    bias = getattr(site.cell, "bias", None)
    weight = site.cell.weight.asnumpy().astype(np.float32)
    check_finite(weight, f"{site.path}.weight")
    if bias is None:
        return weight, None
    bias = bias.asnumpy().astype(np.float32)
    check_finite(bias, f"{site.path}.bias")
    return weight, bias
