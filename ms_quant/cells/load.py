"""Loading quantized linears, as MindIE-SD reads them, into a MindSpore network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import communication, nn
from mindspore.communication import GlobalComm

from ms_quant.cells.diffusion.attach import attach_attention
from ms_quant.cells.diffusion.load import stored_attention
from ms_quant.cells.diffusion.sites import attention_sites
from ms_quant.cells.float_forward import run_dtype
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.tree import is_linear, linears, replace_cell
from ms_quant.cells.whole import load_whole
from ms_quant.errors import BadFileError
from ms_quant.formats.mindie_sd.description import (
    Description,
    made_for,
    open_weights,
    rank_of,
    read_description,
    with_rank,
)
from ms_quant.formats.mindie_sd.reading import Tensors, read, with_bias_of
from ms_quant.formats.mindie_sd.types import FLOAT, TYPES
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.numerics.timestep import TimestepActivation
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig


def load_quantized(
    network: nn.Cell,
    path: str | PathLike[str],
    *,
    timestep_policy: TimestepPolicyConfig | None = None,
    dtype: Any = None,
) -> nn.Cell:
    """Replaces linears of a network with quantized ones from files, in place.

    Args:
        network (Cell): built as the one that was quantized, before it was; not a linear itself.
        path (str, PathLike): what :func:`ms_quant.save_quantized` returned: a description as
            MindIE-SD reads it, ``quant_model_description_TYPE.json`` or ``..._TYPE_RANK.json``,
            with the weights beside it; or ``quantized_network.safetensors``, which gives every
            parameter its value. With a description every linear needs an entry; those that are
            ``FLOAT`` keep the network's values, and so does what is no linear, of which a warning
            tells.
        timestep_policy (TimestepPolicyConfig, optional): which timesteps are static and which are
            dynamic, for linears of W8A8_TIMESTEP. Default: ``None``, all steps are dynamic.
        dtype (str, mindspore.dtype, optional): the type that the network runs in. Default:
            ``None``, the type that the file was made for, else each linear's own.

    Returns:
        Cell, `network`.

    Raises:
        MsQuantError: an entry, tensor, type, shape or value is missing, wrong or not served by
            MindIE-SD; names the file and the entry or tensor. Nothing is replaced.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import ms_quant
        >>> from mindspore import nn
        >>> def build():
        ...     return nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 4))
        >>> net = ms_quant.quantize(build(), "W8A8_DYNAMIC")
        >>> path = ms_quant.save_quantized(net, "exported", format="network")
        >>> print(path)
        exported/quantized_network.safetensors
        >>> again = ms_quant.load_quantized(build(), path)
    """
    return load(network, Path(path), timestep_policy, wanted_dtype(dtype))


def wanted_dtype(dtype: Any) -> np.dtype | None:
    """The type that a network runs in, by its name or as MindSpore's; None where it is not given.

    Raises:
        MsQuantError: it is none of the three.
    """
    if dtype is None:
        return None
    name = str(dtype).lower()
    if name not in DTYPES:
        raise BadFileError(f"dtype is {dtype!r:.80}, expected one of {', '.join(DTYPES)} or None")
    return DTYPES[name]


def load(
    network: nn.Cell,
    path: Path,
    timestep_policy: TimestepPolicyConfig | None,
    dtype: np.dtype | None,
) -> nn.Cell:
    """What :func:`load_quantized` does."""
    if is_linear(network):
        raise BadFileError(
            f"{network.cls_name}: is a linear itself, expected a network of them as {path} names "
            "linears by their paths"
        )
    if timestep_policy is not None and not isinstance(timestep_policy, TimestepPolicyConfig):
        found = type(timestep_policy).__name__
        raise BadFileError(f"timestep_policy: {found}, expected a TimestepPolicyConfig")
    if path.suffix == ".ckpt":
        raise BadFileError(
            f"{path}: is MindSpore's checkpoint, which does not say how linears are quantized; "
            "expected quantize with a scheme, as before it was saved, and then "
            "mindspore.load_checkpoint, or a file of save_quantized"
        )
    if path.suffix == ".safetensors":
        return load_whole(network, path, timestep_policy, dtype)
    path = _of_this_rank(path)
    description = read_description(path, attention=True)
    cells, attention = dict(linears(network)), attention_sites(network)
    types = {name: description.type_of(name) for name in cells}
    description.check_all_used(cells, [site.path for site in attention])
    if set(types.values()) <= {FLOAT} and not description.attention:
        raise BadFileError(
            f"{path}: quantizes none of the network's linears, expected one at least"
        )
    _check_policy(types, timestep_policy, description)
    weights = open_weights(description, rank_of(path))
    tensors, dtype = Tensors(weights), dtype or made_for(weights)
    stored = stored_attention(description, tensors, attention, timestep_policy)
    quantized = {}
    for name, kind in types.items():
        linear = _linear(tensors, name, cells[name], kind, dtype or run_dtype(cells[name]))
        if linear is not None:
            scheme = TYPES[kind].make()
            quantized[name] = QuantLinear(linear, timestep_policy=timestep_policy, scheme=scheme)
    steps = _steps(quantized, description)
    if stored:
        attach_attention(network, lambda site: stored.get(site.path))
    for name, cell in quantized.items():  # all or, after an error above, none
        replace_cell(network, name, cell)
    if steps is not None:
        TimestepManager.set_timestep_idx_max(steps)
    _warn_of_others(network, path)
    return network


def _warn_of_others(network: nn.Cell, path: Path) -> None:
    """Says once what the files did not give: a fresh network has fresh values there."""
    given = {
        id(parameter)
        for _, cell in network.cells_and_names()
        if isinstance(cell, QuantLinear)
        for parameter in cell.kept.values()
    }
    left = [name for name, p in network.parameters_and_names() if id(p) not in given]
    if left:
        warnings.warn(
            f"{path}: gives the quantized linears alone; {len(left)} other parameters such as "
            f"{left[0]!r} stay as the network has them. Load those, too, or write all with "
            'save_quantized(..., format="network").',
            stacklevel=4,
        )


def _of_this_rank(path: Path) -> Path:
    """A number at the end of the name stands for the rank, where there are processes."""
    if rank_of(path) is None or not GlobalComm.INITED:
        return path
    return with_rank(path, communication.get_rank())


def _linear(
    tensors: Tensors, name: str, cell: nn.Cell, kind: str, dtype: np.dtype
) -> QuantizedLinear | None:
    """The linear of a layer, None for one that stays float."""
    rows, columns = cell.weight.shape
    if kind == FLOAT:
        found = tensors.shape(f"{name}.weight")
        if found not in (None, (rows, columns)):
            raise BadFileError(
                f"{tensors.checkpoint.place(f'{name}.weight')} is {list(found or ())}, expected "
                f"{[rows, columns]} as the network's layer is"
            )
        return None
    if getattr(cell, "activation", None) is not None:
        raise BadFileError(
            f"{name}: a Dense with a built-in activation cannot be replaced, expected "
            "activation=None with the activation as a Cell of its own"
        )
    linear = read(kind, tensors, name, (rows, columns), dtype)
    return with_bias_of(linear, kind, getattr(cell, "bias", None) is not None, name)


def _check_policy(
    types: Mapping[str, str], policy: TimestepPolicyConfig | None, description: Description
) -> None:
    """Refuses a policy that no layer takes."""
    if policy is None:
        return
    kinds, path = set(types.values()), description.path
    if not kinds & {"W8A8_TIMESTEP", "W4A4_MXFP4"} and not description.attention:
        raise BadFileError(
            f"timestep_policy: no linear and no attention of {path} takes one, expected linears of "
            "W8A8_TIMESTEP"
        )


def _steps(loaded: Mapping[str, QuantLinear], description: Description) -> int | None:
    """T, which all linears of timesteps share; None where there is none."""
    counts = {
        name: len(cell.activation.scale)
        for name, cell in loaded.items()
        if isinstance(cell.activation, TimestepActivation)
    }
    if not counts:
        return None
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[most] != counts[least]:
        raise BadFileError(
            f"{description.path}: {most} has {counts[most]} timesteps and {least} "
            f"{counts[least]}, expected the same number"
        )
    return counts[most]
