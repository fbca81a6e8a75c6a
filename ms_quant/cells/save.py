"""Writing the quantized linears of a network as MindIE-SD reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
from mindspore import nn

from ms_quant.algorithms import AlgorithmPipeline
from ms_quant.cells.as_linear import as_linear
from ms_quant.cells.diffusion.save import (
    attention_tensors,
    attention_types,
    float_steps,
    warn_of_what_is_not_read,
)
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.tree import float_dtype, host_array, is_linear
from ms_quant.cells.whole import save_whole
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.files.atomic import free_space_check, write_json
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.formats.mindie_sd.choice import (
    check_linear,
    type_of_linear,
    type_of_scheme,
    why_not_run,
)
from ms_quant.formats.mindie_sd.description import DTYPE, FLOAT_STEPS, METADATA
from ms_quant.formats.mindie_sd.held import RUN_DTYPES
from ms_quant.formats.mindie_sd.tensors import Layout, Part, entry, parts
from ms_quant.formats.mindie_sd.types import (
    FLOAT,
    GLOBAL_TYPE,
    MODE,
    NAME,
    SERVED_ATTENTION,
    description_name,
    model_type,
    weights_name,
)
from ms_quant.numerics.activation import DualMxTokens
from ms_quant.numerics.storage import DTYPES
from ms_quant.numerics.timestep import TimestepActivation
from ms_quant.schemes.records import Scheme


def save_quantized(
    network: nn.Cell,
    directory: str | PathLike[str],
    *,
    format: str | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    whole: bool = False,
) -> str:
    """Writes the linears of a quantized network to two files, as MindIE-SD's ``quantize`` reads;
    or all of the network to one.

    ``quant_model_description_TYPE.json`` names every tensor of a linear with its type or
    ``FLOAT``, ``quant_model_weight_TYPE.safetensors`` holds them. Linears that stayed float are
    among them, and so are quantized attentions and their rotations. What is neither is not
    written: MindIE-SD leaves it as the model has it. Each file is either whole or absent; the
    description comes last. Others than owner and group may not read them: MindIE-SD refuses files
    with more permissions.

    In format ``"network"`` there is one file, ``quantized_network.safetensors``, of every scheme
    and with every parameter of the network: convolutions, norms and embeddings, too. ms-quant reads
    it, and MindSpore its parameters.

    Args:
        network (Cell): what :func:`ms_quant.quantize` returned, unless it was a linear itself.
        directory (str, PathLike): where the files go; it is made if need be. Files of these names
            are replaced.
        format (str, optional): ``"mindie-sd"``, the linears alone, or ``"network"``, all of the
            network. Default: ``None``, ``"mindie-sd"``.
        dtype (str, optional): the type that MindIE-SD runs the model in, ``"bfloat16"`` or
            ``"float16"``. What its loader rounds to this type is stored in it, and refused if the
            type does not hold it: ``ms_quant.quantize(network, ..., dtype=...)`` makes such values,
            and so it does by itself for linears of that type. For ``"float16"`` `deq_scale` is
            int64, as the operator takes it. Default: ``None``, the type that the linears were made
            for; where that is float32, scales are float32, which MindIE-SD rounds when it loads
            them: a warning says so.
        rank (int, optional): the rank at the end of both names. With one MindIE-SD asks for a
            process group and replaces it by the process's own. Default: ``None``, no rank: every
            process reads the same files.
        whole (bool, optional): the older name of ``format="network"``. Default: ``False``.

    Returns:
        str, the path of the description, or of the one file: :func:`ms_quant.load_quantized` takes
        it.

    Raises:
        MsQuantError: a linear is of a scheme that MindIE-SD does not serve, or has what it would
            ignore: groups, a zero point of the weight, a bias with W4A4_DYNAMIC, smoothing with
            W8A16, W4A16 or W4A4_DYNAMIC; or on which it fails: W8A8_MXFP8 and W4A4_MXFP4_DUALSCALE
            without a bias; nothing is quantized; a scale is not exact in `dtype`; `dtype` or `rank`
            are given with `whole`; or the disk is full.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import ms_quant
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 4))
        >>> net = ms_quant.quantize(net, "W8A8_DYNAMIC", exclude=["2"])
        >>> path = ms_quant.save_quantized(net, "exported")
        >>> print(path)
        exported/quant_model_description_w8a8_dynamic.json
        >>> fresh = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 4))
        >>> fresh = ms_quant.load_quantized(fresh, path)
    """
    made_for, whole = _checked(dtype, rank), _is_whole(format, whole)
    if whole:
        for name, value in (("dtype", dtype), ("rank", rank)):
            if value is not None:
                raise BadArgumentError(
                    f"{name}: given with format {NETWORK!r}, expected it for MindIE-SD alone"
                )
        return save_whole(network, Path(directory))
    layouts, makers, entries = {}, {}, {}
    wanted = made_for or _own_dtype(network)
    plans: list[TensorPlan] = []
    for name, cell in network.cells_and_names():
        if isinstance(cell, QuantLinear):
            layouts[name] = _layout(cell, name, wanted)
            made = _quantized(cell, layouts[name])
        elif is_linear(cell):
            made = _float(cell, name)
        else:
            continue
        for tensor in made:
            plans.append(tensor.plan)
            makers[tensor.plan.name], entries[tensor.plan.name] = tensor.make, tensor.entry
    attention = attention_types(network)
    for name, array in attention_tensors(network).items():
        plans.append(TensorPlan(name, array.dtype, array.shape))
        makers[name], entries[name] = partial(np.copy, array), FLOAT
    entries |= {f"{path}.quant_type": type for path, type in attention.items()}
    if not layouts and not attention:
        raise BadArgumentError(f"{network.cls_name}: holds no QuantLinear, nothing to save")
    types = {layout.type for layout in layouts.values()}
    model = model_type(types) if types else max(attention.values(), key=SERVED_ATTENTION.index)
    target = Path(directory)
    free_space_check(target, sum(plan.bytes for plan in plans))
    target.mkdir(parents=True, exist_ok=True)
    metadata = {DTYPE: wanted.name} if wanted.name in RUN_DTYPES else {}
    weights = target / weights_name(model, rank)
    write_file(weights, plans, lambda plan: makers[plan.name](), metadata, MODE)
    path = target / description_name(model, rank)
    steps = float_steps(network)
    own = {METADATA: {FLOAT_STEPS: steps}} if steps else {}
    write_json(path, {GLOBAL_TYPE: model, **entries, **own}, MODE)
    if not metadata:
        _warn_of_float32(layouts)
    warn_of_what_is_not_read(network)
    return str(path)


NETWORK = "network"
_WAYS_OUT = (
    "another scheme, or such linears float, or for a bias: has_bias=True before quantizing, here "
    "and in MindIE-SD's model (zeros will do)"
)
_WHOLE = 'save_quantized(..., format="network") holds it for ms-quant'


@dataclass(frozen=True)
class _Tensor:
    """Attributes:
    plan: what it will be.
    entry: what the description says of it.
    make: its value.
    """

    plan: TensorPlan
    entry: str
    make: Callable[[], np.ndarray]


def _checked(dtype: str | None, rank: int | None) -> np.dtype | None:
    if dtype not in (None, *RUN_DTYPES):
        raise BadArgumentError(f"dtype is {dtype!r}, expected 'bfloat16', 'float16' or None")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
        raise BadArgumentError(f"rank is {rank!r}, expected an int of at least 0 or None")
    return None if dtype is None else DTYPES[dtype]


def _is_whole(format: str | None, whole: bool) -> bool:
    """Whether all of the network is written."""
    if format not in (None, NAME, NETWORK):
        raise BadArgumentError(f"format is {format!r:.80}, expected {NAME!r}, {NETWORK!r} or None")
    if whole and format == NAME:
        raise BadArgumentError(f"whole: given with format {NAME!r}, which holds linears alone")
    return whole or format == NETWORK


def _warn_of_float32(layouts: Mapping[str, Layout]) -> None:
    """MindIE-SD runs in no float32: what it rounds is not what was evaluated here."""
    exact = "W8A8_MXFP8", "W4A4_MXFP4"  # there is nothing to round, unless they are smoothed
    rounded = [n for n, layout in layouts.items() if layout.smooths or layout.type not in exact]
    if rounded:
        warnings.warn(
            f"ms_quant: {rounded[0]} is made for float32, and MindIE-SD rounds its scales to the "
            'type that it runs in; ms_quant.quantize(network, ..., dtype="bfloat16") makes such '
            "that it takes as they are",
            stacklevel=3,
        )


def _own_dtype(network: nn.Cell) -> np.dtype:
    """The type that the network's linears were made for."""
    cells = network.cells_and_names()
    found = {cell.input_dtype: name for name, cell in cells if isinstance(cell, QuantLinear)}
    if len(found) > 1:
        listed = " and ".join(f"{name or 'it'} for {kind.name}" for kind, name in found.items())
        raise BadArgumentError(
            f"{network.cls_name}: {listed}, expected linears that are made for one type as "
            "MindIE-SD runs a network in one: ms_quant.quantize(network, ..., dtype=...)"
        )
    return next(iter(found), DTYPES["float32"])


