"""A finished checkpoint in another format, without loss, or a sentence why there is none.

The codes, scales and float tensors are those that were; only names, packing and what follows from
others change. Nothing is calibrated or rounded again, so that going there and back gives the same
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.algorithms import PLAIN, get_algorithms
from ms_quant.errors import BadFileError, MsQuantError, UnsupportedError
from ms_quant.files.companion_files import companion_files
from ms_quant.files.strict_json import read_json
from ms_quant.formats import kv_cache
from ms_quant.formats.checks import check_runs, check_shapes, format_of
from ms_quant.formats.format import Tensors
from ms_quant.formats.opening import QuantizedModel
from ms_quant.formats.registry import FORMATS
from ms_quant.formats.source_kind import model_directory
from ms_quant.formats.structure import PROVENANCE, check_kind, is_ours
from ms_quant.job.output_directory import (
    MAX_RECORD_BYTES,
    RECORD,
    OutputDirectory,
    check_files,
)
from ms_quant.job.unlisted import unlisted_problems
from ms_quant.models.names import GroupId, parse_linear
from ms_quant.numerics.activation import Phased, StaticActivation
from ms_quant.numerics.float8_blocks import Float8BlockGrid
from ms_quant.numerics.float_grid import Float8Grid
from ms_quant.numerics.grid import AffineGrid, TwoLevelGrid
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.float_copy import FLOAT, copy_as_float
from ms_quant.pipeline.paths import check_paths
from ms_quant.pipeline.result import Output, output_of
from ms_quant.pipeline.writer import write_output
from ms_quant.plan.layer import LayerPlan, layer_plan, recorded_layer
from ms_quant.plan.plan import Plan
from ms_quant.progress import PartProgress, silent
from ms_quant.schemes.support import store
from ms_quant.schemes.table import get_scheme
from ms_quant.verify.checkpoint import record_problems
from ms_quant.verify.provenance import provenance, without_algorithms

PLANNED = (
    "scheme",
    "algorithm",
    "scheme_options",
    "algorithm_options",
    "scale_dtype",
    "mixed",
    "kv_cache",
    "float_caches",
    "format",
    "fold",
    "dtype",
)
"""What a plan's own record states."""


def convert_checkpoint(
    directory: str | PathLike[str],
    output: str | PathLike[str],
    format: str,
    *,
    shard_bytes: int | None = None,
    progress: PartProgress | None = None,
) -> Output:
    """Makes a checkpoint of another format with the same numbers.

    Args:
        directory: the checkpoint; one that others made is taken as far as it can be seen to be
            right, and the record of the output says so. For ``"float"`` a model in FP8 or packed
            integers.
        output: directory to make.
        format: name of the format, or ``"float"`` for a float model in bfloat16.
        shard_bytes: largest output file; None is as the checkpoint was made.
        progress: told how much is written, 0 to 1.

    Returns:
        Output: what was made.

    Raises:
        MsQuantError: the checkpoint is damaged or the other format cannot hold what it holds;
            names the tensor. No output directory is left behind.

    Examples:
        >>> import ms_quant
        >>> made = ms_quant.quantize_checkpoint(
        ...     "Qwen3-8B", "one", "W8A8_DYNAMIC", formats=["ascend"]
        ... )
        >>> other = ms_quant.convert_checkpoint("one", "two", "compressed-tensors")
        >>> other.format, other.scheme
        ('compressed-tensors', 'W8A8_DYNAMIC')
        >>> other.served_by
        ('vLLM (the checkpoint says how)', 'vllm-ascend')
    """
    directory, output = model_directory(Path(directory)), Path(output)
    if format == FLOAT:
        return copy_as_float(directory, output, shard_bytes or DEFAULTS.shard_bytes, progress)
    check_paths(directory, output, output.with_name(output.name + ".job"))
    check_kind(directory)
    model, content = _open(directory)
    record = content["record"]
    plan = _other_plan(model, record, format)
    sizes = {"shard_bytes": shard_bytes} if shard_bytes is not None else {}
    rest = {key: value for key, value in record.items() if key not in PLANNED}
    planned = without_algorithms(plan.record()) if plan.foreign else plan.record()
    made = OutputDirectory(
        output,
        {**planned, **rest, **sizes},
        any_environment=True,
        copied=companion_files(directory),
    )
    finished = made.finished
    if not finished:
        converted = _Converted(model, plan)
        converted.check()
        facts = {key: content[key] for key in content if key not in ("record", "files", "sha256")}
        size = made.record.get("shard_bytes")
        if type(size) is not int or size <= 0:
            raise BadFileError(
                f"{directory / RECORD}: shard_bytes is {size!r:.80}, expected a positive number"
            )
        with made.open_or_discard():
            write_output(plan, converted, made, size, directory, facts, progress or silent)
    return output_of(plan, output, finished, calibrated=False, measured={})


