"""The rules for serving W8A8SC checkpoints, as ``ms-quant serve-check`` asks for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

from ms_quant.errors import MsQuantError
from ms_quant.job.output_directory import RECORD
from ms_quant.job.unlisted import unlisted_problems
from ms_quant.models.config import load_config
from ms_quant.serve import vllm_ascend as ascend_rules
from ms_quant.serve import vllm_mindspore as mindspore_rules
from ms_quant.serve.flat import server_findings
from ms_quant.serve.records import Loaded, Served, ServeRequest, alike, kind_of, merged, weight_text
from sparse_compress.layouts import TARGETS, Layout, find_target, rank_name, vllm_mindspore
from sparse_compress.layouts.mindie import NAME as MINDIE
from sparse_compress.layouts.mindie import refusal
from sparse_compress.layouts.partition import fused_shape
from sparse_compress.serve.rank import (
    Rank,
    open_rank,
    rank_problems,
    remedy,
    served_layout,
)
from sparse_compress.verify.check_collector import collect_problems

ON_310P = {"MS_INTERNAL_ENABLE_CUSTOM_KERNEL_LIST": "RmsNormQuant"}


def check_w8a8sc(request: ServeRequest) -> Served | None:
    """What a runtime will do with a W8A8SC checkpoint; None for every other one."""
    target = find_target(request.checkpoint)
    if target is None:
        return None
    served = Served(f"W8A8SC for {target.name}", request.device or "310p")
    if request.runtime == MINDIE:
        served.problems.append(refusal(load_config(request.checkpoint).model_type))
        return served
    wanted = TARGETS[request.runtime]
    try:
        layout = served_layout(request.checkpoint, wanted, request.tp)
    except MsQuantError as error:
        served.problems.append(f"{error}; {remedy(wanted, request.tp)}")
        return served
    served.format = f"W8A8SC TP{layout.tp}"
    server_findings(served, request, layout.config)
    if wanted is vllm_mindspore.TARGET:
        _by_vllm_mindspore(request, layout, served)
    else:
        _by_vllm_ascend(request, served)
    if (request.checkpoint / RECORD).exists():
        served.problems += collect_problems(
            partial(unlisted_problems, request.checkpoint, served.notes, serving=True)
        )
    coded = served.device == "310p"
    for number in range(layout.tp):
        try:
            rank = open_rank(request.checkpoint, layout, number)
            found = [f"{rank.name}: {text}" for text in rank_problems(request.checkpoint, rank)]
            served.loaded += [] if found else _rows(rank, coded)
        except MsQuantError as error:
            found = [f"{rank_name(number)}: {error}"]
        served.problems += found
    served.loaded = alike(merged(served.loaded), layout.tp)
    if served.problems:
        served.notes.append(remedy(wanted, request.tp))
    return served


def _by_vllm_mindspore(request: ServeRequest, layout: Layout, served: Served) -> None:
    served.environment = mindspore_rules.environment(served.device)
    served.command = mindspore_rules.command(request, "--load-format", "sparse_quant")
    if served.device == "310p":
        served.environment |= ON_310P
        served.notes += vllm_mindspore.TARGET.not_served_by(layout.config.model_type)
    else:
        served.notes.append(
            f"a {served.device.upper()} has no UNZIP unit: the plugin of this distribution decodes "
            "the weights at load, into plain W8A8"
        )


def _by_vllm_ascend(request: ServeRequest, served: Served) -> None:
    flags = ("--quantization", "ascend", "--load-format", "sharded_state")
    served.command = ascend_rules.command(request, *flags)
    if served.device != "310p":
        served.problems.append(
            f"{request.checkpoint}: is coded for the UNZIP unit, which a {served.device.upper()} "
            "does not have, expected --device 310p"
        )


def _rows(rank: Rank, coded: bool) -> Iterator[Loaded]:
    """What a rank loads."""
    layout, tensors = rank.layout, rank.tensors
    shapes = {fused: fused_shape(group, layout.tp) for group, fused in rank.compressed()}
    weights, sizes = dict[str, str](), defaultdict[str, int](int)
    for name in layout.tensors():
        path, _, suffix = name.rpartition(".")
        info = tensors.info(name)
        sizes[path] += info.stop - info.start
        if path in shapes:
            weights[path] = weight_text(shapes[path])
        elif suffix == "weight":
            weights[path] = weight_text(info.shape, info.dtype)
    quantized = "W8A8SC" if coded else "W8A8, decoded"
    for path, weight in weights.items():
        method = quantized if path in shapes else "FLOAT"
        yield Loaded(kind_of(path), str(rank.number), method, weight, 1, sizes[path])
