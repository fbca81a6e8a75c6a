"""A model as callers give it: opened, or the directory that it is in."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from ms_quant.errors import MsQuantError
from ms_quant.formats.opening import ServedModel, open_model
from ms_quant.formats.source_kind import model_directory

AnyPath = str | PathLike[str]


def opened(model: ServedModel | AnyPath) -> ServedModel:
    """The opened model.

    Raises:
        MsQuantError: the directory does not exist or is of no known format.
    """
    return open_model(Path(model)) if isinstance(model, str | PathLike) else model


def tokenizer_directory(model: ServedModel | AnyPath, tokenizer: AnyPath | None) -> Path:
    """Where the tokenizer files are: where they are said to be, or beside the model.

    Raises:
        MsQuantError: the model is opened, and nothing says where its tokenizer is.
    """
    place = tokenizer if tokenizer is not None else model
    if not isinstance(place, str | PathLike):
        raise MsQuantError(
            "an opened model has no tokenizer, expected tokenizer= the directory of its files"
        )
    return model_directory(Path(place))
