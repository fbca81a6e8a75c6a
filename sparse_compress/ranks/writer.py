"""Writing the ranks of a layout as the files of a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ms_quant.files.atomic import FileRecord, write_json
from ms_quant.files.safetensors_file import open_file
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.progress import StepProgress
from sparse_compress import layouts
from sparse_compress.layouts import Layout
from sparse_compress.ranks.pack import Packer
from sparse_compress.ranks.staging import remove, stored, whole, write_tensors


def finish(
    layout: Layout,
    output: OutputDirectory,
    files: list[FileRecord],
    source: Path,
    facts: dict[str, Any],
) -> None:
    """Writes what describes the files, and gives the output its name.

    Args:
        layout: what the output holds.
        output: where it is.
        files: what was written.
        source: the directory whose tokenizer files are copied.
        facts: further entries of the record.
    """
    config = write_json(output.partial / "config.json", layouts.model_config(layout.config))
    description = _write_description(layout, output.partial)
    output.finish([*files, config, description], source, facts)


@dataclass
class Writer:
    """Writes proofs and ranks, one file at a time.

    Attributes:
        packer: makes the tensors.
        output: where to.
        progress: told how far it is.
        proof: writes the proof of a block, where there is one.
        steps: how many files are done.
    """

    packer: Packer
    output: OutputDirectory
    progress: StepProgress
    proof: Callable[[int, Path], FileRecord] | None = None
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.layout = self.packer.layout

    def write(self) -> list[FileRecord]:
        """Writes all of them.

        Returns:
            What was written, in no particular order.
        """
        files: list[FileRecord] = []
        if self.proof is not None:
            for index in range(self.layout.config.num_layers):
                files.append(self._once(layouts.proof_file(index), partial(self.proof, index)))
        rank = self._file if self.layout.target.one_file else self._directory
        for number in range(self.layout.tp):
            files += rank(number)
        return files

    def _directory(self, rank: int) -> Iterator[FileRecord]:
        """A rank as a directory."""
        place = self.layout.target.rank_path(rank)
        yield from self._blocks(rank, place)
        last = layouts.block_files(self.layout.config, place)[-1]
        yield self._once(last, partial(self._rest, rank, []))

    def _file(self, rank: int) -> Iterator[FileRecord]:
        """A rank as one file. A file begins with every length, and those of coded weights are
        only known afterwards: so its blocks are written beside it first."""
        name, staging = self.layout.target.rank_path(rank), layouts.rank_name(rank)
        paths = layouts.block_files(self.layout.config, staging)[:-1]
        blocks = [self.output.partial / path for path in paths]
        if self.output.written(name) is not None:
            self.steps += len(blocks)
        else:
            list(self._blocks(rank, staging))
        yield self._once(name, partial(self._rest, rank, blocks))
        remove(blocks, self.output.partial / staging)

    def _blocks(self, rank: int, place: str) -> Iterator[FileRecord]:
        for index, name in enumerate(layouts.block_files(self.layout.config, place)[:-1]):
            yield self._once(name, partial(self._block, rank, index))

    def _once(self, name: str, write: Callable[[Path], FileRecord]) -> FileRecord:
        record = self.output.write_once(name, write)
        self.steps += 1
        blocks, tp = self.layout.config.num_layers, self.layout.tp
        proofs = 0 if self.proof is None else blocks
        self.progress("compress", self.steps / (blocks * tp + tp + proofs))
        return record

    def _block(self, rank: int, index: int, path: Path) -> FileRecord:
        return write_tensors(path, whole(self.packer.block(rank, index)))

    def _rest(self, rank: int, blocks: list[Path], path: Path) -> FileRecord:
        tensors = self.packer.rest(rank)
        for block in blocks:
            tensors.update(stored(block))
        return write_tensors(path, tensors)


def _write_description(layout: Layout, directory: Path) -> FileRecord:
    target = layout.target
    lengths = {}
    for rank in range(layout.tp):
        for name in target.rank_files(layout.config, rank):
            tensors = open_file(directory / name).tensors
            lengths.update({(rank, key): info.shape[0] for key, info in tensors.items()})
    value = target.describe(layout, lambda rank, name: lengths[rank, name])
    return write_json(directory / target.description, value)
