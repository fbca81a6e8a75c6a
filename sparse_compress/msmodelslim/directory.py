"""Directories as msModelSlim writes them: tensors, and a description that gives each a type.

Nothing is assumed of the model: what is done to a tensor follows from its type. The names of the
files and the types are those of docs/w8a8sc.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.reader import CHUNK_ELEMENTS, FLOAT_CODES, Checkpoint, row_chunks
from ms_quant.files.safetensors_file import CODES, TensorInfo
from ms_quant.files.strict_json import read_json
from ms_quant.files.writer import TensorPlan
from sparse_compress.codec import decompress_matrix, matrix_shape
from sparse_compress.layouts import INT64, MAX_DESCRIPTION_BYTES
from sparse_compress.layouts.coding import CODED, INT8, PLAIN, Coding
from sparse_compress.layouts.fp16 import FLOAT16
from sparse_compress.layouts.typed import CODED_SUFFIXES, FLOAT, KIND_KEY
from sparse_compress.msmodelslim.files import companions, find_description

WEIGHTS_PREFIX = "quant_model_weight"


class ModelSlimDirectory:
    """A directory of msModelSlim, compressed or not. Its headers are all checked.

    Args:
        directory: the directory.

    Attributes:
        path: its description.
        description: what is in it.
        checkpoint: the tensors.
        plain: path to coding of the linears that can be compressed, in the description's order.
        coded: path to coding of the linears that are compressed.

    Raises:
        MsQuantError: a file is malformed, or description and tensors do not agree.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.path = find_description(self.directory)
        self.description = read_json(self.path, MAX_DESCRIPTION_BYTES)
        self.checkpoint = Checkpoint(self.directory, WEIGHTS_PREFIX)
        for path in self.checkpoint.files():
            self.checkpoint.shard(path.name)
        self._names = set(self.checkpoint.names)
        for key, kind in self.description.items():
            no_tensor = "." not in key or key.endswith(".quant_type")
            if key in self._names or not no_tensor:
                self._check_entry(key, kind)
        self.plain, self.coded = self._linears(PLAIN), self._linears(CODED)

    @property
    def versioned(self) -> bool:
        """Whether the files have the names of format ascendV1."""
        return "version" in self.description

    @property
    def metadata(self) -> dict[str, str]:
        """That of the first file."""
        return self.checkpoint.shard(self.checkpoint.files()[0].name).metadata

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.info(name)

    def shape(self, path: str) -> tuple[int, int]:
        """(n, k) of a compressed weight, as its info tensor says."""
        name, item = f"{path}.info", self.coded[path].dtype.itemsize
        try:
            n, k = matrix_shape(self.checkpoint.read(name), self.info(f"{path}.index").shape[0])
        except MsQuantError as error:
            raise self._error(name, str(error), ": ") from None
        if k % item:
            raise self._error(name, f"states rows of {k} bytes, expected a multiple of {item}")
        return n, k // item

    def decode(self, path: str, workers: int) -> np.ndarray:
        """A compressed weight as it was before.

        Raises:
            MsQuantError: names the file, the tensor, and the tile that is wrong.
        """
        coding, read = self.coded[path], self.checkpoint.read
        self.shape(path)
        weight, index, info = (read(f"{path}.{suffix}") for suffix in CODED_SUFFIXES)
        try:
            matrix = decompress_matrix(weight, index, info, coding.mode, threads=workers)
        except MsQuantError as error:
            raise self._error(f"{path}.weight", str(error), ": ") from None
        return matrix.view(coding.dtype)

    def rows(self, name: str) -> np.ndarray | Iterator[np.ndarray]:
        """A tensor as it is stored; a large one in pieces of some rows."""
        file, shape = self.checkpoint.file_of(name), self.info(name).shape
        if math.prod(shape) <= CHUNK_ELEMENTS or not shape:
            return file.read(name)
        return (part for _, part in row_chunks(file, name))

    def restored(self) -> dict[str, Any]:
        """The description as it was before its linears were compressed."""
        coded, result = self.coded, {}
        for key, kind in self.description.items():
            path, _, suffix = key.rpartition(".")
            if path in coded and suffix in ("index", "info"):
                continue
            known = path in coded or key == KIND_KEY
            result[key] = CODED[kind].plain if known and kind in list(CODED) else kind
        return result

    def compressed(self, paths: set[str]) -> dict[str, Any]:
        """The description as it is when some linears are compressed."""
        result = {}
        for key, kind in self.description.items():
            path, _, suffix = key.rpartition(".")
            if path in paths and suffix == "weight":
                result.update({f"{path}.{s}": PLAIN[kind].coded for s in CODED_SUFFIXES})
            elif key == KIND_KEY and kind in list(PLAIN):
                result[key] = PLAIN[kind].coded
            else:
                result[key] = kind
        return result

    def restored_plans(self) -> dict[str, TensorPlan]:
        """Every tensor as it was before compression, by name."""
        coded, plans = self.coded, {}
        for name in self.checkpoint.names:
            path, _, suffix = name.rpartition(".")
            info = self.info(name)
            if path in coded and suffix in ("index", "info"):
                continue
            if path in coded and suffix == "weight":
                plans[name] = TensorPlan(name, coded[path].dtype, self.shape(path))
            else:
                plans[name] = TensorPlan(name, info.dtype, info.shape)
        return plans

    def companions(self) -> tuple[str, ...]:
        """Files that go with the tensors, as paths in the directory: config, tokenizer, code."""
        return companions(self.directory)

    def kind(self, codings: Mapping[str, Coding]) -> str:
        """The type that the model has, of several that could be."""
        stated = self.description.get(KIND_KEY)
        found = {coding.plain for coding in (self.plain | self.coded).values()}
        kinds = [kind for kind, coding in codings.items() if coding.plain in found]
        return stated if isinstance(stated, str) and stated in kinds else kinds[0]

    def _linears(self, kinds: dict[str, Coding]) -> dict[str, Coding]:
        return {
            key.removesuffix(".weight"): kinds[kind]
            for key, kind in self.description.items()
            if key.endswith(".weight") and kind in kinds
        }

    def _error(self, name: str, text: str, mark: str = " ") -> MsQuantError:
        return BadFileError(f"{self.checkpoint.file_of(name).path}: tensor {name!r}{mark}{text}")

    def _check_entry(self, key: str, kind: Any) -> None:
        if not isinstance(kind, str):
            raise BadFileError(f"{self.path}: {key} is {kind!r:.80}, expected a type")
        if key not in self._names:
            raise BadFileError(
                f"{self.path}: names tensor {key!r:.200}, expected it in a file of {self.directory}"
            )
        weight = key.endswith(".weight")
        if kind in PLAIN or kind in CODED:
            self._check_linear(key, kind)
        elif kind == FLOAT and weight and self.info(key).code not in FLOAT_CODES:
            raise self._error(key, f"is {self._found(key)}, expected a float type as {self.path}")

    def _check_linear(self, key: str, kind: str) -> None:
        """One tensor whose type is of a linear that is or can be compressed."""
        path, _, suffix = key.rpartition(".")
        coding = PLAIN.get(kind) or CODED[kind]
        whole = self.description.get(f"{path}.weight")
        if whole not in (coding.plain, coding.coded):
            raise BadFileError(
                f"{self.path}: {key} is {kind} and '{path}.weight' is {whole!r:.80}, expected one "
                "type"
            )
        if suffix == "weight" and kind in CODED:
            self._expect(f"{path}.weight", INT8, (None,), kind)
            self._expect(f"{path}.index", INT8, (None,), kind)
            self._expect(f"{path}.info", INT64, (5,), kind)
        elif suffix == "weight":
            self._check_plain(path, coding)

    def _check_plain(self, path: str, coding: Coding) -> None:
        name = f"{path}.weight"
        if coding.dtype == FLOAT16 and self.info(name).code == "BF16":
            raise self._error(
                name,
                "is BF16, which the Atlas 300I Duo does not have; expected F16: set torch_dtype to "
                "float16 in the model's config.json and quantize it again",
            )
        self._expect(name, coding.dtype, (None, None), coding.plain)
        for suffix in ("index", "info"):
            if f"{path}.{suffix}" in self._names:
                raise self._error(f"{path}.{suffix}", f"is there, expected none beside {name}")
        for suffix in coding.parameters:
            found = self.description.get(f"{path}.{suffix}")
            if found != coding.plain:
                raise BadFileError(
                    f"{self.path}: {path}.{suffix} is {found!r:.80}, expected {coding.plain!r} as "
                    f"{name}"
                )
        rows = self.info(name).shape[0]
        for suffix in coding.parameters[:2]:
            if f"{path}.{suffix}" in self._names and self.info(f"{path}.{suffix}").shape != (rows,):
                found = self._found(f"{path}.{suffix}")
                raise self._error(f"{path}.{suffix}", f"is {found}, expected {rows} values")

    def _expect(self, name: str, dtype: np.dtype, shape: tuple[int | None, ...], kind: str) -> None:
        """A tensor of some type and shape, in which None is any size."""
        if name not in self._names:
            raise BadFileError(f"{self.directory}: has no tensor {name!r}, expected it of a {kind}")
        info = self.info(name)
        fits = len(info.shape) == len(shape) and all(
            size in (None, found) for size, found in zip(shape, info.shape, strict=True)
        )
        if info.dtype != dtype or not fits:
            wanted = " x ".join("any" if size is None else str(size) for size in shape)
            raise self._error(
                name, f"is {self._found(name)}, expected {CODES[dtype]} [{wanted}] of a {kind}"
            )

    def _found(self, name: str) -> str:
        info = self.info(name)
        return f"{info.code} {list(info.shape)}"
