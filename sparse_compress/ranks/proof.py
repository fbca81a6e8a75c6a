"""What verification needs to make the int8 weights again from the source checkpoint.

For each block a file with the calibration's results: per group the norm of each input channel and
the activation's parameters, per linear the scale of each row. From them and the source's weight
follow the pruned and the int8 weight, bit for bit, without running the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import FloatTensors
from ms_quant.files.safetensors_file import SafetensorsFile, open_file
from ms_quant.files.strict_json import parse_json
from ms_quant.files.writer import FileRecord, TensorPlan, write_file
from ms_quant.job.directory import JobDirectory
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.names import block_prefix
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, int8_linear
from sparse_compress.layouts import Layout, proof_file
from sparse_compress.layouts.fp16 import SMALLEST_NORMAL
from sparse_compress.rate.prune import Pruning, prune, pruned_count

FLOAT32, INT8 = np.dtype(np.float32), np.dtype(np.int8)


def proof_plans(layout: Layout, index: int) -> list[TensorPlan]:
    """The tensors of a block's proof."""
    plans, block = [], layout.config.block(index)
    for group in compressed_groups(layout, index):
        channels = group.in_features
        plans += [
            TensorPlan(f"{group.name}.l2_norm", FLOAT32, (channels,)),
            TensorPlan(f"{group.name}.input_scale", FLOAT32, (channels,)),
            TensorPlan(f"{group.name}.act_scale", FLOAT32, (1,)),
            TensorPlan(f"{group.name}.input_offset", INT8, (1,)),
        ]
        for member in group.members:
            rows = block.linears[member].out_features
            plans.append(TensorPlan(f"{member}.weight_scale", FLOAT32, (rows,)))
    return list(dict.fromkeys(plans))  # linears that are not fused share a group's


def compressed_groups(layout: Layout, index: int) -> list[LinearGroup]:
    """The groups of a block that are compressed."""
    prefix = block_prefix(index)
    return [
        group for group in layout.groups(index) if f"{prefix}{group.fused}" in layout.compressed
    ]


def write_proof(
    path: Path,
    layout: Layout,
    index: int,
    job: JobDirectory,
    checkpoint: FloatTensors,
    pruning: Pruning | None,
) -> FileRecord:
    """Writes a block's proof, and counts its zeros.

    The counts are in the file's metadata: for each linear ``size``, ``pruned``, ``zeros`` of the
    int8 weight, ``source_zeros`` that were 0 without pruning, and ``rounded`` ones, that rounding
    to int8 made. Without pruning the metadata hold the relative squared error of each weight, too.
    """
    tensors: dict[str, np.ndarray] = {}
    counts: dict[str, dict[str, int]] = {}
    errors: dict[str, float] = {}
    for group in compressed_groups(layout, index):
        norm = job.statistic(index, f"{group.name}.l2_norm")
        tensors[f"{group.name}.l2_norm"] = norm
        for member in group.members:
            linear = job.linear(index, member)
            tensors[f"{member}.weight_scale"] = linear.weight_scale
            source = checkpoint.read_float32(f"{block_prefix(index)}{member}.weight")
            if pruning is None:
                counts[member] = _count(linear.weight, source, 0.0)
                errors[member] = weight_error(source, linear)
                continue
            pruned = prune(source, pruning.share, norm if pruning.kind == "activation" else None)
            counts[member] = _count(linear.weight, pruned, pruning.share)
        low = int(np.count_nonzero(linear.static.input_scale <= SMALLEST_NORMAL))
        counts[group.members[0]]["input_scale_raised"] = low
        tensors.update(_activation_tensors(group, linear.static))
    metadata = {"counts": json.dumps(counts, sort_keys=True)}
    if errors:
        metadata["errors"] = json.dumps(errors, sort_keys=True)
    return write_file(path, proof_plans(layout, index), lambda plan: tensors[plan.name], metadata)


def weight_error(source: np.ndarray, linear: QuantizedLinear) -> float:
    """Squared difference of a weight and the int8 one, over the square of the former.

    Both are taken with the smoothing. The sums are in float64, so that any machine finds the same
    but for the last digits.
    """
    smoothed = (source * linear.static.smooth).astype(np.float64)
    wrong = smoothed - linear.weight * linear.weight_scale[:, None].astype(np.float64)
    return float(np.square(wrong).sum() / max(np.square(smoothed).sum(), 1e-300))


def _count(weight: np.ndarray, pruned: np.ndarray, sparsity: float) -> dict[str, int]:
    target = pruned_count(sparsity, weight.size)
    float_zeros = weight.size - int(np.count_nonzero(pruned))
    zeros = weight.size - int(np.count_nonzero(weight))
    return {
        "size": weight.size,
        "zeros": zeros,
        "pruned": target,
        "source_zeros": float_zeros - target,
        "rounded": zeros - float_zeros,
    }


