"""A dry run of serving: what a runtime will load how, or why it will not.

Rules of checkpoints that other packages make are theirs, under the entry point group
``ms_quant.serve_checks``: a function that takes a :class:`ServeRequest` and returns
:class:`Served`, or None when the checkpoint is not of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError
from ms_quant.formats.plugins import first_answer
from ms_quant.formats.source_kind import model_directory
from ms_quant.serve import mindie, mindie_sd, vllm, vllm_ascend, vllm_mindspore
from ms_quant.serve.records import DEVICES, Served, ServeRequest

RUNTIMES: dict[str, Callable[[ServeRequest], Served]] = {
    "vllm-mindspore": vllm_mindspore.check,
    "vllm-ascend": vllm_ascend.check,
    "mindie": mindie.check,
    "vllm": vllm.check,
}
OF_DIFFUSERS = "vllm-omni"
"""The runtime that serves directories of diffusers, which have rules of their own."""
OF_NETWORKS = "mindie-sd"
"""The runtime that serves the files of networks, which need no configuration of a model."""
MAX_TP = 1024


def serve_check(
    checkpoint: Path,
    runtime: str,
    tp: int = 1,
    device: str = "",
    attention: Path | None = None,
) -> dict[str, Any]:
    """Checks that a runtime can serve a checkpoint, without the runtime.

    Args:
        checkpoint: the directory.
        runtime: one of ``RUNTIMES``.
        tp: tensor-parallel ranks.
        device: one of ``DEVICES``, or "" for the one that such checkpoints are made for.
        attention: file of what attention becomes by layer and step, of ``mindie-sd`` alone.

    Returns:
        JSON: ``checkpoint``, ``format``, ``runtime``, ``tp``, ``device``; ``problems`` (one
        sentence each; empty when it can) and ``notes``; ``loaded``: a row for each kind of layer
        and rank; ``command``, ``environment`` and ``line``, both as one types them, empty when
        there are problems; with an attention plan ``attention``, the runtime's JSON for it.

    Raises:
        MsQuantError: an argument has no such value, or the directory cannot be read at all.
    """
    check_arguments(runtime, tp, device)
    if runtime == OF_DIFFUSERS:
        raise BadFileError(
            f"{checkpoint}: is no directory of diffusers, which {runtime} serves here, expected "
            f"one of the runtimes {', '.join(RUNTIMES)}"
        )
    if runtime == OF_NETWORKS:
        request = ServeRequest(checkpoint, runtime, tp, device, attention)
        return answer(checkpoint, request, mindie_sd.check(request))
    if attention is not None:
        raise BadFileError(
            f"attention: {attention} with runtime {runtime}, expected {OF_DIFFUSERS} or "
            f"{OF_NETWORKS}, which serve diffusion networks"
        )
    request = ServeRequest(model_directory(checkpoint), runtime, tp, device)
    return answer(checkpoint, request, _by_others(request) or RUNTIMES[runtime](request))


def answer(checkpoint: Path, request: ServeRequest, served: Served) -> dict[str, Any]:
    """What a check found, as JSON."""
    right = not served.problems
    return {
        "checkpoint": str(checkpoint),
        "format": served.format,
        "runtime": request.runtime,
        "tp": request.tp,
        "device": served.device,
        "problems": list(dict.fromkeys(served.problems)),
        "notes": served.notes,
        "loaded": [asdict(row) for row in served.loaded],
        "command": served.command if right else [],
        "environment": served.environment if right else {},
        "line": served.line if right else "",
        **({"attention": served.attention if right else {}} if request.attention else {}),
    }


def check_arguments(runtime: str, tp: int, device: str) -> None:
    """Refuses arguments that have no such value.

    Raises:
        MsQuantError: names the argument.
    """
    known = (*RUNTIMES, OF_NETWORKS, OF_DIFFUSERS)
    if runtime not in known:
        raise BadFileError(f"runtime {runtime!r} is unknown, expected one of {', '.join(known)}")
    if device and device not in DEVICES:
        raise BadFileError(f"device {device!r} is unknown, expected one of {', '.join(DEVICES)}")
    if not 1 <= tp <= MAX_TP:
        raise BadFileError(f"tp is {tp}, expected 1 to {MAX_TP}")


def _by_others(request: ServeRequest) -> Served | None:
    served: Served | None = first_answer("ms_quant.serve_checks", request)
    return served