def _open(directory: Path) -> tuple[QuantizedModel, dict[str, Any]]:
    """A checkpoint that is not damaged, and its record; of one that others made what is known."""
    if not is_ours(directory):
        model = QuantizedModel(directory)
        known = {PROVENANCE: provenance(model.structure), "shard_bytes": DEFAULTS.shard_bytes}
        return model, {"record": known}
    content = _record(directory)
    damaged = next(iter([*check_files(directory), *unlisted_problems(directory, [])]), None)
    if damaged:
        raise BadFileError(damaged)
    model = QuantizedModel(directory)
    problem = next(record_problems(directory / RECORD, content, model.plan), None)
    if problem:
        raise BadFileError(problem)
    return model, content


def _record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    content = read_json(path, MAX_RECORD_BYTES)
    if not isinstance(content.get("record"), Mapping):
        raise BadFileError(
            f"{path}: record is {content.get('record')!r:.80}, expected what was done"
        )
    return content


def _other_plan(model: QuantizedModel, record: Mapping[str, Any], format: str) -> Plan:
    """The same schemes and algorithms as another format holds them."""
    plan = model.plan
    if format not in FORMATS:
        known = ", ".join([*FORMATS, FLOAT])
        raise BadFileError(f"format {format!r} is unknown, expected one of {known}")
    if format == plan.format:
        raise BadFileError(f"the checkpoint is of format {format} already, expected another")
    if plan.kv_cache and not FORMATS[format].holds_cache:
        raise UnsupportedError(f"format {format}: has no place for keys and values in int8")
    layers: dict[GroupId, LayerPlan | None] = {}
    made: dict[str, LayerPlan] = {}
    for group, layer in plan.layers.items():
        if layer is None:
            layers[group] = None
            continue
        said = recorded_layer(record, str(group))
        key = f"{id(layer)} {said.get('algorithm')} {said.get('algorithm_options')!r}"
        if key not in made:
            made[key] = _other_layer(layer, said, str(group), format)
        layers[group] = made[key]
    if not any(layers.values()):
        raise BadFileError("every linear is float, there is nothing to convert")
    other = replace(plan, format=format, layers=layers)
    for index in range(plan.config.num_blocks):
        for linears in plan.groups(index):
            check_shapes(other, index, linears)
            check_runs(other, index, linears)
    return other


def _other_layer(
    layer: LayerPlan, recorded: Mapping[str, Any], group: str, format: str
) -> LayerPlan:
    options = recorded.get("algorithm_options") or {}
    settings = {f"{name}.{key}": v for name, chosen in options.items() for key, v in chosen.items()}
    algorithm = PLAIN if layer.foreign else str(recorded.get("algorithm"))
    algorithms = get_algorithms(algorithm, layer.scheme, settings)
    name, chosen, dtype = layer.scheme.name, layer.scheme.chosen, layer.dtype
    target = layer.storage.target if algorithms.any("smooths") else None
    try:
        other = layer_plan(
            name, algorithm, dtype, options=chosen, settings=settings, format=format, target=target
        )
    except MsQuantError as error:
        if target is None:
            raise
        store(get_scheme(name, **chosen), dtype, format)  # which may be what is refused
        raise BadFileError(
            f"{group}: its smoothing vector is in the {target.value}; {error}, so quantize with "
            "--fold norm to convert it"
        ) from None
    if other.scheme.weight != layer.scheme.weight:
        raise BadFileError(
            f"{group}: {layer.storage.format} and {format} checkpoints hold {name} in different "
            f"codes, expected one that is quantized with --format {format}"
        )
    storage = replace(other.storage, foreign=layer.foreign)
    if layer.storage.scale_dtype == dtype:
        storage = storage.narrowed()
    elif storage.support.float32_scales:
        storage = storage.widened()
    return LayerPlan(other.scheme, storage, algorithms)


