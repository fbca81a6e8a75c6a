"""What a finished checkpoint of any format says of itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ms_quant.errors import BadArgumentError
from ms_quant.files.companion_files import companion_files
from ms_quant.files.reader import Checkpoint, fingerprint
from ms_quant.files.safetensors_file import open_file
from ms_quant.files.strict_json import read_json
from ms_quant.formats.inspection import cache_name
from ms_quant.formats.opening import FloatModel, QuantizedModel, ServedModel, open_model
from ms_quant.formats.plugins import first_answer
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.pipeline.siblings import kind_of
from ms_quant.plan.layer import LayerPlan, recorded_layer
from ms_quant.plan.plan import all_groups
from ms_quant.report.recorded import entry, findings, number
from ms_quant.report.records import FLOAT, Facts, FloatWeights, Further, Group

REPORTS = "ms_quant.reports"
"""Entry point group: a function of a directory that returns a ``Further``, or None."""


def checkpoint_facts(directory: Path, further: Further | None = None) -> Facts:
    """Reads the headers, the description and the record of a checkpoint.

    Args:
        directory: the checkpoint.
        further: what another package says of it; None asks those that are installed.

    Raises:
        MsQuantError: the directory is no checkpoint, or malformed.
    """
    model = open_model(directory)
    further = further or first_answer(REPORTS, directory)
    record = read_record(directory)
    sizes = _stored_sizes(directory, model)
    linears = {
        str(group_id): [f"{block_prefix(group_id.block)}{m}" for m in group.members]
        for group_id, group in all_groups(model.config)
    }
    groups, used = _groups(model, record, sizes, further)
    total = sum(sizes.values())
    return Facts(
        place=directory,
        format=model.format,
        model=f"{model.config.model_type}, {model.config.num_blocks} blocks",
        groups=merged(groups),
        record=record,
        output_bytes=total,
        float_bytes=total - used,
        source_bytes=source_bytes(record),
        cache=cache_name(model),
        blocks=model.config.num_blocks,
        stored=None if isinstance(model, FloatModel) else model.linear,
        linears=linears,
        further=further,
    )


def read_record(directory: Path) -> Mapping[str, Any]:
    """The content of ``ms_quant.json``; {} where there is none."""
    path = directory / RECORD
    return read_json(path, MAX_RECORD_BYTES) if path.is_file() else {}


def source_bytes(record: Mapping[str, Any]) -> int | None:
    """Bytes of the files of the model that a checkpoint was made from, as its record says."""
    shards = entry(record, "record", "source", "shards") or entry(record, "source", "shards")
    sizes = [number(entry(shard).get("bytes")) for shard in shards.values()]
    return int(sum(size or 0 for size in sizes)) if sizes else None


def float_weights(directory: Path, facts: Facts) -> FloatWeights:
    """Opens the float model that a checkpoint is compared with.

    Raises:
        MsQuantError: it is not float, or another model.
    """
    model, own = open_model(directory), open_model(facts.place)
    if not isinstance(model, FloatModel):
        raise BadArgumentError(
            f"--against {directory}: is a {model.format} checkpoint, expected the float model"
        )
    difference = _difference(model.config, own.config)
    if difference:
        raise BadArgumentError(
            f"--against {directory}: is another model than {facts.place}: {difference}"
        )
    sizes = _stored_sizes(directory, model)
    return FloatWeights(
        directory,
        sum(sizes.values()),
        lambda path: model.tensor(f"{path}.weight"),
        _is_source(model, facts.record),
    )


def _difference(found: ModelConfig, expected: ModelConfig) -> str:
    """Where two models differ in their sizes; "" where they do not."""
    for key in ("model_type", "num_layers", "hidden_size", "vocab_size"):
        one, other = getattr(found, key), getattr(expected, key)
        if one != other:
            return f"its {key} is {one}, expected {other}"
    shapes = expected.parameter_shapes()
    for name, shape in found.parameter_shapes().items():
        if name in shapes and shapes[name] != shape:
            return f"its {name} is {list(shape)}, expected {list(shapes[name])}"
    return ""


def _is_source(model: FloatModel, record: Mapping[str, Any]) -> bool | None:
    source = entry(record, "record", "source")
    if not source or not isinstance(model.checkpoint, Checkpoint):
        return None
    return fingerprint(model.checkpoint) == source


def _stored_sizes(directory: Path, model: ServedModel) -> dict[str, int]:
    """Full path of a module to the bytes of its tensors; of files that are the model's."""
    sizes: dict[str, int] = defaultdict(int)
    stored = {model.config.stored_name(name): name for name in model.config.parameter_shapes()}
    paths = {name.rpartition(".")[0]: own.rpartition(".")[0] for name, own in stored.items()}
    for name, size in _tensor_bytes(directory, model):
        path = stored.get(name, name).rpartition(".")[0]
        while path and path not in paths:
            path = path.rpartition(".")[0]
        sizes[paths.get(path, name)] += size
    return dict(sizes)


