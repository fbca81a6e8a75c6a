"""A directory of msModelSlim made from another checkpoint, some linears at a time.

    OUTPUT.partial/tensors/tensor-0000I.safetensors   a finished part
    OUTPUT.partial/quant_model_weight...              all of them and what stays as it is

A part is whole or absent, so that an interrupted job goes on with the first that is missing. The
parts are deleted when the files that they go into are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ms_quant import __version__
from ms_quant.files.atomic import FileRecord, free_space_check, write_json
from ms_quant.files.writer import plan_shards, shard_names, write_index
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.paths import check_output_path
from ms_quant.progress import StepProgress
from sparse_compress.msmodelslim.files import file_names
from sparse_compress.ranks.staging import Arrays, Tensors, remove, stored, whole, write_tensors
from sparse_compress.ranks.summary import COMMAND

PARTS = "tensors"
SHARD_PREFIX = "quant_model_weights"


@dataclass(frozen=True)
class Rewrite:
    """What will be made, all of it known before the work.

    Attributes:
        command: who makes it, and what its progress is called.
        source: the directory that it is made from.
        output: the directory to make.
        kind: the type of the quantized linears.
        versioned: whether the files have the names of format ascendV1.
        sharded: whether they are divided, where those names have a place for it.
        made_from: what decides the content, for the record.
        parts: functions that make the tensors of each part.
        kept: the tensors that stay as they are.
        describe: the description, from the names of all tensors.
        part_bytes: most bytes of the tensors of all parts.
        companions: paths of further files to copy.
        metadata: of the tensor files.
        shard_bytes: most bytes of the tensors of a file, where they are divided.
    """

    command: str
    source: Path
    output: Path
    kind: str
    versioned: bool
    sharded: bool
    made_from: dict[str, Any]
    parts: Sequence[Callable[[], Arrays]]
    kept: Tensors
    describe: Callable[[set[str]], dict[str, Any]]
    part_bytes: int
    companions: tuple[str, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    shard_bytes: int = DEFAULTS.shard_bytes

    @property
    def most_bytes(self) -> int:
        """Most bytes of the output's tensors."""
        return self.part_bytes + sum(plan.bytes for plan, _ in self.kept.values())

    def directory(self) -> OutputDirectory:
        """The output as it is on the disk now, if it is another place than the source."""
        check_output_path(self.source, self.output)
        own = {COMMAND: self.command, "format": self.kind, "ms_quant": __version__}
        record = {**own, **self.made_from}
        return OutputDirectory(self.output, record, copied=self.companions)

    def run(self, progress: StepProgress) -> bool:
        """Makes the output, or goes on making it.

        Returns:
            True when it was finished before.

        Raises:
            MsQuantError: a part cannot be made, the disk does not take it, or another process
                makes it.
        """
        output = self.directory()
        if not output.finished:
            needed = self.most_bytes + self.part_bytes
            free_space_check(output.partial, max(0, needed - output.bytes_present()))
            with output.open_or_discard():
                _Writer(self, output, progress).write()
        return output.finished


@dataclass
class _Writer:
    job: Rewrite
    output: OutputDirectory
    progress: StepProgress

    def write(self) -> None:
        place = self.output.partial / PARTS
        paths = [self._part(index) for index in range(len(self.job.parts))]
        tensors = dict(self.job.kept)
        for path in paths:
            tensors.update(stored(path))
        name, weights = file_names(self.job.versioned, self.job.kind)
        description = self.job.describe(set(tensors))
        files = self._shards(tensors) if self.job.sharded else [self._file(weights, tensors)]
        files.append(write_json(self.output.partial / name, description))
        remove(paths, place)
        self.progress(self.job.command, 1.0)
        self.output.finish(files, self.job.source, {})

    def _part(self, index: int) -> Path:
        name = f"{PARTS}/tensor-{index:05d}.safetensors"
        self.output.write_once(
            name, lambda path: write_tensors(path, whole(self.job.parts[index]()))
        )
        self.progress(self.job.command, (index + 1) / (len(self.job.parts) + 1))
        return self.output.partial / name

    def _file(self, name: str, tensors: Tensors) -> FileRecord:
        write = partial(write_tensors, tensors=tensors, metadata=self.job.metadata)
        return self.output.write_once(name, write)

    def _shards(self, tensors: Tensors) -> list[FileRecord]:
        plans = [tensors[name][0] for name in sorted(tensors)]
        shards = plan_shards(plans, self.job.shard_bytes)
        named = dict(zip(shard_names(SHARD_PREFIX, len(shards)), shards, strict=True))
        files = [
            self._file(name, {plan.name: tensors[plan.name] for plan in plans})
            for name, plans in named.items()
        ]
        total = sum(plan.bytes for plans in shards for plan in plans)
        index = f"{SHARD_PREFIX}.safetensors.index.json"
        return [*files, write_index(self.output.partial, named, total, index)]
