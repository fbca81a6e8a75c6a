"""The proof of one rank, before anything of it is used.

It needs no other rank's tensors. The first thing that is wrong is an error that names the rank,
the tensor, what was found and expected, and the command that makes a right checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.strict_json import read_json
from ms_quant.formats.companions import config_problems
from ms_quant.formats.structure import check_kind
from ms_quant.job.output_directory import RECORD, check_files
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import load_config
from sparse_compress.codec import CORES
from sparse_compress.layouts import MAX_DESCRIPTION_BYTES, Layout, Target, find_target, rank_name
from sparse_compress.layouts.fp16 import FLOAT16
from sparse_compress.ranks.pack import deq_floats, plain_quant_bias
from sparse_compress.ranks.tensors import (
    RankTensors,
    check_input_scale,
    decode_weight,
    rank_paths,
    structure_problems,
)
from sparse_compress.verify.check_collector import collect_problems

INFORMATIVE = ("info", "weight_scale", "weight_offset", "smooth_scale")
"""Suffixes of tensors that say something about a linear and that no runtime loads."""


@dataclass(frozen=True)
class Rank:
    """One rank of a checkpoint.

    Attributes:
        layout: what the checkpoint holds.
        number: which rank it is.
        tensors: what is in its files.
    """

    layout: Layout
    number: int
    tensors: RankTensors

    @property
    def name(self) -> str:
        return rank_name(self.number)

    def compressed(self) -> Iterator[tuple[LinearGroup, str]]:
        """(group, fused path) of the compressed linears, in model order."""
        for _, group, fused in self.layout.linears():
            if fused in self.layout.compressed:
                yield group, fused


def prove_rank(directory: Path, target: Target, number: int, tp: int, workers: int = CORES) -> Rank:
    """One rank that a runtime may load.

    Args:
        directory: the checkpoint.
        target: the layout that the runtime reads.
        number: the rank, 0 to tp - 1.
        tp: how many ranks the runtime has.
        workers: how many threads decode a weight.

    Raises:
        MsQuantError: it may not.
    """
    layout = prove_layout(directory, target, number, tp)
    try:
        rank = open_rank(directory, layout, number)
        problems = [f"{rank.name}: {text}" for text in rank_problems(directory, rank, workers)]
    except MsQuantError as error:
        problems = [f"{rank_name(number)}: {error}"]
    if problems:
        raise refusal(target, tp, problems)
    return rank


def prove_layout(directory: Path, target: Target, number: int, tp: int) -> Layout:
    """What a checkpoint holds that a runtime's rank may be loaded from, as far as its JSON tells.

    Raises:
        MsQuantError: none may.
    """
    try:
        layout = served_layout(directory, target, tp)
    except MsQuantError as error:
        raise refusal(target, tp, [f"{rank_name(number)}: {error}"]) from None
    if not 0 <= number < tp:
        raise BadFileError(f"the rank is {number}, expected 0 to {tp - 1}")
    return layout


def refusal(target: Target, tp: int, problems: list[str]) -> MsQuantError:
    """The error that says the first of some problems, and what makes a right checkpoint."""
    more = f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""
    return BadFileError(f"{problems[0]}{more}; {remedy(target, tp)}")


def remedy(target: Target, tp: int) -> str:
    """What makes a right checkpoint."""
    return (
        "make the checkpoint with: sparse-compress run MODEL -o OUTPUT --calib TEXT "
        f"--target {target.name} --tp {tp}"
    )


def served_layout(directory: Path, target: Target, tp: int) -> Layout:
    """What a checkpoint holds, if it is one of a target for so many ranks.

    Args:
        directory: the checkpoint.
        target: the layout that the runtime reads.
        tp: how many ranks the runtime has.

    Raises:
        MsQuantError: it is not, or a rank's place is missing or leads elsewhere.
    """
    found = find_target(directory)
    if found is not target:
        raise BadFileError(_other_kind(directory, target, found))
    config = load_config(directory)
    for problem in config_problems(directory, FLOAT16):
        raise BadFileError(problem)
    layout = target.read(directory, config)
    if layout.tp != tp:
        raise BadFileError(
            f"{directory}: is made for {layout.tp} ranks, expected {tp} as asked for"
        )
    for place in rank_paths(directory, target, tp):
        kind = "file" if target.one_file else "directory"
        if place.is_symlink() or place.is_dir() == target.one_file:
            instead = "a symbolic link" if place.is_symlink() else f"no {kind}"
            raise BadFileError(f"{place}: is {instead}, expected the {kind} of a rank")
    return layout


def _other_kind(directory: Path, target: Target, found: Target | None) -> str:
    """What a directory is instead, and how that is served."""
    if found is not None:
        how = f"serve it with {found.runtime}" if found.runtime else "no runtime loads it as it is"
        return (
            f"{directory}: is a W8A8SC checkpoint for {found.name}, expected {target.name}; {how}"
        )
    title = check_kind(directory)[0].title
    return (
        f"{directory}: is {title}, which is not compressed, expected a W8A8SC checkpoint; serve it "
        "without --load-format sparse_quant (ms-quant serve-check gives the command)"
    )


def open_rank(directory: Path, layout: Layout, number: int) -> Rank:
    """A rank of a checkpoint, as its files' headers say; what it holds is not looked at.

    Raises:
        MsQuantError: a file is malformed, or two hold one tensor.
    """
    return Rank(layout, number, RankTensors(directory / layout.target.rank_path(number)))


def rank_problems(directory: Path, rank: Rank, workers: int = CORES) -> list[str]:
    """Everything that is wrong with a rank, one line each.

    Args:
        directory: the checkpoint.
        rank: the rank.
        workers: how many threads decode a weight.
    """
    problems = structure_problems(rank.layout, [rank.tensors], INFORMATIVE)
    problems += collect_problems(_length_problems, directory, rank) if not problems else []
    for group, fused in rank.compressed() if not problems else ():
        problems += collect_problems(_linear_problems, rank, group, fused, workers)
    return problems or collect_problems(_file_problems, directory, rank)


def _length_problems(directory: Path, rank: Rank) -> Iterator[str]:
    """Where the lengths of coded tensors are not those that the description gives this rank."""
    path = directory / rank.layout.target.description
    stated = read_json(path, MAX_DESCRIPTION_BYTES)
    entry = stated.get(rank.name)
    if not isinstance(entry, dict):  # this target's description states no lengths
        return
    found = {
        f"{fused}.{suffix}": list(rank.tensors.info(f"{fused}.{suffix}").shape)
        for _, fused in rank.compressed()
        for suffix in ("weight", "index")
    }
    wrong = [name for name, shape in found.items() if entry[f"{name}.shape"] != shape]
    owner = _owner(stated, found) if wrong else ""
    for name in wrong[:1] if owner else wrong:
        yield (
            f"{rank.tensors.path(name)}: tensor {name!r} is int8 {found[name]}, expected int8 "
            f"{entry[f'{name}.shape']} as {path.name} gives {rank.name}{owner}"
        )


def _owner(stated: dict[str, Any], found: dict[str, list[int]]) -> str:
    """Whose tensors have these lengths, where they are another rank's."""
    for name, entry in stated.items():
        if isinstance(entry, dict) and all(entry[f"{k}.shape"] == v for k, v in found.items()):
            return f"; all lengths are those of {name}"
    return ""


