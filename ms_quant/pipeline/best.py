"""``best``: the algorithms that served each scheme best on real models, see docs/accuracy.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ms_quant.algorithms import PLAIN
from ms_quant.algorithms.quarot import QuaRot
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.parts import FLOAT, ByPart, by_part

BEST = "best"
BEST_INCREASE = "1%"
"""Of perplexity, within which the command keeps static schemes that are asked for so."""
ROTATION = "quarot"
_ROTATED = {"algorithm": "quarot+smoothquant", "smoothquant.only": "*down_proj"}
CHOSEN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("W8A8", "W8A8_PER_CHANNEL", "W8A8_MIX"), _ROTATED),
    "W8A8_DYNAMIC": {"algorithm": "quarot"},
    "W4A16": {"algorithm": "clip+gptq"},
}
"""Scheme to algorithms and their options; min-max of all others. What rotation has flattened needs
no smoothing, and the input of down_proj, which it leaves as it is, does."""
OF_PARTS = {
    **dict.fromkeys(("W8A8", "W8A8_PER_CHANNEL", "W8A8_MIX"), "osl"),
    "W4A8_DYNAMIC": "gptq",
    "W4A16": "clip+gptq",
}
"""The same of models with experts, part by part: a rotation would change what their routers choose
by rounding, and what their layers for further tokens read."""


def with_best(job: QuantizeOptions, schemes: Sequence[str], config: ModelConfig) -> QuantizeOptions:
    """A request with the algorithms that ``best`` stands for: that of the first of some schemes.

    Args:
        job: the request; one that asks for something else stays as it is.
        schemes: those that it is for.
        config: a model whose sizes no Hadamard matrix has is not rotated, and smoothed everywhere.
    """
    if job.algorithm != BEST:
        return job
    if config.routing is not None:
        return replace(job, algorithm=_of_parts(by_part("scheme", job.scheme)))
    chosen = next((CHOSEN[scheme] for scheme in schemes if scheme in CHOSEN), {})
    options = dict(chosen)
    names = str(options.pop("algorithm", PLAIN)).split("+")
    if ROTATION in names and not _rotates(config):
        names.remove(ROTATION)
        options = {}
    options |= job.algorithm_options
    return replace(job, algorithm="+".join(names) or PLAIN, algorithm_options=options)


def _of_parts(schemes: ByPart) -> str:
    """The algorithm of each part that a scheme is asked of."""
    usual = [OF_PARTS.get(schemes.usual, PLAIN)] if schemes.usual else []
    named = {part: name for part, name in schemes.named.items() if name != FLOAT}
    return ",".join([*usual, *(f"{part}={OF_PARTS.get(n, PLAIN)}" for part, n in named.items())])


def _rotates(config: ModelConfig) -> bool:
    try:
        QuaRot(config, 0)
    except MsQuantError:
        return False
    return True
