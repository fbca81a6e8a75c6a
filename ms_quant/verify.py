"""Proof that a golden-stick checkpoint is what its runtime expects, and what its source says.

Nothing is run: structure, types and values are checked tensor by tensor, one in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.checkpoint import golden_stick
from ms_quant.checkpoint.finish import RECORD, check_files
from ms_quant.checkpoint.reader import Checkpoint, check_model
from ms_quant.checkpoint.serving import GoldenStickModel
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, block_prefix, load_config, read_json
from ms_quant.models.families import LinearGroup
from ms_quant.numerics.affine import QMAX, QMIN
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan import Plan
from ms_quant.schemes import SCHEMES

DESCRIPTION_ENDINGS = (
    "quantization_description.json",
    "quant_model_description.json",
    "quant_model_description_w8a8sc.json",
)
MAX_OUTPUT_ERROR = 0.1
PROBE_TOKENS, PROBE_STEPS = 64, 32.0


def verify_checkpoint(directory: Path, source: Path | None = None) -> dict[str, Any]:
    """Checks a golden-stick checkpoint.

    Args:
        directory: the checkpoint.
        source: the float checkpoint that it was made from; with it every float tensor is
            compared, and the output error of every quantized linear is measured.

    Returns:
        ``problems`` (one sentence each; empty when the checkpoint is right), ``quantized`` and
        ``float`` counts, and with a source ``layers``: path and relative output error of each.

    Raises:
        MsQuantError: the checkpoint cannot be read at all.
    """
    problems = list(_check_root(directory))
    result: dict[str, Any] = {"checkpoint": str(directory), "problems": problems, "layers": []}
    if problems:
        return result
    config = load_config(directory)
    checkpoint = Checkpoint(directory)
    description = _description(directory)
    problems += _check_description(config, description, directory)
    if problems:
        return result
    plan = _plan_of(config, description)
    expected = {tensor.name: tensor for tensor in golden_stick.tensor_plans(plan)}
    problems += _check_tensors(checkpoint, expected)
    problems += [
        f"{directory / golden_stick.DESCRIPTION}: names {key!r}, expected only the model's tensors"
        for key in sorted(set(description) - set(expected))
        if "." in key
    ]
    problems += [
        f"{directory / golden_stick.DESCRIPTION}: does not name {key!r}"
        for key in sorted(set(expected) - set(description))
    ]
    result["quantized"], result["float"] = len(plan.quantized()), len(plan.float_linears())
    if problems:
        return result
    model = GoldenStickModel(directory)
    for index in range(config.num_layers):
        for group in plan.groups(index):
            problems += _check_group(model, f"{block_prefix(index)}", group)
    problems += _check_floats(checkpoint, expected)
    if source is not None and not problems:
        layers, found = _compare(model, plan, source)
        result["layers"] = layers
        problems += found
    return result


def _description(directory: Path) -> dict[str, Any]:
    found = sorted(p.name for p in directory.glob("*.json") if p.name.endswith(DESCRIPTION_ENDINGS))
    if found == ["quant_model_description_w8a8sc.json"]:
        raise MsQuantError(f"{directory}: a W8A8SC checkpoint; sparse-compress verify proves those")
    if found != [golden_stick.DESCRIPTION]:
        raise MsQuantError(
            f"{directory}: has the descriptions {found}, expected exactly "
            f"['{golden_stick.DESCRIPTION}']"
        )
    return read_json(directory / golden_stick.DESCRIPTION, 256 << 20)


def _check_root(directory: Path) -> Iterator[str]:
    raw = read_json(directory / "config.json")
    for part in (raw, raw.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if key in part:
                yield f"{directory / 'config.json'}: has {key}, expected none"
    if (directory / RECORD).exists():
        yield from check_files(directory)
    else:
        yield f"{directory}: has no {RECORD}, its files cannot be compared with what was written"


def _check_description(
    config: ModelConfig, description: dict[str, Any], directory: Path
) -> Iterator[str]:
    where = directory / golden_stick.DESCRIPTION
    known = ("FLOAT", *SCHEMES)
    modules: dict[str, str] = {}
    for key, value in description.items():
        if "." not in key:
            continue
        if value not in known:
            yield f"{where}: {key} is {value!r}, expected one of {', '.join(known)}"
            continue
        module = key.rpartition(".")[0]
        if modules.setdefault(module, value) != value:
            yield f"{where}: tensors of {module} are {modules[module]} and {value}, expected one"
    for index in range(config.num_layers):
        for group in config.family.groups:
            names = [f"{block_prefix(index)}{member}" for member in group.members]
            for name in names:
                if name not in modules:
                    yield f"{where}: has no entry for {name}.weight"
            kinds = {modules.get(name) for name in names} - {None}
            if len(kinds) > 1:
                listed = ", ".join(f"{name} {modules.get(name)}" for name in names)
                yield f"{where}: {listed}; expected one scheme, the runtime fuses them"
    schemes = {value for value in modules.values() if value != "FLOAT"}
    if len(schemes) > 1:
        yield f"{where}: mixes the schemes {', '.join(sorted(schemes))}, expected one"


def _plan_of(config: ModelConfig, description: dict[str, Any]) -> Plan:
    """The plan that a consistent description stands for."""
    schemes = [value for key, value in description.items() if "." in key and value in SCHEMES]
    floats = frozenset(
        f"{block_prefix(index)}{group.name}"
        for index in range(config.num_layers)
        for group in config.family.groups
        if description.get(f"{block_prefix(index)}{group.members[0]}.weight") == "FLOAT"
    )
    scheme = SCHEMES[schemes[0]] if schemes else SCHEMES["W8A8"]
    return Plan(config, scheme, "minmax", 0.5, DTYPES[config.dtype], floats)


def _check_tensors(checkpoint: Checkpoint, expected: dict) -> Iterator[str]:
    names = set(checkpoint.names)
    for name, tensor in expected.items():
        if name not in names:
            yield (
                f"{checkpoint.directory}: tensor {name!r} is missing, expected {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
            continue
        info = checkpoint.info(name)
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            yield (
                f"{checkpoint.file_of(name).path}: tensor {name!r} is {info.dtype} "
                f"{list(info.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )
    for name in sorted(names - set(expected)):
        yield f"{checkpoint.file_of(name).path}: unknown tensor {name!r}, expected none"


def _check_floats(checkpoint: Checkpoint, expected: dict) -> Iterator[str]:
    """Reads every float tensor, which refuses NaN and inf; scales must be positive too."""
    for name, tensor in expected.items():
        if tensor.dtype.kind == "i":
            continue
        try:
            array = checkpoint.read_float32(name)
        except MsQuantError as error:
            yield str(error)
            continue
        if name.endswith("_scale") and not (array > 0).all():
            wrong = int(np.count_nonzero(array <= 0))
            yield f"{name}: {wrong} scales are not positive, expected all to be"


def _check_group(model: GoldenStickModel, prefix: str, group: LinearGroup) -> Iterator[str]:
    """What the linears of one group must have in common."""
    first = None
    for member in group.members:
        path = prefix + member
        try:
            linear = model.linear(path)
        except MsQuantError as error:
            yield str(error)
            continue
        if linear is None or linear.activation is None:
            continue
        if first is None:
            first = (path, linear.activation)
        elif linear.activation.offset != first[1].offset:
            yield f"{path}.input_offset: differs from that of {first[0]}, the runtime fuses them"
        elif not np.array_equal(linear.activation.input_scale, first[1].input_scale):
            yield f"{path}.input_scale: differs from that of {first[0]}, the runtime fuses them"


def _compare(
    model: GoldenStickModel, plan: Plan, source: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Each linear's output error against the source, and differences of float tensors."""
    checkpoint = Checkpoint(source)
    check_model(checkpoint, load_config(source))
    if model.config.parameter_shapes() != load_config(source).parameter_shapes():
        return [], [f"{source}: another model than {model.checkpoint.directory}"]
    layers, problems, quantized = [], [], set(plan.quantized())
    for name in plan.config.parameter_shapes():
        path, _, suffix = name.rpartition(".")
        exact = checkpoint.read_float32(name)
        if path in quantized and suffix == "weight":
            linear = model.linear(path)
            assert linear is not None
            error = output_error(linear, exact)
            layers.append({"layer": path, "output_error": error})
            if not error <= MAX_OUTPUT_ERROR:
                problems.append(
                    f"{path}: relative output error {error:.3f} against {source}, expected at most "
                    f"{MAX_OUTPUT_ERROR}"
                )
        elif not np.array_equal(model.tensor(name), exact.astype(plan.dtype).astype(np.float32)):
            problems.append(f"{name}: differs from {source} rounded to {plan.dtype.name}")
    return layers, problems


def output_error(linear: QuantizedLinear, weight: np.ndarray) -> float:
    """Relative error of an int8 linear's output, on random inputs of the range it was made for.

    Inputs are normal with a standard deviation of 32 quantization steps in every channel (1 for
    per-token activations), cut to the range that the offset leaves, 64 tokens, seed 0. The error
    is ||y_int8 - y_float|| / ||y_float||, without the bias.

    Args:
        linear: the int8 linear.
        weight: float32 (out, in), the source's.
    """
    x = np.random.default_rng(0).standard_normal((PROBE_TOKENS, weight.shape[1]), np.float32)
    if linear.activation is not None:
        low, high = QMIN - linear.activation.offset, QMAX - linear.activation.offset
        x = np.clip(x * np.float32(PROBE_STEPS), low, high) * linear.activation.input_scale
    exact = x @ weight.T
    bias = 0 if linear.bias is None else linear.bias
    norm = float(np.linalg.norm(exact)) or 1.0
    return float(np.linalg.norm(linear.forward(x) - bias - exact)) / norm
