"""What all runtimes ask of checkpoints that are not split over ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan
from ms_quant.formats import kv_cache
from ms_quant.formats.companions import config_problems
from ms_quant.formats.structure import Structure, is_ours, read_structure
from ms_quant.job.output_directory import RECORD, check_files
from ms_quant.job.unlisted import unlisted_problems
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.models.ranks import check_tp, fused_shape, vocab_rows
from ms_quant.serve.config_keys import config_findings
from ms_quant.serve.records import (
    Loaded,
    Served,
    ServeRequest,
    kind_of,
    merged,
    rank_text,
    weight_text,
)

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def open_flat(request: ServeRequest, formats: tuple[str, ...]) -> tuple[Structure | None, Served]:
    """A checkpoint's structure and what is wrong with it for any runtime.

    Args:
        request: what is asked.
        formats: those that the runtime reads.

    Returns:
        The structure, None where it cannot be served at all, and the findings so far.

    Raises:
        MsQuantError: the directory is no quantized checkpoint.
    """
    structure, problems = read_structure(request.checkpoint)
    if structure is None:
        return None, Served("", problems=problems)
    format, plan = structure.format, structure.plan
    kinds = "+".join(sorted({layer.scheme.name for layer in plan.distinct})) or "FLOAT"
    served = Served(f"{format.name} {kinds}", problems=problems)
    if format.name not in formats:
        served.problems.append(
            f"{request.checkpoint}: is {format.title}, expected {' or '.join(formats)} for "
            f"{request.runtime} (ms-quant convert makes one where it can)"
        )
        return None, served
    served.problems += structure.defects
    served.notes += structure.notes
    ours = is_ours(request.checkpoint)
    served.problems += config_problems(request.checkpoint, plan.dtype, format.entry, strict=ours)
    served.problems += _index_problems(structure.checkpoint)
    if ours:
        served.problems += check_files(request.checkpoint)
        served.problems += unlisted_problems(request.checkpoint, served.notes, serving=True)
    else:
        served.notes.append(f"there is no {RECORD}: files are not compared with what was written")
    return structure, served


def _index_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Tensors that only the index leaves out: runtimes read whole files."""
    named = set(checkpoint.names)
    for path in checkpoint.files():
        for name in sorted(checkpoint.shard(path.name).tensors.keys() - named):
            yield f"{path}: unknown tensor {name!r}, expected only those that the index names"


def server_findings(served: Served, request: ServeRequest, config: ModelConfig) -> None:
    """Adds what any vLLM needs of a model directory and its ranks."""
    directory = request.checkpoint
    architectures = config.raw.get("architectures")
    if not (isinstance(architectures, list) and architectures):
        served.problems.append(
            f"{directory / 'config.json'}: architectures is {architectures!r:.80}, expected the "
            "model's class, which vLLM looks up"
        )
    config_findings(served, request, config)
    if not any((directory / name).is_file() for name in TOKENIZERS):
        served.notes.append("the directory has no tokenizer: give --tokenizer to the server")
    try:
        check_tp(config, request.tp)
    except MsQuantError as error:
        served.problems.append(str(error))


def loaded_rows(structure: Structure, tp: int) -> list[Loaded]:
    """What each rank of a runtime that fuses q/k/v and gate/up loads."""
    plan, config = structure.plan, structure.plan.config
    sizes: dict[str, int] = defaultdict(int)
    for tensor in structure.expected.values():
        sizes[_owner(tensor)] += tensor.bytes
    ranks = rank_text(tp)
    rows, linears, caches = [], set(), kv_cache.entries(plan)
    for index in range(config.num_blocks):
        for group in config.block(index).groups:
            paths = [f"{block_prefix(index)}{member}" for member in group.members]
            linears |= set(paths)
            layer = plan.layers[GroupId(index, group.name)]
            method = layer.scheme.name if layer else "FLOAT"
            dtype = plan.dtype if method == "FLOAT" else ""
            weight = weight_text(fused_shape(group, tp), dtype)
            size = sum(sizes[path] for path in paths) // tp
            kind = f"{'experts.' if group.routed else ''}{kind_of(group.fused)}"
            rows.append(Loaded(kind, ranks, method, weight, 1, size))
    for name, tensor in structure.expected.items():
        path = _owner(tensor)
        if path not in linears:
            shape = _rank_shape(config, name, tensor.shape, tp)
            if name in caches and tensor.shape[0] == config.num_heads:
                shape = tensor.shape[0] // tp, *tensor.shape[1:]
            size = tensor.dtype.itemsize * math.prod(shape)
            text, method = weight_text(shape, tensor.dtype), caches.get(name, "FLOAT")
            rows.append(Loaded(kind_of(path), ranks, method, text, 1, size))
    return merged(rows)


def _owner(tensor: TensorPlan) -> str:
    """The path of the layer that a tensor is of; a smoothed linear's are a level deeper."""
    return tensor.part[0] if tensor.part else tensor.name.rpartition(".")[0]


def _rank_shape(config: ModelConfig, name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """Tables are split by rows, padded; all else that is no linear is on every rank."""
    return (vocab_rows(config, tp, 0).stop, *shape[1:]) if name in TABLES else shape
