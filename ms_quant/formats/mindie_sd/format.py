"""The mindie-sd format of a decoder's checkpoint, as MindIE-SD's ``quantize`` reads it.

docs/mindie_sd_format.md states what its files hold. Both file names hold the type, and there is
one file of weights without an index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan
from ms_quant.formats.ascend.leeway import stated
from ms_quant.formats.format import CheckpointFormat, Kinds, Options
from ms_quant.formats.format import Tensors as Table
from ms_quant.formats.mindie_sd.choice import check_linear, type_of_scheme
from ms_quant.formats.mindie_sd.choice import why_not_run as why_linear_not_run
from ms_quant.formats.mindie_sd.description import read_content
from ms_quant.formats.mindie_sd.held import held_dtype, run_dtype
from ms_quant.formats.mindie_sd.reading import Tensors, read, with_bias_of
from ms_quant.formats.mindie_sd.tensors import (
    INNER,
    MUL_SCALE,
    WITH_CODES,
    Layout,
    entry,
    parts,
)
from ms_quant.formats.mindie_sd.types import (
    FLOAT,
    GLOBAL_TYPE,
    MODE,
    NAME,
    description_name,
    model_type,
    weights_name,
)
from ms_quant.models.block_spec import LinearGroup, LinearSpec
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix
from ms_quant.numerics.activation import StaticActivation
from ms_quant.numerics.linear import QuantizedLinear, folded_bias
from ms_quant.numerics.mx import DUAL_BLOCK
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.storage import SmoothingTarget

HEAD = "lm_head.weight"


def document(plan: Plan) -> str:
    """The description's file name."""
    return description_name(_model_type(plan))


def weights(plan: Plan) -> str:
    """The file name of the weights."""
    return weights_name(_model_type(plan))


def _model_type(plan: Plan) -> str:
    return model_type({type_of_scheme(layer.scheme, "the checkpoint") for layer in plan.distinct})


def _smooths(layer: LayerPlan) -> bool:
    """Whether the linears hold a smoothing vector."""
    return layer.storage.target is SmoothingTarget.MUL_SCALE


def bias_name(layer: LayerPlan, path: str) -> str:
    """Full name of the bias that a linear has in the float model."""
    return f"{path}.{INNER if _smooths(layer) else ''}bias"


def bias_dtype(layer: LayerPlan, path: str) -> np.dtype:
    """The type of the bias of a quantized linear."""
    type = type_of_scheme(layer.scheme, path)
    return held_dtype(type, "bias", run_dtype(layer.dtype))


def check(layer: LayerPlan, group: LinearGroup, spec: LinearSpec, name: str) -> None:
    """Refuses a linear that cannot be stored, or that the runtime would not compute.

    Raises:
        MsQuantError: names the weight, and what it is that MindIE-SD does not read.
    """
    type = type_of_scheme(layer.scheme, name)
    if type == "W8A8_TIMESTEP":
        raise BadFileError(f"{name}: a decoder has no timesteps, expected another scheme")
    added = [
        n for n, row in zip(layer.algorithms.names, layer.algorithms.rows, strict=True) if row.adds
    ]
    if added:
        raise BadFileError(
            f"{name}: algorithm {added[0]} adds tensors that MindIE-SD does not read, expected "
            "another"
        )
    bias, path = spec.bias, name.removesuffix(".weight")
    check_linear(type, spec.shape, _smooths(layer), bias, path)


def why_not_run(layer: LayerPlan, group: LinearGroup, spec: LinearSpec) -> str:
    """Why the runtime fails on a linear that files can hold, or ""."""
    type = type_of_scheme(layer.scheme, group.name)
    return why_linear_not_run(type, spec.shape, spec.bias)


def linear_plan(layer: LayerPlan, group: LinearGroup, spec: LinearSpec) -> Table:
    """Suffix to type and shape of a quantized linear's tensors, without its own bias.

    A linear without one has a bias of zeros where the runtime fails else.
    """
    smooths = _smooths(layer)
    type = type_of_scheme(layer.scheme, group.name)
    layout = Layout(type, spec.shape, run_dtype(layer.dtype), smooths)
    bias = f"{INNER}bias" if smooths else "bias"
    own = {bias} if spec.bias else set()
    return {
        suffix: (part.dtype, part.shape)
        for suffix, part in parts(layout).items()
        if suffix not in own
    }


