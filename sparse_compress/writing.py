"""Writing a finished job as the files of a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ms_quant.checkpoint.atomic import FileRecord, disk_errors, write_json
from ms_quant.checkpoint.finish import OutputDirectory
from ms_quant.checkpoint.job import JobDirectory
from ms_quant.checkpoint.safetensors_file import open_file
from sparse_compress import layouts
from sparse_compress.pack import Packer
from sparse_compress.proof import write_proof
from sparse_compress.request import Request
from sparse_compress.spool import remove, stored, whole, write_tensors

Progress = Callable[[str, float], None]
"""Called with the step's name and how much of it is done, 0 to 1."""


def write_checkpoint(
    request: Request, job: JobDirectory, output: OutputDirectory, progress: Progress
) -> None:
    """Writes the output and gives it its name; files of an interrupted run stay as they are.

    Args:
        request: what to write.
        job: the finished linears.
        output: where to.
        progress: told how far the step ``"compress"`` is.

    Raises:
        MsQuantError: the disk does not take a file, or a linear does not fit the target.
    """
    layout, directory = request.layout, output.partial
    files = [
        *Writer(request, job, output, progress).write(),
        write_json(directory / "config.json", layouts.model_config(layout.config)),
        _write_description(request, directory),
    ]
    facts = {
        "chosen": {f"block {i}": job.notes(i) for i in range(layout.config.num_layers)},
        "uncompressed": request.uncompressed,
        "float16_lost": request.lost,
        **({"rate": dict(request.rate)} if request.goal else {}),
    }
    output.finish(files, request.options.model, facts)


@dataclass
class Writer:
    """Writes proofs and ranks, one file at a time.

    Attributes:
        request: what to write.
        job: the finished linears.
        output: where to.
        progress: told how far it is.
        steps: how many files are done.
    """

    request: Request
    job: JobDirectory
    output: OutputDirectory
    progress: Progress
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.layout = request.layout
        self.packer = Packer(
            self.layout, request.prepared.checkpoint, self.job, request.options.workers
        )

    def write(self) -> list[FileRecord]:
        """Writes all of them.

        Returns:
            What was written, in no particular order.
        """
        self._make("proof")
        blocks = range(self.layout.config.num_layers)
        files = [self._once(layouts.proof_file(i), partial(self._proof, i)) for i in blocks]
        rank = self._file if self.layout.target.one_file else self._directory
        for number in range(self.layout.tp):
            files += rank(number)
        return files

    def _directory(self, rank: int) -> Iterator[FileRecord]:
        """A rank as a directory."""
        place = self.layout.target.rank_place(rank)
        yield from self._blocks(rank, place)
        last = layouts.block_files(self.layout.config, place)[-1]
        yield self._once(last, partial(self._rest, rank, []))

    def _file(self, rank: int) -> Iterator[FileRecord]:
        """A rank as one file. A file begins with every length, and those of coded weights are
        only known afterwards: so its blocks are written beside it first."""
        name, spool = self.layout.target.rank_place(rank), layouts.rank_name(rank)
        paths = layouts.block_files(self.layout.config, spool)[:-1]
        blocks = [self.output.partial / path for path in paths]
        if (self.output.partial / name).exists():
            self.steps += len(blocks)
        else:
            list(self._blocks(rank, spool))
        yield self._once(name, partial(self._rest, rank, blocks))
        remove(blocks, self.output.partial / spool)

    def _blocks(self, rank: int, place: str) -> Iterator[FileRecord]:
        self._make(place)
        for index, name in enumerate(layouts.block_files(self.layout.config, place)[:-1]):
            yield self._once(name, partial(self._block, rank, index))

    def _make(self, name: str) -> None:
        with disk_errors(self.output.partial / name, "the directory"):
            (self.output.partial / name).mkdir(exist_ok=True)

    def _once(self, name: str, write: Callable[[Path], FileRecord]) -> FileRecord:
        record = self.output.write_once(name, write)
        self.steps += 1
        blocks, tp = self.layout.config.num_layers, self.layout.tp
        self.progress("compress", self.steps / (blocks * (tp + 1) + tp))
        return record

    def _proof(self, index: int, path: Path) -> FileRecord:
        source, pruned = self.packer.checkpoint, self.request.options.pruned
        return write_proof(path, self.layout, index, self.job, source, pruned)

    def _block(self, rank: int, index: int, path: Path) -> FileRecord:
        return write_tensors(path, whole(self.packer.block(rank, index)))

    def _rest(self, rank: int, blocks: list[Path], path: Path) -> FileRecord:
        tensors = self.packer.rest(rank)
        for block in blocks:
            tensors.update(stored(block))
        return write_tensors(path, tensors)


def _write_description(request: Request, directory: Path) -> FileRecord:
    layout, target = request.layout, request.layout.target
    lengths = {}
    for rank in range(layout.tp):
        for name in target.rank_files(layout.config, rank):
            tensors = open_file(directory / name).tensors
            lengths.update({(rank, key): info.shape[0] for key, info in tensors.items()})
    value = target.describe(layout, lambda rank, name: lengths[rank, name])
    return write_json(directory / target.description, value)
