"""Writing a finished job as the files of a target."""

from __future__ import annotations

from pathlib import Path

from ms_quant.files.atomic import FileRecord
from ms_quant.job.directory import JobDirectory
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.pipeline.measured import measured_facts
from ms_quant.progress import StepProgress
from ms_quant.quantization.divided import as_divided
from ms_quant.statistics import activation_range
from sparse_compress.pipeline.request import CheckedSparseJob
from sparse_compress.ranks.pack import Packer
from sparse_compress.ranks.proof import write_proof
from sparse_compress.ranks.writer import Writer, finish


def write_checkpoint(
    sparse: CheckedSparseJob, job: JobDirectory, output: OutputDirectory, progress: StepProgress
) -> None:
    """Writes the output and gives it its name; files of an interrupted run stay as they are.

    Args:
        sparse: what to write.
        job: the finished linears.
        output: where to.
        progress: told how far the step ``"compress"`` is.

    Raises:
        MsQuantError: the disk does not take a file, or a linear does not fit the target.
    """
    options, layout = sparse.options, sparse.layout
    source = as_divided(
        sparse.quantization.tensors, layout.config, job.ranges(), str(job.directory)
    )
    packer = Packer(layout, source, job, options.workers)

    def proof(index: int, path: Path) -> FileRecord:
        return write_proof(path, layout, index, job, source, options.pruned)

    files = Writer(packer, output, progress, proof).write()
    facts = {
        "chosen": {f"block {i}": job.notes(i) for i in range(layout.config.num_layers)},
        "uncompressed": sparse.uncompressed,
        "float16_lost": sparse.lost,
        activation_range.KEY: job.ranges(),
        **measured_facts(job),
        **({"rate": dict(sparse.rate)} if sparse.goal else {}),
    }
    finish(layout, output, files, options.model, facts)