def _tensor_bytes(directory: Path, model: ServedModel) -> Iterator[tuple[str, int]]:
    if isinstance(model, FloatModel):
        assert isinstance(model.checkpoint, Checkpoint)
        for name, info in model.checkpoint.stored().items():
            yield name, info.stop - info.start
        return
    beside = {directory / name for name in companion_files(directory)}
    for file in sorted(set(directory.rglob("*.safetensors")) - beside):
        if file.is_file():
            for name, info in open_file(file).tensors.items():
                yield name, info.stop - info.start


def _groups(
    model: ServedModel,
    record: Mapping[str, Any],
    sizes: Mapping[str, int],
    further: Further | None,
) -> tuple[list[Group], int]:
    """Every group, and the bytes of all of them."""
    plan = model.plan if isinstance(model, QuantizedModel) else None
    chosen, found, used = entry(record, "chosen"), [], 0
    for group_id, group in all_groups(model.config):
        layer = plan.layers.get(group_id) if plan is not None else None
        one = _group(group_id, group, layer, chosen, record)
        prefix, path = block_prefix(group_id.block), str(group_id)
        if further is not None:
            said = recorded_layer(entry(record, "record"), path) if path in further.schemes else {}
            scheme = further.schemes.get(path, FLOAT)
            one = _changed(one, scheme=scheme, algorithm=str(said.get("algorithm", "")))
            stored = further.bytes.get(path)
        else:
            stored = sum(sizes.get(f"{prefix}{member}", 0) for member in group.members)
        used += stored or 0
        found.append(_changed(one, bytes=stored))
    return found, used


def _group(
    group_id: GroupId,
    group: LinearGroup,
    layer: LayerPlan | None,
    chosen: Mapping[str, Any],
    record: Mapping[str, Any],
) -> Group:
    measured = findings(record, group_id.block, group_id.name)
    said = recorded_layer(entry(record, "record"), str(group_id))  # files do not tell algorithms
    return Group(
        path=str(group_id),
        block=group_id.block,
        kind=group_id.name,
        scheme=FLOAT if layer is None else layer.scheme.name,
        algorithm="" if layer is None else str(said.get("algorithm", "")),
        weights=sum(linear.size for linear in group.linears.values()),
        error=number(measured.get("error")),
        worst=str(group_id),
        chosen=entry(chosen, f"block {group_id.block}", group_id.name),
        input=entry(measured, "input"),
        first=f"{block_prefix(group_id.block)}{group.members[0]}",
    )


def _changed(group: Group, **changes: Any) -> Group:
    return Group(**{**vars(group), **changes})


def merged(groups: list[Group]) -> list[Group]:
    """The groups, those of a block's experts of one kind, scheme and algorithm together."""
    together: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        kind = kind_of(group.kind)
        key: tuple[Any, ...] = (group.block, kind, group.scheme, group.algorithm)
        if kind == group.kind:
            key = (*key, group.path)
        together.setdefault(key, []).append(group)
    return [found[0] if len(found) == 1 else _merged(found) for found in together.values()]


def _merged(found: list[Group]) -> Group:
    first = found[0]
    worst = max(found, key=lambda one: -1.0 if one.error is None else one.error)
    sizes = [one.bytes for one in found if one.bytes is not None]
    return _changed(
        first,
        path=first.path.removesuffix(first.kind) + kind_of(first.kind),
        kind=kind_of(first.kind),
        count=len(found),
        weights=sum(one.weights for one in found),
        bytes=sum(sizes) if sizes else None,
        error=worst.error,
        worst=worst.path,
        chosen={},
        input={},
        first=worst.first,
    )
