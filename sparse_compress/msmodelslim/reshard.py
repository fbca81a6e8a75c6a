"""A W8A8S directory of msModelSlim, compressed for the ranks of a runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import __version__
from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.atomic import free_space_check, sha256_file
from ms_quant.files.companion_files import companion_files
from ms_quant.files.reader import check_tensor, fingerprint
from ms_quant.files.safetensors_file import TensorInfo
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import load_config
from ms_quant.models.names import block_prefix, parse_linear
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, int8_linear
from ms_quant.pipeline.paths import check_output_path
from ms_quant.progress import StepProgress
from sparse_compress.codec import CORES
from sparse_compress.layouts import HEAD, Layout, get_target
from sparse_compress.layouts.coding import PARAMETERS
from sparse_compress.layouts.fp16 import FLOAT16, SMALLEST_NORMAL, survey
from sparse_compress.layouts.limits import most_bytes, outside_limits, staging_bytes
from sparse_compress.layouts.partition import check_tp
from sparse_compress.layouts.typed import CODED, PARAMETER
from sparse_compress.msmodelslim.directory import ModelSlimDirectory
from sparse_compress.ranks.pack import Packer, deq_floats, unfold_bias
from sparse_compress.ranks.summary import COMMAND
from sparse_compress.ranks.writer import Writer, finish


class ModelSlimModel:
    """A W8A8S directory of a known family, as a finished job and its source are seen.

    Args:
        directory: the directory.

    Attributes:
        config: the model.
        files: its files.

    Raises:
        MsQuantError: a file is malformed, or the tensors are not those of the model.
    """

    def __init__(self, directory: Path):
        self.files, self.config = ModelSlimDirectory(directory), load_config(directory)
        known = set[str]()
        for block in self.config.blocks:
            for member, spec in block.linears.items():
                path = f"{block_prefix(block.index)}{member}"
                if self.quantized(path):
                    known |= {f"{path}.{suffix}" for suffix in ("weight", "bias", *PARAMETERS)}
                    self._check_linear(path, spec.shape)
        for name, size in self.config.parameter_shapes().items():
            if name not in known:
                check_tensor(self.files.checkpoint, name, size)
        known |= {HEAD, *self.config.parameter_shapes()}
        unknown = [name for name in self.files.checkpoint.names if name not in known]
        if unknown:
            raise BadFileError(
                f"{self.files.directory}: {unknown[0]!r} is not a tensor of a W8A8S "
                f"{self.config.model_type} model of {self.config.num_layers} layers"
            )

    def quantized(self, path: str) -> bool:
        """Whether a linear is W8A8S."""
        return self.files.description.get(f"{path}.weight") == PARAMETER

    def linear(self, index: int, path: str) -> QuantizedLinear:
        """An int8 linear. The activation scale is taken as 1, as its share of deq_scale is not
        stored; the bias is what was folded into quant_bias."""
        name = f"{block_prefix(index)}{path}"
        weight = self.files.checkpoint.read(f"{name}.weight")
        scale, offset = self.activation(name)
        one = StaticActivation(np.float32(1), offset, np.full(weight.shape[1], scale, np.float32))
        deq = self._deq_scale(name)
        bias = unfold_bias(
            self.files.checkpoint.read(f"{name}.quant_bias"), weight, np.array([offset]), deq
        )
        has_bias = self.config.block(index).linears[path].bias
        if not has_bias and bias.any():
            raise BadFileError(
                f"{self._where(f'{name}.quant_bias')}: {np.count_nonzero(bias)} of {bias.size} "
                "values differ from -input_offset * sum of the weight's row, and a "
                f"{self.config.model_type} model has no bias there"
            )
        return int8_linear(weight, deq, bias if has_bias else None, one)

    def activation(self, path: str) -> tuple[np.float32, int]:
        """(input_scale, input_offset) of a linear, as float16 and int8 hold them.

        Raises:
            MsQuantError: they do not.
        """
        scale, offset = (
            self.files.checkpoint.read(f"{path}.{suffix}").reshape(-1).astype(np.float64)[0]
            for suffix in ("input_scale", "input_offset")
        )
        if not np.isfinite(scale) or scale < SMALLEST_NORMAL or FLOAT16.type(scale) != scale:
            raise BadFileError(
                f"{self._where(f'{path}.input_scale')} is {scale:g}, expected a normal float16"
            )
        if not (-128 <= offset <= 127 and offset == int(offset)):
            raise BadFileError(
                f"{self._where(f'{path}.input_offset')} is {offset:g}, expected an int8"
            )
        return np.float32(scale), int(offset)

    def info(self, name: str) -> TensorInfo:
        return self.files.info(name)

    def read_float32(self, name: str) -> np.ndarray:
        """A float tensor; the bias of an int8 linear as it was folded in."""
        path, _, suffix = name.rpartition(".")
        if suffix == "bias" and self.quantized(path):
            found = parse_linear(path)
            bias = self.linear(found.block, found.inner).bias
            assert bias is not None
            return bias
        return self.files.checkpoint.read_float32(name)

    def float_chunks(
        self, name: str, rows: slice | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """A float tensor some rows at a time: (first row, rows)."""
        path, _, suffix = name.rpartition(".")
        if suffix == "bias" and self.quantized(path):
            return iter([(0, self.read_float32(name)[rows or slice(None)])])
        return self.files.checkpoint.float_chunks(name, rows)

    def _deq_scale(self, path: str) -> np.ndarray:
        stored = self.files.checkpoint.read(f"{path}.deq_scale")
        bits = stored.view(np.int32) if stored.dtype == np.float32 else stored
        return deq_floats(bits, self._where(f"{path}.deq_scale"))

    def _where(self, name: str) -> str:
        return f"{self.files.checkpoint.file_of(name).path}: tensor {name!r}"

    def _check_linear(self, path: str, shape: tuple[int, int]) -> None:
        wanted = {
            "weight": (("I8",), shape),
            "deq_scale": (("I64", "F32"), shape[:1]),
            "quant_bias": (("I32",), shape[:1]),
            "input_scale": (("F16", "F32"), (1,)),
            "input_offset": (("F16", "F32", "I8"), (1,)),
        }
        for suffix, (codes, size) in wanted.items():
            name = f"{path}.{suffix}"
            info = self.files.info(name)
            if info.code not in codes or info.shape != size:
                raise BadFileError(
                    f"{self._where(name)} is {info.code} {list(info.shape)}, expected "
                    f"{' or '.join(codes)} {list(size)}"
                )


@dataclass(frozen=True)
class Division:
    """A checked request.

    Attributes:
        model: the directory to compress.
        output: the directory to make.
        layout: what it will hold.
        reasons: fused path to the reason why it is not compressed.
        lost: tensor name to what float16 loses of it.
        workers: how many threads code a linear.
    """

    model: ModelSlimModel
    output: Path
    layout: Layout
    reasons: dict[str, str]
    lost: dict[str, dict[str, int]]
    workers: int

    @property
    def not_served_by(self) -> list[str]:
        """Why the runtime cannot load what is made, in sentences."""
        return self.layout.target.not_served_by(self.layout.config.model_type)

    @property
    def disk_bytes(self) -> int:
        return most_bytes(self.layout) + staging_bytes(self.layout)

    def plan(self) -> dict[str, Any]:
        """What ``--dry-run`` prints."""
        layout = self.layout
        return {
            "output": str(self.output),
            "format": f"{CODED} TP{layout.tp}",
            "target": layout.target.name,
            "compressed": [fused for _, _, fused in layout.linears() if fused in layout.compressed],
            "uncompressed": self.reasons,
            "output_bytes": most_bytes(layout),
            "disk_bytes": self.disk_bytes,
            "float16_lost": self.lost,
            "not_served_by": self.not_served_by,
        }

    def directory(self) -> OutputDirectory:
        """The output as it is on the disk now, if it is another place than the source."""
        files, layout = self.model.files, self.layout
        check_output_path(files.directory, self.output)
        record = {
            COMMAND: "compress",
            "format": CODED,
            "ms_quant": __version__,
            "target": layout.target.name,
            "tp": layout.tp,
            "source": fingerprint(files.checkpoint),
            "description_sha256": sha256_file(files.path),
        }
        return OutputDirectory(self.output, record, copied=companion_files(files.directory))

    def run(self, progress: StepProgress) -> bool:
        """Makes the output, or goes on making it; True when it was finished before."""
        output = self.directory()
        if not output.finished:
            free_space_check(output.partial, max(0, self.disk_bytes - output.bytes_present()))
            with output.open_or_discard():
                packer = Packer(self.layout, self.model, self.model, self.workers)
                _refuse_too_long(packer)
                files = Writer(packer, output, progress).write()
                facts = {"uncompressed": self.reasons, "float16_lost": self.lost}
                finish(self.layout, output, files, self.model.files.directory, facts)
        return output.finished


def check(directory: Path, output: Path, target: str, tp: int, workers: int = CORES) -> Division:
    """Checks a request before any work.

    Args:
        directory: the W8A8S directory.
        output: the directory to make.
        target: name of the runtime that it is for.
        tp: how many ranks to write.
        workers: how many threads code a linear.

    Raises:
        MsQuantError: the directory is malformed or no model of a known family; linears that the
            runtime fuses do not agree; or the target or the hardware cannot hold a linear, of
            which there is no float weight to store instead.
    """
    model = ModelSlimModel(directory)
    config, runtime = model.config, get_target(target, model.config.model_type)
    check_tp(config, tp)
    runtime.check(config, tp, "minmax")
    limits, compressed, reasons = outside_limits(runtime, config, tp), set(), {}
    for index, group, fused in runtime.linears(config):
        if not _agree(model, index, group):
            reasons[fused] = f"is float in {model.files.path.name}"
        elif fused in limits:
            raise _no_float(fused, limits[fused])
        else:
            compressed.add(fused)
    if not compressed:
        raise BadFileError(f"{model.files.path}: names no W8A8S linear of the model")
    layout = Layout(config, tp, frozenset(compressed), runtime)
    names = [name for name in layout.float_names() if not _folded(model, name)]
    division = Division(model, Path(output), layout, reasons, survey(model, names), workers)
    division.directory()  # refuses a place that is taken
    return division


def _agree(model: ModelSlimModel, index: int, group: LinearGroup) -> bool:
    """Whether the linears of a group are W8A8S; they agree in that and in their activation."""
    paths = [f"{block_prefix(index)}{member}" for member in group.members]
    kinds = [model.quantized(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind != kinds[0]:
            raise _disagree(model, paths[0], path, "type in the description")
        if kind and model.activation(path) != model.activation(paths[0]):
            raise _disagree(model, paths[0], path, "input_scale and input_offset")
    return kinds[0]


def _disagree(model: ModelSlimModel, first: str, second: str, what: str) -> MsQuantError:
    return BadFileError(
        f"{model.files.directory}: {first} and {second} differ, expected one {what}: the runtime "
        "fuses them"
    )


def _folded(model: ModelSlimModel, name: str) -> bool:
    path, _, suffix = name.rpartition(".")
    return suffix == "bias" and model.quantized(path)


def _refuse_too_long(packer: Packer) -> None:
    layout = packer.layout
    for index, group, fused in layout.linears():
        for rank in range(layout.tp if fused in layout.compressed else 0):
            reason = packer.too_long(rank, index, group)
            if reason:
                raise _no_float(fused, reason)


def _no_float(fused: str, reason: str) -> MsQuantError:
    return BadFileError(f"{fused}: {reason}, and a W8A8S directory has no float weight of it")