def linear_tensor(
    layer: LayerPlan, group: LinearGroup, linear: QuantizedLinear, suffix: str
) -> np.ndarray:
    """One tensor of a quantized linear, as stored.

    Raises:
        MsQuantError: the linear has what no tensor of this layout holds.
    """
    rows, columns = linear.weight.shape
    smooths = suffix == MUL_SCALE or suffix.startswith(INNER)
    type = type_of_scheme(layer.scheme, group.name)
    dtype = run_dtype(layer.dtype)
    layout = Layout(type, (rows, columns), dtype, smooths, linear.bias is not None)
    held = {"smooth"} if smooths else set()
    homeless = ({"smooth", "left_trans", "svd_lowrank_l1"} & linear.arrays().keys()) - held
    if homeless:
        raise UnsupportedError(
            f"the mindie-sd format has no place for {min(homeless)} of a linear here"
        )
    return parts(layout)[suffix].make(linear)


def read_linear(
    layer: LayerPlan,
    group: LinearGroup,
    spec: LinearSpec,
    checkpoint: Checkpoint,
    path: str,
    bias: np.ndarray | None,
) -> QuantizedLinear:
    """The linear at a path, with its bias.

    Raises:
        MsQuantError: names the tensor that is wrong.
    """
    type = type_of_scheme(layer.scheme, path)
    tensors = Tensors(checkpoint)
    found = read(type, tensors, path, spec.shape, run_dtype(layer.dtype))
    linear = replace(with_bias_of(found, type, bias is not None, path), bias=bias)
    if isinstance(found.activation, StaticActivation):
        if layer.foreign:
            return stated(linear, linear.deq_scale, folded_bias(found, path), path)
        _same(folded_bias(linear, path), folded_bias(found, path), tensors, path)
    return linear


def _same(made: np.ndarray, found: np.ndarray, tensors: Tensors, path: str) -> None:
    wrong = int(np.count_nonzero(made != found))
    if wrong:
        raise BadFileError(
            f"{tensors.prefix(path)}quant_bias: {wrong} of {found.size} values differ from what "
            "the other tensors give"
        )


def describe(plan: Plan, tensors: Sequence[TensorPlan]) -> dict[str, Any]:
    """The type of the model, and tensor name to type, tied heads included."""
    result: dict[str, Any] = {GLOBAL_TYPE: _model_type(plan)}
    for tensor in tensors:
        result[tensor.name] = FLOAT
        if tensor.part is not None:
            path, suffix = tensor.part
            scheme = plan.quantized_layer(path).scheme
            result[tensor.name] = entry(type_of_scheme(scheme, path), suffix)
    if plan.config.tied:
        result[HEAD] = FLOAT
    return result


def find(directory: Path) -> list[Path]:
    """Descriptions by their names; that of compressed weights is of another format."""
    names = directory.glob("quant_model_description_*.json")
    return sorted(path for path in names if not path.stem.endswith("w8a8sc"))


def kinds(config: ModelConfig, description: Mapping[str, Any], where: Path) -> Kinds:
    """What each linear is, by the runtime's rules."""
    read, problems = read_content(description, where), []
    found: dict[str, str] = {}
    for index in range(config.num_blocks):
        for group in config.block(index).groups:
            paths = [f"{block_prefix(index)}{member}" for member in group.members]
            found |= {path: read.type_of(path) for path in paths}
            if len({found[path] for path in paths}) > 1:
                listed = ", ".join(f"{path} {found[path]}" for path in paths)
                problems.append(f"{where}: {listed}; expected one type, they share their input")
    return found, problems


def scheme_options(
    config: ModelConfig, description: Mapping[str, Any], checkpoint: Checkpoint
) -> Options:
    """What the runtime reads is one choice of each; the rule of microscaling is not stored."""
    whole = {"group_size": 0, "symmetric": True, "dual_block_size": DUAL_BLOCK}
    own, norm = SmoothingTarget.MUL_SCALE.value, SmoothingTarget.NORM.value

    def options(path: str, spec: LinearSpec) -> dict[str, Any]:
        return {**whole, "fold": own if f"{path}.{MUL_SCALE}" in checkpoint else norm}

    return options


FORMAT = CheckpointFormat(
    name=NAME,
    shown="quant_model_description_TYPE.json",
    find=find,
    document=document,
    linear_plan=linear_plan,
    linear_tensor=linear_tensor,
    read_linear=read_linear,
    describe=describe,
    kinds=kinds,
    scheme_options=scheme_options,
    check=check,
    with_codes=WITH_CODES,
    weights=weights,
    bias_name=bias_name,
    bias_dtype=bias_dtype,
    why_not_run=why_not_run,
    mode=MODE,
)
