"""What the commands that run checkpoints share: opening them, and what to say of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ms_quant.cli.console import note
from ms_quant.errors import BadArgumentError, MsQuantError

if TYPE_CHECKING:
    from ms_quant.formats.opening import ServedModel


def opened(checkpoint: Path) -> ServedModel:
    from ms_quant.formats.opening import open_model

    model = open_model(checkpoint)
    _note_oddities(model)
    return model


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Says of which of two checkpoints an error is."""
    try:
        yield
    except MsQuantError as error:
        raise type(error)(f"{place}: {error}") from None


def require_another(checkpoint: Path, against: Path) -> None:
    if against.resolve() == checkpoint.resolve():
        raise BadArgumentError(
            f"--against: {against} is the checkpoint itself, expected another, or --kv-cache or "
            "--float16 to see what they change"
        )


def note_length(model: ServedModel, place: Path, positions: int) -> None:
    """Says so where a text is longer than those that a model was made for."""
    if beyond := model.config.beyond(positions):
        note(f"note: {place}: {beyond}, the text has {positions}")


def _note_oddities(model: Any) -> None:
    """What is wrong or odd in the files of a checkpoint that can be read all the same."""
    structure = getattr(model, "structure", None)
    for text in [*structure.defects, *structure.notes] if structure else []:
        note(f"note: {text}")


def with_error(value: float, error: float | None, unit: str) -> str:
    """0.00183, 0.0011 -> "+0.18 % ± 0.11 %": two digits of the error, and two places at least."""
    scale, unit = (100, f" {unit}") if unit else (1, "")
    size = abs(error or value)
    digits = max(2, 1 - math.floor(math.log10(scale * size))) if size else 2
    found = f"{scale * value:+.{digits}f}{unit}"
    return found if error is None else f"{found} ± {scale * error:.{digits}f}{unit}"
