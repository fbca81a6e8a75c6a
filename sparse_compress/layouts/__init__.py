"""The layouts of W8A8SC checkpoints, one module for each target, by name.

A new target is a module with a ``TARGET`` and a row here.
"""

from __future__ import annotations

from pathlib import Path

from ms_quant.errors import BadArgumentError
from sparse_compress.layouts import mindie, msmodelslim, vllm_ascend, vllm_mindspore
from sparse_compress.layouts.base import (
    EMBEDDING,
    HEAD,
    INT64,
    MAX_DESCRIPTION_BYTES,
    MAX_RANKS,
    NORM,
    Layout,
    Target,
    TensorSpec,
    block_files,
    model_config,
    proof_file,
    rank_name,
)

__all__ = [
    "DEFAULT",
    "EMBEDDING",
    "HEAD",
    "INT64",
    "MAX_DESCRIPTION_BYTES",
    "MAX_RANKS",
    "NORM",
    "TARGETS",
    "Layout",
    "Target",
    "TensorSpec",
    "block_files",
    "find_target",
    "get_target",
    "model_config",
    "proof_file",
    "rank_name",
]

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (vllm_mindspore.TARGET, vllm_ascend.TARGET, msmodelslim.TARGET)
}
DEFAULT = vllm_mindspore.TARGET.name


def get_target(name: str, family: str) -> Target:
    """The target of that name.

    Args:
        name: as ``--target`` gives it.
        family: ``model_type`` of the model.

    Raises:
        MsQuantError: there is none, or none that is documented for the family.
    """
    if name == mindie.NAME:
        raise BadArgumentError(mindie.refusal(family))
    if name not in TARGETS:
        raise BadArgumentError(f"target {name!r} is unknown, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def find_target(directory: Path) -> Target | None:
    """The target whose description a directory has, or None."""
    return next((target for target in TARGETS.values() if target.found(directory)), None)
