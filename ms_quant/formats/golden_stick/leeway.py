"""How checkpoints that Golden Stick itself writes differ from ours and mean the same.

It stores scales that its runtimes do not read, mislabels biases, and computes ``quant_bias`` in
bfloat16: docs/golden_stick_format.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError, short
from ms_quant.files.reader import Checkpoint
from ms_quant.formats.flat_description import tensor_entries
from ms_quant.formats.format import Leeway
from ms_quant.numerics.activation import StaticActivation
from ms_quant.numerics.linear import QuantizedLinear, Stated
from ms_quant.numerics.storage import DTYPES

BF16_STEPS = 2.0**-7  # the sum, both scales and their product rounded to bfloat16: 2**-9 each
FLOATS = frozenset(DTYPES)
STATIC = "W8A8"  # which vllm-mindspore's own models serve


def describe_difference(
    found: Mapping[str, Any], made: Mapping[str, Any], where: Path
) -> tuple[list[str], list[str]]:
    """What is wrong with a description, and what is odd.

    Raises:
        MsQuantError: attention or the cache is quantized.
    """
    for key, value in found.items():
        if "." not in key and value and key.endswith("quant_type") and key != "model_quant_type":
            raise UnsupportedError(f"{where}: {key} is {short(value)}, which is not read here")
    defects, notes = tensor_entries(found, made, where, LEEWAY)
    for key, value in made.items():
        if value == STATIC and key.endswith(".bias") and found.get(key, value) != value:
            defects.append(
                f"{where}: {key} is {short(found[key])}, expected {value!r}: vllm-mindspore wants "
                "one type for all tensors of a linear"
            )
            notes = [note for note in notes if not note.startswith(f"{where}: {key} ")]
    return defects, notes


def check_extra(checkpoint: Checkpoint, path: str, linear: QuantizedLinear) -> None:
    """Compares the tensors that no runtime reads with those that it does.

    Raises:
        MsQuantError: an offset is not 0, or ``weight_scale`` times one input scale is not
            ``deq_scale``.
    """
    offset, scale = f"{path}.weight_offset", f"{path}.weight_scale"
    if offset in checkpoint:
        wrong = int(np.count_nonzero(checkpoint.read(offset)))
        if wrong:
            raise BadFileError(f"{offset}: {wrong} offsets are not 0, the weights are symmetric")
    if scale not in checkpoint or not isinstance(linear.activation, StaticActivation):
        return
    steps = linear.static.input_scale
    if (steps == steps[0]).all():
        product, exact = checkpoint.read_float32(scale).reshape(-1) * steps[0], linear.deq_scale
        if product.shape != exact.shape or (np.abs(product / exact - 1) > BF16_STEPS).any():
            raise BadFileError(
                f"{scale}: times input_scale is not deq_scale, even rounded to bfloat16"
            )


def stated(linear: QuantizedLinear, quant_bias: np.ndarray, path: str) -> QuantizedLinear:
    """A linear that is computed with a ``quant_bias`` that nearly follows from the rest.

    Args:
        linear: as its other tensors have it.
        quant_bias: int32 (out,).
        path: the linear, for errors.

    Raises:
        MsQuantError: a value is off by more than rounding to bfloat16 explains.
    """
    exact = linear.quant_bias.astype(np.float64)
    wrong = int(np.count_nonzero(np.abs(quant_bias - exact) > 1 + np.abs(exact) * BF16_STEPS))
    if wrong:
        raise BadFileError(
            f"{path}.quant_bias: {wrong} of {quant_bias.size} values differ from -input_offset * "
            "sum of the weight's row by more than rounding to bfloat16 explains"
        )
    if np.array_equal(quant_bias, linear.quant_bias):
        return linear
    return replace(linear, stated=Stated(linear.deq_scale, quant_bias, False))


LEEWAY = Leeway(
    types=dict.fromkeys(("input_scale", "weight_scale", "deq_scale", "bias"), FLOATS),
    extra=frozenset({"weight_scale", "weight_offset", "smooth_scale"}),
    description=describe_difference,
)