def _activation_tensors(group: LinearGroup, activation: StaticActivation) -> dict[str, np.ndarray]:
    return {
        f"{group.name}.input_scale": activation.input_scale,
        f"{group.name}.act_scale": np.array([activation.scale], np.float32),
        f"{group.name}.input_offset": np.array([activation.offset], np.int8),
    }


class Proof:
    """The proof of one block.

    Args:
        directory: the checkpoint.
        layout: its layout.
        index: the block.

    Raises:
        MsQuantError: the file is missing or malformed, or holds other tensors than it should.
    """

    def __init__(self, directory: Path, layout: Layout, index: int):
        self.file: SafetensorsFile = open_file(directory / proof_file(index))
        plans = {plan.name: plan for plan in proof_plans(layout, index)}
        for name in sorted(set(plans) ^ set(self.file.tensors)):
            state = "is missing" if name in plans else "is unknown"
            raise MsQuantError(f"{self.file.path}: tensor {name!r} {state}")
        for name, plan in plans.items():
            info = self.file.info(name)
            if (info.dtype, info.shape) != (plan.dtype, plan.shape):
                raise MsQuantError(
                    f"{self.file.path}: tensor {name!r} is {info.dtype} {list(info.shape)}, "
                    f"expected {plan.dtype} {list(plan.shape)}"
                )

    def counts(self) -> dict[str, dict[str, int]]:
        """The counts of zeros of each linear, as :func:`write_proof` says.

        Raises:
            MsQuantError: the metadata does not hold them.
        """
        try:
            counts = parse_json(self.file.metadata.get("counts", "").encode())
            return {
                str(member): {str(key): int(count) for key, count in found.items()}
                for member, found in counts.items()
            }
        except (ValueError, TypeError, AttributeError, OverflowError):
            raise MsQuantError(
                f"{self.file.path}: metadata 'counts' is malformed, expected counts of zeros"
            ) from None

    def error(self, member: str) -> float:
        """The stated relative error of a weight.

        Raises:
            MsQuantError: the metadata do not hold it.
        """
        try:
            return float(parse_json(self.file.metadata.get("errors", "").encode())[member])
        except (ValueError, TypeError, KeyError, OverflowError):
            raise MsQuantError(
                f"{self.file.path}: metadata 'errors' is malformed, expected that of {member}"
            ) from None

    def norm(self, group: LinearGroup) -> np.ndarray:
        return self._finite(f"{group.name}.l2_norm", 0.0)

    def activation(self, group: LinearGroup) -> StaticActivation:
        return StaticActivation(
            self._finite(f"{group.name}.act_scale")[0],
            int(self.file.read(f"{group.name}.input_offset")[0]),
            self._finite(f"{group.name}.input_scale"),
        )

    def weight_scale(self, member: str) -> np.ndarray:
        return self._finite(f"{member}.weight_scale")

    def _finite(self, name: str, least: float = float(np.finfo(np.float32).tiny)) -> np.ndarray:
        array = self.file.read(name)
        wrong = array.size - int(np.count_nonzero(np.isfinite(array) & (array >= least)))
        if wrong:
            raise MsQuantError(
                f"{self.file.path}: tensor {name!r} holds {wrong} values of {array.size} that are "
                f"not finite or below {least:g}"
            )
        return array

    def problem(self, group: LinearGroup, linears: Mapping[str, QuantizedLinear]) -> str | None:
        """How the decoded linears of a group differ from the recorded parameters, or None."""
        activation = self.activation(group)
        for member, linear in linears.items():
            stated = int8_linear(linear.weight, self.weight_scale(member), None, activation)
            pairs: dict[str, tuple[Any, Any]] = {
                "input_scale": (linear.static.input_scale, activation.input_scale),
                "input_offset": (linear.static.offset, activation.offset),
                "deq_scale": (linear.deq_scale, stated.deq_scale),
            }
            for name, (found, expected) in pairs.items():
                wrong = int(np.count_nonzero(found != expected))
                if wrong:
                    return f"{name} differs from {self.file.path} in {wrong} of {np.size(found)}"
        return None

    def smoothed(self, group: LinearGroup, source: np.ndarray, pruning: Pruning) -> np.ndarray:
        """The pruned and smoothed float32 weight, (out, in), that was rounded to int8.

        Args:
            group: the linear's group.
            source: float32 (out, in), the weight of the source checkpoint.
            pruning: what was pruned.
        """
        norm = self.norm(group) if pruning.kind == "activation" else None
        return prune(source, pruning.share, norm) * self.activation(group).smooth
