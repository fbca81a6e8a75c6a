"""Proof that the ranks of a compressed W8A8S directory hold what the directory holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.checkpoint.companions import config_problems, source_problems
from ms_quant.errors import MsQuantError
from ms_quant.models.config import block_prefix, load_config
from ms_quant.models.families import LinearGroup
from sparse_compress.divide import SlimModel
from sparse_compress.fp16 import FLOAT16, to_float16
from sparse_compress.fractal import tile_count
from sparse_compress.guard import guard
from sparse_compress.layouts import get_target
from sparse_compress.partition import fused_shape
from sparse_compress.ranks import description_problems, open_ranks, structure_problems
from sparse_compress.reader import SparseModel
from sparse_compress.rewrite import Progress
from sparse_compress.slim_verify import Counts, count


def divided_problems(
    directory: Path,
    record: dict[str, Any],
    source: SlimModel | None,
    progress: Progress,
    checked: Counts,
    workers: int,
) -> list[str]:
    """What is wrong with the ranks, one line each; counts what was looked at."""
    config = load_config(directory)
    target = get_target(str(record["target"]), config.model_type)
    layout = target.read(directory, config)
    if record.get("tp") != layout.tp:
        raise MsQuantError(f"{directory}: has {layout.tp} ranks, expected {record.get('tp')!r:.80}")
    ranks = open_ranks(directory, target, layout.tp)
    problems = structure_problems(layout, ranks) + guard(config_problems, directory, FLOAT16)
    if problems:
        return problems
    problems += guard(description_problems, directory, layout, ranks)
    model = SparseModel(directory, layout, ranks, workers)
    for index, group, fused in layout.linears():
        if fused in layout.compressed:
            problems += guard(_group_problems, model, source, index, group, checked)
        elif source is not None and source.quantized(f"{block_prefix(index)}{group.members[0]}"):
            problems.append(f"{directory}: {fused} is float, expected it compressed")
        progress("tensors", (index + 1) / (config.num_layers + 1))
    for name in dict.fromkeys([*layout.float_names(), *layout.tables]):
        problems += guard(_float_problems, model, source, name, checked)
    if source is not None:
        problems += guard(source_problems, directory, source.slim.directory, FLOAT16)
    progress("tensors", 1.0)
    return problems


def _group_problems(
    model: SparseModel, source: SlimModel | None, index: int, group: LinearGroup, checked: Counts
) -> Iterator[str]:
    layout = model.layout
    linears = model.group(index, group)
    tiles = tile_count(*fused_shape(layout.config, layout.tp, group)) * layout.tp
    count(checked, linears=len(linears), tiles=tiles)
    if source is None:
        return
    for member, ours in linears.items():
        theirs = source.linear(index, member)
        assert ours.activation is not None and theirs.activation is not None
        count(checked, compared=1)
        pairs: dict[str, tuple[Any, Any]] = {
            "weight": (ours.weight, theirs.weight),
            "deq_scale": (ours.deq_scale, theirs.deq_scale),
            "input_scale": (ours.activation.input_scale, theirs.activation.input_scale),
            "input_offset": (ours.activation.offset, theirs.activation.offset),
        }
        for suffix, (found, expected) in pairs.items():
            wrong = int(np.count_nonzero(found != expected))
            if wrong:
                yield (
                    f"{block_prefix(index)}{member}.{suffix}: {wrong} of {np.size(found)} values "
                    f"differ from {source.slim.directory}"
                )


def _float_problems(
    model: SparseModel, source: SlimModel | None, name: str, checked: Counts
) -> Iterator[str]:
    count(checked, float_tensors=1)
    original, wrong = model.layout.table_source(name), 0
    for start, part in model.float16_chunks(name):
        if not np.isfinite(part).all():
            yield f"{name}: holds NaN or inf, expected finite values"
        if source is not None:
            rows = slice(start, start + len(part))
            pieces = [chunk for _, chunk in source.float_chunks(original, rows)]
            expected = to_float16(np.concatenate(pieces).astype(np.float32, copy=False), name)
            wrong += int(np.count_nonzero(part.view("<u2") != expected.view("<u2")))
    if wrong:
        yield f"{name}: {wrong} values differ from the source's as float16"