def _layout(cell: QuantLinear, name: str, dtype: np.dtype) -> Layout:
    """The tensors of a linear, which the runtime computes as the Cell does."""
    if not name:
        raise BadArgumentError(
            f"{cell.cls_name}: is a linear itself, expected a network of them as MindIE-SD finds "
            "linears by their paths"
        )
    linear = as_linear(cell)
    bias, smooths = linear.bias is not None, linear.smooth is not None
    try:
        type, (rows, columns) = type_of_linear(linear, name), linear.weight.shape
        check_linear(type, (rows, columns), smooths, bias, name)
    except MsQuantError as error:
        raise BadArgumentError(f"{error}; {_WHOLE}") from None
    if reason := why_not_run(type, (rows, columns), bias):
        raise BadArgumentError(f"{name}: {reason}; expected {_WAYS_OUT}; {_WHOLE}")
    activation = linear.activation
    if linear.input_dtype != dtype and (smooths or isinstance(activation, DualMxTokens)):
        raise BadArgumentError(
            f"{name}: its products with the input are rounded as {linear.input_dtype.name}, "
            f"expected {dtype.name}: ms_quant.quantize(network, ..., dtype={dtype.name!r})"
        )
    steps = len(activation.scale) if isinstance(activation, TimestepActivation) else 0
    return Layout(type, (rows, columns), dtype, smooths, bias, steps, name)


