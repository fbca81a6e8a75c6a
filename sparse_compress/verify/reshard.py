"""Proof that the ranks of a compressed W8A8S directory hold what the directory holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.formats.companions import config_problems, source_problems
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import load_config
from ms_quant.models.names import block_prefix
from ms_quant.progress import StepProgress
from sparse_compress.codec.fractal import tile_count
from sparse_compress.layouts import get_target
from sparse_compress.layouts.fp16 import FLOAT16
from sparse_compress.layouts.partition import fused_shape
from sparse_compress.msmodelslim.reshard import ModelSlimModel
from sparse_compress.ranks.reader import SparseModel
from sparse_compress.ranks.tensors import description_problems, open_ranks, structure_problems
from sparse_compress.verify.check_collector import collect_problems
from sparse_compress.verify.floats import Counts, count, float_problems, stored_floats


def resharded_problems(
    directory: Path,
    record: dict[str, Any],
    source: ModelSlimModel | None,
    progress: StepProgress,
    checked: Counts,
    workers: int,
) -> list[str]:
    """What is wrong with the ranks, one line each; counts what was looked at."""
    config = load_config(directory)
    target = get_target(str(record["target"]), config.model_type)
    layout = target.read(directory, config)
    if record.get("tp") != layout.tp:
        raise BadFileError(f"{directory}: has {layout.tp} ranks, expected {record.get('tp')!r:.80}")
    ranks = open_ranks(directory, target, layout.tp)
    problems = structure_problems(layout, ranks) + collect_problems(
        config_problems, directory, FLOAT16
    )
    if problems:
        return problems
    problems += collect_problems(description_problems, directory, layout, ranks)
    model = SparseModel(directory, layout, ranks, workers)
    for index, group, fused in layout.linears():
        if fused in layout.compressed:
            problems += collect_problems(_group_problems, model, source, index, group, checked)
        elif source is not None and source.quantized(f"{block_prefix(index)}{group.members[0]}"):
            problems.append(f"{directory}: {fused} is float, expected it compressed")
        progress("tensors", (index + 1) / (config.num_layers + 1))
    for name in stored_floats(model):
        problems += collect_problems(float_problems, model, source, name, checked)
    if source is not None:
        problems += collect_problems(source_problems, directory, source.files.directory, FLOAT16)
    progress("tensors", 1.0)
    return problems


def _group_problems(
    model: SparseModel,
    source: ModelSlimModel | None,
    index: int,
    group: LinearGroup,
    checked: Counts,
) -> Iterator[str]:
    layout = model.layout
    linears = model.group(index, group)
    tiles = tile_count(*fused_shape(group, layout.tp)) * layout.tp
    count(checked, linears=len(linears), tiles=tiles)
    if source is None:
        return
    for member, ours in linears.items():
        theirs = source.linear(index, member)
        count(checked, compared=1)
        pairs: dict[str, tuple[Any, Any]] = {
            "weight": (ours.weight, theirs.weight),
            "deq_scale": (ours.deq_scale, theirs.deq_scale),
            "input_scale": (ours.static.input_scale, theirs.static.input_scale),
            "input_offset": (ours.static.offset, theirs.static.offset),
        }
        for suffix, (found, expected) in pairs.items():
            wrong = int(np.count_nonzero(found != expected))
            if wrong:
                yield (
                    f"{block_prefix(index)}{member}.{suffix}: {wrong} of {np.size(found)} values "
                    f"differ from {source.files.directory}"
                )
