"""What calibration measured, as the record of a static checkpoint states it.

``ms_quant.json`` holds under ``activations``, for each group of linears that share an input::

    "model.layers.0.qkv": {"act_scale": 0.0123, "offset": -3, "input_scale_sha256": "..."}

``act_scale`` and ``offset`` are the range that was seen, after smoothing: codes -128 to 127 stand
for (code - offset) * act_scale. The tensors alone do not tell them: ``deq_scale`` is a product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.models.names import block_prefix
from ms_quant.numerics.affine import QMAX, QMIN
from ms_quant.numerics.linear import StaticActivation
from ms_quant.numerics.storage import round_up
from ms_quant.plan.plan import Plan

KEY = "activations"


def activation_facts(
    plan: Plan, statistic: Callable[[int, str], np.ndarray]
) -> dict[str, dict[str, Any]]:
    """The entry ``activations`` of the record.

    Args:
        plan: what was done.
        statistic: gives a tensor of a finished block, such as ``"mlp.down_proj.act_scale"``.

    Returns:
        JSON, one object for each group of a static scheme.
    """
    facts = {}
    for index in range(plan.config.num_blocks):
        for group in plan.groups(index):
            if plan.layer(index, group).scheme.activation.dynamic:
                continue
            member = group.members[0]
            facts[f"{block_prefix(index)}{group.name}"] = {
                "act_scale": float(statistic(index, f"{member}.act_scale")[0]),
                "offset": int(statistic(index, f"{member}.input_offset")[0]),
                "input_scale_sha256": _digest(statistic(index, f"{member}.input_scale")),
            }
    return facts


def recorded_activation(
    record: Mapping[str, Any], name: str, path: str, found: StaticActivation
) -> StaticActivation:
    """The parameters of a group's input, with the activation scale that calibration measured.

    Args:
        record: the content of ``ms_quant.json``.
        name: the group, such as ``"model.layers.0.qkv"``.
        path: a linear of the group.
        found: the parameters that the checkpoint's tensors hold; the scale in it is not looked at.

    Raises:
        MsQuantError: the record has no such entry, or another zero point or ``input_scale``.
    """
    facts = record.get(KEY)
    entry = facts.get(name) if isinstance(facts, Mapping) else None
    where = f"ms_quant.json: {KEY}: {name}"
    if not isinstance(entry, Mapping):
        raise BadFileError(f"{where} is {entry!r:.80}, expected what calibration measured")
    scale, offset = entry.get("act_scale"), entry.get("offset")
    if not isinstance(scale, float) or not _is_scale(scale):
        raise BadFileError(f"{where}: act_scale is {scale!r:.80}, expected a positive float32")
    if type(offset) is not int or not QMIN <= offset <= QMAX:
        raise BadFileError(f"{where}: offset is {offset!r:.80}, expected {QMIN} to {QMAX}")
    if found.offset != offset:
        raise BadFileError(
            f"{path}.input_offset: is {found.offset}, expected {offset} as {where} states"
        )
    if entry.get("input_scale_sha256") != _digest(found.input_scale):
        raise BadFileError(f"{path}.input_scale: sha256 differs from {where}")
    activation = StaticActivation(np.float32(scale), offset, found.input_scale)
    with np.errstate(over="ignore", under="ignore"):
        smooth = activation.smooth
    if not (np.isfinite(smooth) & (smooth >= np.finfo(np.float32).tiny)).all():
        raise BadFileError(f"{where}: act_scale is {scale:g}, expected one nearer to input_scale")
    return activation


def unsmoothed_problem(
    activation: StaticActivation, dtype: np.dtype, name: str, steps: int = 0
) -> str | None:
    """What is wrong with an ``input_scale`` that holds no smoothing, or None.

    Args:
        activation: its parameters.
        dtype: the type that ``input_scale`` is stored in.
        name: the tensor.
        steps: values may be so many steps of the type away.
    """
    whole = round_up(np.asarray(activation.scale), dtype, name)
    expected = np.float32(whole)
    kind = np.uint32 if dtype.itemsize == 4 else np.uint16
    bits = [x.view(kind).astype(np.int64) for x in (activation.input_scale.astype(dtype), whole)]
    wrong = int(np.count_nonzero(np.abs(bits[0] - bits[1]) > steps))
    if not wrong:
        return None
    return (
        f"{name}: {wrong} of {activation.input_scale.size} values are not {expected:g}, the "
        "recorded act_scale without smoothing"
    )


def _is_scale(value: float) -> bool:
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.float32(value)
    return float(narrow) == value and float(np.finfo(np.float32).tiny) <= value < np.inf


def _digest(input_scale: np.ndarray) -> str:
    return hashlib.sha256(input_scale.astype("<f4").tobytes()).hexdigest()
