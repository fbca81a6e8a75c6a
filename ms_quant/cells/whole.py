"""A whole quantized network in one file: its linears as they are, and every other parameter."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from ms_quant.cells.diffusion.attach import attach_attention
from ms_quant.cells.diffusion.whole import arrays, attached, load_attention, stated
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.tree import host_array, linears, replace_cell
from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.atomic import free_space_check
from ms_quant.files.safetensors_file import SafetensorsFile, open_file
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.formats.mindie_sd.choice import network_scheme
from ms_quant.numerics.activation import ObservedRange, PerToken, PhasedActivation, StaticActivation
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.numerics.timestep import Timestep, TimestepActivation
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.table import get_scheme
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

FILE_NAME, KEY, VERSION = "quantized_network.safetensors", "ms_quant.network", 1
ATTENTION = "attention"
MOST_STEPS = 1 << 20
_LINEAR = "a quantized linear"


def save_whole(network: nn.Cell, directory: Path) -> str:
    """Writes every parameter, and the scheme of every quantized linear, to one file.

    Returns:
        The path of the file.

    Raises:
        MsQuantError: nothing is quantized, a QuantLinear was made by hand, a type cannot be
            stored, or the disk is full.
    """
    schemes = {}
    for path, cell in network.cells_and_names():
        if isinstance(cell, QuantLinear):
            if cell.scheme is None:
                raise BadFileError(
                    f"{path or cell.cls_name}: is a QuantLinear made by hand, expected those of "
                    "quantize, whose scheme is known"
                )
            schemes[path] = _stated(path, cell, cell.scheme)
    attention = attached(network)
    if not schemes and not attention:
        raise BadFileError(f"{network.cls_name}: holds no QuantLinear, nothing to save")
    tensors = dict(_tensors(network))
    tensors |= {name: Tensor(array) for name, array in arrays(attention).items()}
    plans = [TensorPlan(name, _stored(t), tuple(t.shape)) for name, t in tensors.items()]
    free_space_check(directory, sum(plan.bytes for plan in plans))
    directory.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"version": VERSION, "linears": schemes}
    if attention:
        header[ATTENTION] = stated(attention)
    metadata = {KEY: json.dumps(header, sort_keys=True)}
    path = directory / FILE_NAME
    write_file(path, plans, lambda plan: host_array(tensors[plan.name]), metadata)
    return str(path)


def _stated(path: str, cell: QuantLinear, scheme: Scheme) -> dict[str, Any]:
    """What the header says of a linear."""
    stated = {"scheme": scheme.name, "dtype": cell.input_dtype.name, **scheme.chosen}
    again, _ = _scheme(stated, path)
    format, found = again.activation, cell.activation
    differs = format.dynamic and not isinstance(format, PerToken) and format != found
    if isinstance(found, StaticActivation | PhasedActivation):
        static = found.static if isinstance(found, PhasedActivation) else found
        multiplies = cell.input_dtype if getattr(format, "multiplies", False) else None
        differs = static.multiplied_in != multiplies
    if differs:
        raise BadFileError(
            f"{path}: quantizes its input in another way than scheme {scheme.name}, expected a "
            "linear as quantize makes it"
        )
    return stated


def _tensors(network: nn.Cell) -> Iterator[tuple[str, Tensor]]:
    """Parameters and lasting buffers by their places in the network, each once."""
    yield from network.parameters_and_names()
    for path, cell in network.cells_and_names():
        lasting = set(getattr(cell, "_buffers", ())) - set(
            getattr(cell, "_non_persistent_buffers_set", ())
        )
        for name in sorted(lasting):
            if cell._buffers[name] is not None:
                yield f"{path}.{name}" if path else name, cell._buffers[name]


def _stored(tensor: Tensor) -> np.dtype:
    name = str(tensor.dtype).lower()
    return DTYPES[name] if name in DTYPES else np.dtype(name)


def load_whole(
    network: nn.Cell,
    path: Path,
    policy: TimestepPolicyConfig | None = None,
    dtype: np.dtype | None = None,
) -> nn.Cell:
    """Gives a network all that :func:`save_whole` wrote, in place.

    Args:
        network: built as the one that was quantized; its values do not matter.
        path: the file.
        policy, dtype: as for :func:`ms_quant.cells.swap.quantize`.

    Raises:
        MsQuantError: names the file and what of it is not as the network has it, or damaged.
            Nothing is replaced.
    """
    file = open_file(path)
    schemes, plans = _schemes(file)
    cells = dict(linears(network))
    for name, (_, made_for) in schemes.items():
        if dtype not in (None, made_for):
            raise BadFileError(
                f"{path}: {name} is made for {made_for.name}, expected no other dtype than that"
            )
        if name not in cells:
            raise BadFileError(
                f"{path}: holds {name!r} as {_LINEAR}, the network has no linear there"
            )
    quantized = {
        name: _linear(file, name, cells[name], row, policy) for name, row in schemes.items()
    }
    inside = tuple(f"{name}." for name in schemes)
    others = {name: t for name, t in _tensors(network) if not name.startswith(inside)}
    attention = load_attention(network, file, plans, policy)
    _check_names(file, quantized, {*others, *arrays(attention)})
    for name, tensor in others.items():
        _check(file, name, tuple(tensor.shape), _stored(tensor))
    steps = _steps(file, quantized, policy if not attention else None)
    if attention:
        attach_attention(network, lambda site: attention.get(site.path))
    for name, cell in quantized.items():
        replace_cell(network, name, cell)
    for name, tensor in others.items():
        array = file.read(name)
        wide = array.astype(np.float32) if array.dtype == DTYPES["bfloat16"] else array
        value = Tensor(wide, tensor.dtype)
        tensor.set_data(value) if isinstance(tensor, Parameter) else tensor.assign_value(value)
    if steps:
        TimestepManager.set_timestep_idx_max(steps)
    return network


def _schemes(
    file: SafetensorsFile,
) -> tuple[dict[str, tuple[Scheme, np.dtype]], dict[str, Any]]:
    """What the header says of linears, and of attention."""
    where = f"{file.path}: {KEY} in the header"
    header = file.stated(KEY, "save_quantized(format='network')")
    found: dict[str, Any] = header if isinstance(header, dict) else {}
    rows, plans = found.get("linears", {}), found.get(ATTENTION, {})
    if not isinstance(rows, dict) or not isinstance(plans, dict) or not (rows or plans):
        found = {}
    if found.get("version") != VERSION:
        raise BadFileError(f"{where}: {header!r:.80}, expected linears of version {VERSION}")
    return {name: _scheme(row, f"{where}: {name!r}") for name, row in rows.items()}, plans


def _scheme(row: Any, where: str) -> tuple[Scheme, np.dtype]:
    """A scheme, and the type of inputs that a linear is made for."""
    if not isinstance(row, dict) or not isinstance(row.get("scheme"), str):
        raise BadFileError(f"{where}: {row!r:.80}, expected a scheme and its options")
    dtype = row.get("dtype", "float32")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFileError(f"{where}: dtype {dtype!r:.80}, expected one of {', '.join(DTYPES)}")
    options = {key: value for key, value in row.items() if key not in ("scheme", "dtype")}
    try:
        return network_scheme(get_scheme(row["scheme"], **options)), DTYPES[dtype]
    except MsQuantError as error:
        raise BadFileError(f"{where}: {error}") from None


def _linear(
    file: SafetensorsFile,
    name: str,
    cell: nn.Cell,
    row: tuple[Scheme, np.dtype],
    policy: TimestepPolicyConfig | None,
) -> QuantLinear:
    if getattr(cell, "activation", None) is not None:
        raise BadFileError(
            f"{name}: a Dense with a built-in activation cannot be replaced, expected "
            "activation=None with the activation as a Cell of its own"
        )
    scheme, dtype = row
    blank = _blank(file, name, scheme, dtype, tuple(cell.weight.shape))
    made = QuantLinear(blank, timestep_policy=policy, scheme=scheme)
    for suffix, parameter in made.kept.items():
        array = _read(file, f"{name}.{suffix}", parameter)
        if suffix == "weight":
            _check_codes(file, name, array, scheme)
        parameter.set_data(Tensor(array))
    return made


def _blank(
    file: SafetensorsFile, name: str, scheme: Scheme, dtype: np.dtype, shape: tuple[int, int]
) -> QuantizedLinear:
    """A linear of zeros with all the parts that the file has of this one."""
    outputs, inputs = shape
    parts = {
        t.removeprefix(f"{name}."): i.shape
        for t, i in file.tensors.items()
        if t.startswith(f"{name}.")
    }
    scheme.weight.check_columns(inputs, f"{file.path}: {name}.weight")
    grid = scheme.weight.fit(np.zeros(shape, np.float32), f"{name}.weight")
    ends = np.full(inputs, -1, np.float32), np.full(inputs, 1, np.float32)
    activation: Any
    if isinstance(scheme.activation, Timestep):
        steps = (parts.get("input_scale") or (1,))[0]
        if not 1 <= steps <= MOST_STEPS:
            raise BadFileError(
                f"{file.path}: {name}.input_scale has {steps} timesteps, expected 1..{MOST_STEPS}"
            )
        activation = TimestepActivation(np.zeros(steps, np.float32), np.zeros(steps, np.int8))
    else:
        activation = scheme.activation.fit(ObservedRange(*ends, dtype, name), None)
    if isinstance(activation, PerToken) and "clip_ratio" in parts:
        activation = replace(activation, clip=0.5)
    codes = grid.round(np.zeros(shape, np.float32))
    linear = QuantizedLinear(codes, grid, None, activation, input_dtype=dtype)
    if "bias" in parts:
        linear = replace(linear, bias=np.zeros(outputs, np.float32))
    if "mul_scale" in parts:
        linear = replace(linear, smooth=np.ones(inputs, np.float32))
    if "left_trans" in parts:
        left = (parts["left_trans"] or (0,))[0]
        if not left or inputs % left:
            raise BadFileError(
                f"{file.path}: {name}.left_trans is {list(parts['left_trans'])}, expected a "
                f"square whose size divides {inputs}"
            )
        sides = np.eye(left, dtype=np.float32), np.eye(inputs // left, dtype=np.float32)
        linear = replace(linear, kronecker=Kronecker(*sides))
    if "svd_lowrank_l1" in parts:
        rank = min((parts["svd_lowrank_l1"] or (0,))[0], inputs + outputs)
        sides = np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32)
        linear = replace(linear, branch=LowRank(*sides))
    return linear


def _read(file: SafetensorsFile, name: str, parameter: Parameter) -> np.ndarray:
    _check(file, name, tuple(parameter.shape), _stored(parameter))
    array = file.read(name)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadFileError(f"{file.path}: tensor {name!r} holds NaN or inf, expected numbers")
    return array


def _check(file: SafetensorsFile, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    found = file.info(name)
    if found.shape != shape or found.dtype != dtype:
        raise BadFileError(
            f"{file.path}: tensor {name!r} is {found.dtype} {list(found.shape)}, expected {dtype} "
            f"{list(shape)} as the network's is"
        )


def _check_codes(file: SafetensorsFile, name: str, codes: np.ndarray, scheme: Scheme) -> None:
    if scheme.weight.bits != 4 or not codes.size:
        return
    low, high = (-8, 7) if codes.dtype == np.int8 else (0, 15)
    if codes.min() < low or codes.max() > high:
        raise BadFileError(
            f"{file.path}: tensor {name + '.weight'!r} holds codes {codes.min()}..{codes.max()}, "
            f"expected {low}..{high}"
        )


def _check_names(
    file: SafetensorsFile, quantized: Mapping[str, QuantLinear], others: Collection[str]
) -> None:
    expected = {f"{name}.{suffix}" for name, cell in quantized.items() for suffix in cell.kept}
    expected |= set(others)
    found = set(file.tensors)
    for what, names in (("lacks", expected - found), ("holds also", found - expected)):
        if names:
            raise BadFileError(
                f"{file.path}: {what} {len(names)} tensors such as {min(names)!r}, expected those "
                "of the network as it was built before it was quantized"
            )


def _steps(
    file: SafetensorsFile, quantized: Mapping[str, QuantLinear], policy: TimestepPolicyConfig | None
) -> int:
    """T, which all linears of timesteps share; 0 where there is none."""
    counts = {len(cell.input_scale) for cell in quantized.values() if cell.by_step}
    if policy is not None and not counts and not any(cell.widens for cell in quantized.values()):
        raise BadFileError(
            f"timestep_policy: no linear of {file.path} takes it, expected some of W8A8_TIMESTEP, "
            "or of W4A4_MXFP4 where it has W4A8"
        )
    if len(counts) > 1:
        raise BadFileError(
            f"{file.path}: linears of {' and '.join(map(str, sorted(counts)))} timesteps, expected "
            "the same number"
        )
    return counts.pop() if counts else 0