@dataclass
class _Converted:
    """The tensors of the output, from the checkpoint that there is.

    Attributes:
        model: that checkpoint.
        plan: of the output.
    """

    model: QuantizedModel
    plan: Plan

    def __post_init__(self) -> None:
        self.cached: tuple[str, QuantizedLinear | None] = "", None

    def check(self) -> None:
        """Refuses, before anything is written, what the output would not tell again."""
        for path in self.plan.quantized():
            linear = self.linear(path)
            self._check_bias(path, linear)
            self._check_stated(path, linear)

    def cache_scale(self, path: str) -> np.ndarray:
        return kv_cache.read_scale(self.model.checkpoint, path)

    def floats(self, name: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        for _, part in self.model.checkpoint.float_chunks(self.model.stored_name(name)):
            yield part if part.dtype == dtype else part.astype(np.float32).astype(dtype)

    def linear(self, path: str, with_codes: bool = True) -> QuantizedLinear:
        """The linear as the output's format splits its numbers."""
        if self.cached[0] != path:
            linear = self.model.linear(path)
            assert linear is not None
            self.cached = path, _split(linear, self.plan, path)
        found = self.cached[1]
        assert found is not None
        return found

    def _check_bias(self, path: str, linear: QuantizedLinear) -> None:
        dtype = format_of(self.plan).bias_dtype(self.plan.quantized_layer(path), path)
        if linear.bias is not None:
            _check_exact(linear.bias, dtype, f"{path}.bias")

    def _check_stated(self, path: str, linear: QuantizedLinear) -> None:
        """Refuses to lose how others have rounded ``quant_bias``."""
        if linear.stated is None:
            return
        layer = self.plan.quantized_layer(path)
        activation = layer.scheme.activation
        folds = isinstance(activation, Phased) or getattr(activation, "folds_bias", False)
        held = "quant_bias" in _stored(self.plan, path)
        if not held or (folds != linear.stated.folds_bias and linear.bias is not None):
            raise UnsupportedError(
                f"{path}.quant_bias: is rounded otherwise than the other tensors give, format "
                f"{self.plan.format} does not hold it"
            )


def _stored(plan: Plan, path: str) -> Tensors:
    """The tensors of a quantized linear in the output."""
    found = parse_linear(path)
    block = plan.config.block(found.block)
    group = block.group_of(found.inner)
    assert group is not None
    layer, spec = plan.layer(found.block, group), block.linears[found.inner]
    return format_of(plan).linear_plan(layer, group, spec)


def _split(linear: QuantizedLinear, plan: Plan, path: str) -> QuantizedLinear:
    """The same linear with the scales of its weight and its input apart, in the stored types.

    Raises:
        MsQuantError: they cannot be told apart, or the type does not hold them.
    """
    grid, static = linear.grid, linear.activation
    dtype = plan.quantized_layer(path).storage.scale_dtype
    if not isinstance(static, StaticActivation):
        _check_scales(linear, plan, path)
        return linear
    static = replace(static, multiplied_in=None)  # which goes with a format, not with numbers
    linear, step = replace(linear, activation=static), static.input_scale[:1]
    if (static.input_scale != step).any():
        raise BadFileError(
            f"{path}.input_scale: has {len(np.unique(static.input_scale))} values, format "
            f"{plan.format} holds one"
        )
    if "weight_scale" not in _stored(plan, path):
        return linear  # the product is stored
    assert isinstance(grid, AffineGrid)
    scale = (linear.deq_scale / step).astype(dtype).astype(np.float32)
    if (scale * step != linear.deq_scale).any():
        raise BadFileError(
            f"{path}.deq_scale: is not input_scale times scales that {dtype.name} holds, as "
            f"format {plan.format} stores them"
        )
    grid = grid.format.grid({"weight_scale": scale[:, None]})
    return replace(linear, grid=grid, activation=replace(static, scale=np.float32(step[0])))


def _check_scales(linear: QuantizedLinear, plan: Plan, path: str) -> None:
    """Refuses scales of a weight that the output's type does not hold."""
    if not isinstance(linear.grid, AffineGrid | Float8Grid | Float8BlockGrid | TwoLevelGrid):
        return
    own = plan.quantized_layer(path).storage.scale_dtype
    for dtype in {own, _stored(plan, path)["weight_scale"][0]}:
        _check_exact(linear.grid.scale, dtype, f"{path}.weight_scale")


def _check_exact(array: np.ndarray, dtype: np.dtype, name: str) -> None:
    with np.errstate(over="ignore"):
        stored = array.astype(dtype).astype(np.float32)
    wrong = int(np.count_nonzero(stored != array))
    if wrong:
        raise BadFileError(
            f"{name}: {wrong} of {array.size} values are not exact in {dtype.name}, which the "
            "other format stores"
        )
