"""``best``: the algorithms that served each scheme best on real models, see docs/accuracy.md."""

from __future__ import annotations

from collections.abc import Sequence

from ms_quant.algorithms import PLAIN
from ms_quant.algorithms.quarot import QuaRot
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig

BEST = "best"
BEST_INCREASE = "1%"
"""Of perplexity, within which the command keeps static schemes that are asked for so."""
ROTATION = "quarot"
CHOSEN = {
    **dict.fromkeys(("W8A8", "W8A8_PER_CHANNEL", "W8A8_MIX"), "quarot+smoothquant"),
    "W8A8_DYNAMIC": "quarot",
    "W4A16": "clip+gptq",
}
"""Scheme to names; min-max of all others."""


def resolved(algorithm: str, schemes: Sequence[str], config: ModelConfig) -> str:
    """The algorithms that a name stands for: ``best`` for the first of some schemes with any.

    A model whose sizes no Hadamard matrix has is not rotated.
    """
    if algorithm != BEST:
        return algorithm
    names = next((CHOSEN[scheme] for scheme in schemes if scheme in CHOSEN), PLAIN).split("+")
    if ROTATION in names and not _rotates(config):
        names.remove(ROTATION)
    return "+".join(names) or PLAIN


def _rotates(config: ModelConfig) -> bool:
    try:
        QuaRot(config, 0)
    except MsQuantError:
        return False
    return True
