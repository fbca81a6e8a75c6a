"""What vllm-omni asks of a directory; docs/vllm_omni_format.md says where each rule is from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ms_quant.diffusers.directory import INDEX
from ms_quant.diffusers.methods import ASCEND, FORMAT, METHODS
from ms_quant.diffusers.plan import ComponentPlan
from ms_quant.diffusers.stored import Stored, read_stored
from ms_quant.errors import BadArgumentError
from ms_quant.formats.ascend.format import DESCRIPTION
from ms_quant.job.output_directory import check_files
from ms_quant.serve.attention import FloatParts
from ms_quant.serve.check import OF_DIFFUSERS, answer, check_arguments
from ms_quant.serve.records import Loaded, Served, ServeRequest, merged, weight_text

TESTED = "vllm-omni 0.30"
ROWS_DIVIDED = ("to_out", "to_out.0", "to_add_out", "net_2", "net.2")
"""Linears whose inputs are divided over ranks, by the ends of vllm-omni's names."""
FLOAT8_DEVICES = ("310p", "910b")


def check(request: ServeRequest) -> Served:
    """What vllm-omni would load how.

    Raises:
        MsQuantError: the directory cannot be read, or is a float one.
    """
    stored = read_stored(request.checkpoint)
    served = Served(FORMAT, request.device)
    served.problems += stored.problems
    if stored.record:
        served.problems += check_files(stored.directory.path, lambda name: "/" not in name)
    for name, plan in stored.plans.items():
        served.problems += _family_problems(plan)
        served.problems += _division_problems(plan, request.tp)
        served.loaded += merged(_rows(name, plan, request.tp))
    served.problems += _place_problems(stored, request)
    served.notes += _notes(stored)
    parts = None if request.attention is None else FloatParts.load(request.attention)
    if parts is not None:
        served.problems += _attention_problems(stored, parts)
        served.notes += parts.vllm_omni_notes()
        served.attention = parts.vllm_omni_config() if parts.wish.get("sparse") else {}
    served.command = command(stored, request.tp, parts)
    return served


def command(stored: Stored, tp: int, parts: FloatParts | None = None) -> list[str]:
    """What serves it; the method is in ``config.json``.

    Raises:
        MsQuantError: vllm-omni has no such attention.
    """
    ranks = [] if tp == 1 else ["--tensor-parallel-size", str(tp)]
    options = {} if parts is None else parts.vllm_omni()
    words = [word for option in options.items() for word in option]
    return ["vllm", "serve", str(stored.directory.path), "--omni", *ranks, *words]


def _attention_problems(stored: Stored, parts: FloatParts) -> Iterator[str]:
    """Layers of a plan that no transformer has."""
    linears = [path for plan in stored.plans.values() for path in plan.component.shapes]
    for layer in dict.fromkeys([*parts.measured, *parts.layers]):
        if not any(path.startswith(f"{layer}.") for path in linears):
            yield (
                f"attention: {layer} is in none of the transformers, expected paths such as "
                f"{linears[0].rpartition('.')[0]}"
            )
            return


def _family_problems(plan: ComponentPlan) -> Iterator[str]:
    component = plan.component
    if not component.family.native:
        yield (
            f"{component.directory}: is a {component.family.name}, for which {TESTED} has no "
            "network of its own; its adapter for diffusers takes no checkpoint of codes"
        )
    wrong = [path for path in plan.linears if path in component.kept]
    if wrong:
        yield (
            f"{component.directory}: {wrong[0]} and {len(wrong) - 1} more are quantized, expected "
            f"float: {component.kept[wrong[0]]}"
        )


def _division_problems(plan: ComponentPlan, tp: int) -> Iterator[str]:
    storage, family = plan.storage, plan.component.family
    for group in plan.quantized:
        for path, spec in group.linears.items():
            divided = family.runtime_name(path).endswith(ROWS_DIVIDED)
            columns, ranks = spec.in_features, tp if divided else 1
            if columns % (ranks * storage.method.multiple):
                yield (
                    f"{path}: {columns} inputs over {ranks} ranks, expected a multiple of "
                    f"{storage.method.multiple} on each for {storage.method.name}"
                )
            if not divided and spec.out_features % tp:
                yield f"{path}: {spec.out_features} outputs, expected a multiple of tp {tp}"
            if divided and tp > 1 and storage.method.name == "mxfp8":
                yield (
                    f"tp is {tp}, expected 1: {TESTED} does not divide the exponents of mxfp8 "
                    f"where inputs are divided ({family.runtime_name(path)})"
                )
                return


def _place_problems(stored: Stored, request: ServeRequest) -> Iterator[str]:
    directory, method = stored.directory, METHODS[stored.method]
    if not (directory.path / INDEX).is_file():
        yield (
            f"{directory.path}: is a transformer alone, expected the directory of a pipeline with "
            f"{INDEX}"
        )
    if method.name != ASCEND and request.device in FLOAT8_DEVICES:
        yield f"{method.name} on {request.device}: expected {method.devices}"


def _notes(stored: Stored) -> Iterator[str]:
    if stored.method == ASCEND:
        yield (
            f"{DESCRIPTION} is read beside the components; that vllm-ascend's linears run in a "
            "diffusion pipeline is inferred from the source"
        )
    else:
        yield f"needs {METHODS[stored.method].devices}"
    yield f"rules of {TESTED}, read in its source and run on a CPU; nothing ran on a device"


def _rows(name: str, plan: ComponentPlan, tp: int) -> Iterator[Loaded]:
    """Linears by their kind, as they are loaded."""
    for group in plan.component.all_groups:
        quantized = group.linears.keys() <= plan.linears.keys()
        paths = list(group.linears)
        rows = sum(spec.out_features for spec in group.linears.values())
        tensors = [t for t in plan.tensors if t.name.rpartition(".")[0] in group.linears]
        method = plan.storage.method.name if quantized else "float"
        scheme = f" {plan.storage.layer.scheme.name}" if method == ASCEND else ""
        start = f"{name}: " if name else ""
        kind = ".".join(group.fused.split(".")[2:])
        yield Loaded(
            start + kind,
            "0" if tp == 1 else "all",
            method + scheme,
            weight_text((rows, group.linears[paths[0]].in_features)),
            1,
            sum(tensor.bytes for tensor in tensors),
        )


def serve_check_directory(
    checkpoint: Path,
    runtime: str,
    tp: int = 1,
    device: str = "",
    attention: Path | None = None,
) -> dict[str, Any]:
    """Checks that vllm-omni can serve a directory of diffusers, without it.

    Returns:
        JSON, as of :func:`ms_quant.serve.check.serve_check`.

    Raises:
        MsQuantError: an argument has no such value, or the directory cannot be read at all.
    """
    check_arguments(runtime, tp, device)
    if runtime != OF_DIFFUSERS:
        raise BadArgumentError(
            f"runtime is {runtime!r}, expected {OF_DIFFUSERS}: {checkpoint} is a directory of "
            "diffusers"
        )
    request = ServeRequest(checkpoint, runtime, tp, device, attention)
    return answer(checkpoint, request, check(request))