def _quantized(cell: QuantLinear, layout: Layout) -> Iterator[_Tensor]:
    for suffix, part in parts(layout).items():
        plan = TensorPlan(f"{layout.name}.{suffix}", part.dtype, part.shape)
        yield _Tensor(plan, entry(layout.type, suffix), partial(_value, cell, part))


def _value(cell: QuantLinear, part: Part) -> np.ndarray:
    return part.make(as_linear(cell))


def _float(cell: nn.Cell, name: str) -> Iterator[_Tensor]:
    for suffix in ("weight", "bias"):
        parameter = getattr(cell, suffix, None)
        if parameter is not None and name:
            plan = TensorPlan(f"{name}.{suffix}", float_dtype(parameter), tuple(parameter.shape))
            yield _Tensor(plan, FLOAT, partial(host_array, parameter))


def check_format(
    format: str, scheme: Scheme, algorithms: AlgorithmPipeline, cells: Mapping[str, nn.Cell]
) -> None:
    """Refuses what :func:`save_quantized` could not write afterwards.

    Args:
        format: ``"mindie-sd"``.
        scheme, algorithms: what linears will be quantized with.
        cells: the linears by path.

    Raises:
        MsQuantError: it is no such format, or would not hold a linear.
    """
    if format != NAME:
        raise BadArgumentError(f"for_format is {format!r}, expected {NAME!r} or None")
    if algorithms.any("adds"):
        raise BadArgumentError(
            f"algorithm {algorithms.name}: puts a transform or a branch beside the weight, "
            "MindIE-SD reads none, expected another algorithm"
        )
    for path, cell in cells.items():
        type, bias = type_of_scheme(scheme, path), getattr(cell, "bias", None) is not None
        shape = tuple(cell.weight.shape)
        check_linear(type, shape, algorithms.any("smooths"), bias, path)
        if reason := why_not_run(type, shape, bias):
            raise BadArgumentError(f"{path}: {reason}; expected {_WAYS_OUT}")
