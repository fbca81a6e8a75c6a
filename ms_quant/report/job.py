"""What is known of a job that runs, or of one that was stopped."""

from __future__ import annotations

import re
from pathlib import Path

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import read_json
from ms_quant.job.block_files import BlockFiles
from ms_quant.job.output_directory import MAX_RECORD_BYTES
from ms_quant.models.names import block_prefix
from ms_quant.pipeline.measured import measured_facts
from ms_quant.plan.layer import recorded_layer
from ms_quant.report.checkpoint import merged, source_bytes
from ms_quant.report.recorded import entry, findings, number
from ms_quant.report.records import Facts, Group

JOB, SOURCE = "job.json", "source.json"
_BLOCK = re.compile(r"model\.layers\.(\d{1,6})\.")


def job_of(path: Path, job: Path | None = None) -> Path | None:
    """The job directory that a path stands for: itself, or that of an output; None where there is
    none."""
    if job is not None:
        return job if (job / JOB).is_file() else None
    whole = path.absolute()
    beside = whole.with_name(f"{whole.name.removesuffix('.partial')}.job")
    return next((place for place in (path, beside) if (place / JOB).is_file()), None)


def job_facts(job: Path, output: Path) -> Facts:
    """What is finished of a job.

    Args:
        job: its directory.
        output: what it will make.

    Raises:
        MsQuantError: it is no job, or malformed.
    """
    if not (job / JOB).is_file():
        raise BadFileError(f"{job}: has no {JOB}, expected the directory of a job")
    record = read_json(job / JOB, MAX_RECORD_BYTES)
    files = BlockFiles(job, None, 0)
    finished = sorted(files.finished())
    chosen = {f"block {index}": files.notes(index) for index in finished}
    facts = {
        "record": record,
        "chosen": chosen,
        "routing": {f"block {index}": one for index, one in files.routing().items()},
        **measured_facts(files),
    }
    groups = [
        _group(index, name, record, facts)
        for index in finished
        for name in chosen[f"block {index}"]
    ]
    return Facts(
        place=output,
        format=str(record.get("format", "")) or "a job",
        model="",
        groups=merged(groups),
        record=facts,
        source_bytes=source_bytes(record),
        cache=str(record.get("kv_cache", "float")),
        blocks=_blocks(job / SOURCE),
        finished=len(finished),
    )


def _group(index: int, name: str, record: dict[str, object], facts: dict[str, object]) -> Group:
    path = f"{block_prefix(index)}{name}"
    layer = recorded_layer(record, path)
    measured = findings(facts, index, name)
    return Group(
        path=path,
        block=index,
        kind=name,
        scheme=str(layer.get("scheme", "?")),
        algorithm=str(layer.get("algorithm", "")),
        error=number(measured.get("error")),
        worst=path,
        chosen=entry(facts, "chosen", f"block {index}", name),
        input=entry(measured, "input"),
    )


def _blocks(path: Path) -> int | None:
    """How many blocks the names of the tensors tell of."""
    if not path.is_file():
        return None
    shards = entry(read_json(path, MAX_RECORD_BYTES), "shards")
    names = (name for shard in shards.values() for name in entry(shard, "tensors"))
    found = (_BLOCK.search(name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=None)