def _linear_problems(rank: Rank, group: LinearGroup, fused: str, workers: int) -> Iterator[str]:
    """A compressed linear: its tiles, and what its other tensors must be beside them."""
    tensors = rank.tensors
    deq_floats(tensors.read(f"{fused}.deq_scale"), f"{fused}.deq_scale")
    check_input_scale(tensors.read(f"{fused}.input_scale"), f"{fused}.input_scale")
    offset = tensors.read(f"{fused}.input_offset")
    if (offset != offset[0]).any():
        yield f"{fused}.input_offset: holds different values, expected one zero point"
    weight = decode_weight(rank.layout, tensors, fused, group, workers)
    bias = tensors.read(f"{fused}.quant_bias")
    if group.parallel == "row" and rank.layout.tp > 1:
        yield from _added_once(rank, fused)
    elif not rank.layout.target.folds_bias:
        wrong = int(np.count_nonzero(bias != plain_quant_bias(weight, offset)))
        if wrong:
            yield (
                f"{fused}.quant_bias: {wrong} of {bias.size} values differ from "
                "-input_offset * sum of the weight's row"
            )


def _added_once(rank: Rank, fused: str) -> Iterator[str]:
    """Ranks add up the outputs of row-parallel linears, so that only the first has biases."""
    for suffix in ("quant_bias", "bias"):
        name = f"{fused}.{suffix}"
        if rank.number and name in rank.tensors.names:
            count = int(np.count_nonzero(rank.tensors.read(name)))
            if count:
                yield (
                    f"{name}: holds {count} values that are not 0, expected zeros: "
                    "ranks add up, and rank_0 holds the bias"
                )


def _file_problems(directory: Path, rank: Rank) -> Iterator[str]:
    """Files that are not those that were written, where a record says what was."""
    if (directory / RECORD).exists():
        place = rank.layout.target.rank_path(rank.number)
        shared = ("config.json", rank.layout.target.description)
        yield from check_files(
            directory, lambda name: name in shared or f"{name}/".startswith(f"{place}/")
        )
