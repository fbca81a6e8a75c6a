"""Attention in the file of a whole network: plans in the header, arrays among the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from mindspore import nn

from ms_quant.attention.rules import SparseRule
from ms_quant.attention.schedule import StepWindow
from ms_quant.cells.diffusion.diffusion_attention import DiffusionAttention
from ms_quant.cells.diffusion.hook import hook_of
from ms_quant.cells.diffusion.plan import STATIC, AttentionPlan, as_tuple
from ms_quant.cells.diffusion.sites import attention_sites
from ms_quant.cells.tree import host_array
from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.safetensors_file import SafetensorsFile
from ms_quant.timestep import TimestepPolicyConfig

ROTATIONS = ("q_rot", "k_rot")
SCALES = ("fa_q.scale", "fa_k.scale", "fa_v.scale")


def attached(network: nn.Cell) -> dict[str, DiffusionAttention]:
    """What quantize attached to a network, by path.

    Raises:
        MsQuantError: something else is attached, which no file holds.
    """
    hooks = {path: hook_of(cell) for path, cell in network.cells_and_names()}
    found = {path: hook.function for path, hook in hooks.items() if hook is not None}
    made = {path: cell for path, cell in found.items() if isinstance(cell, DiffusionAttention)}
    for path in found.keys() - made.keys():
        raise BadFileError(
            f"{path}: has an attention function of its own, expected what quantize attaches, or "
            "detach_attention first"
        )
    return made


def stated(cells: Mapping[str, DiffusionAttention]) -> dict[str, dict[str, Any]]:
    """What the header says of each."""
    return {path: asdict(cell.plan) for path, cell in cells.items()}


def arrays(cells: Mapping[str, DiffusionAttention]) -> dict[str, np.ndarray]:
    """Rotations and static scales, by the names of their tensors."""
    found: dict[str, np.ndarray] = {}
    for path, cell in cells.items():
        for name, parameter in cell._params.items():
            found[f"{path}.{name}"] = host_array(parameter)
        for name, scale in zip(SCALES, cell.scales or (), strict=False):
            found[f"{path}.{name}"] = np.asarray(scale, np.float32)
    return found


def load_attention(
    network: nn.Cell,
    file: SafetensorsFile,
    plans: Mapping[str, Any],
    policy: TimestepPolicyConfig | None,
) -> dict[str, DiffusionAttention]:
    """The attention that a header states.

    Raises:
        MsQuantError: the network has no such attention, or a plan or an array is malformed.
    """
    paths = {site.path for site in attention_sites(network) if site.is_self}
    made = {}
    for path, row in plans.items():
        if path not in paths:
            raise BadFileError(
                f"{file.path}: holds attention of {path!r:.80}, the network has no self attention "
                "there"
            )
        try:
            plan = _plan(row)
            rotations = _read(file, path, ROTATIONS)
            scales = _read(file, path, SCALES) if plan.kind == STATIC else None
            made[path] = DiffusionAttention(plan, policy, rotations, scales)
        except (MsQuantError, TypeError, KeyError) as error:
            raise BadFileError(f"{file.path}: attention of {path}: {error}") from None
    return made


def _plan(row: Mapping[str, Any]) -> AttentionPlan:
    given = dict(row)
    sparse, window = given.pop("sparse"), given.pop("window")
    if sparse is not None:
        sparse = SparseRule(**{**sparse, "block_shape": tuple(sparse["block_shape"])})
    given |= as_tuple(given, "latent_shape", "plan")
    given |= as_tuple(given, "float_steps", "plan")
    return AttentionPlan(sparse=sparse, window=StepWindow(**window), **given)


def _read(file: SafetensorsFile, path: str, names: tuple[str, ...]) -> Any:
    """Arrays that are all there, or None."""
    stored = [f"{path}.{name}" for name in names]
    if not any(name in file.tensors for name in stored):
        return None
    found = []
    for name in stored:
        if name not in file.tensors or file.info(name).dtype != np.float32:
            raise BadFileError(f"tensor {name!r} is not there in float32, expected it")
        found.append(file.read(name))
        if found[-1].ndim != 2 or not np.isfinite(found[-1]).all():
            raise BadFileError(f"tensor {name!r} is no finite matrix, expected one")
    return tuple(found)
