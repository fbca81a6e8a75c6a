"""What verifying a checkpoint found, for programs and as the JSON of the command."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERDICTS = ("right", "right as far as can be seen", "wrong")


@dataclass(frozen=True)
class ComparedLinear:
    """A quantized linear beside that of the source.

    Attributes:
        layer: its path.
        output_error: relative MSE of its output.
        made_again: whether its weight was made again from the source, bit for bit.
    """

    layer: str
    output_error: float
    made_again: bool


@dataclass
class SourceFindings:
    """What the comparison with a source has found so far.

    Attributes:
        layers: the linears that were compared.
        unknown: paths of those that could not be, because where their smoothing went is not known.
    """

    layers: list[ComparedLinear] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def made_again(self) -> int:
        """How many weights were made again, bit for bit."""
        return sum(layer.made_again for layer in self.layers)

    @property
    def measured(self) -> int:
        """How many linears were compared by their output alone."""
        return len(self.layers) - self.made_again


@dataclass
class Findings:
    """What was found so far; :class:`Verification` says what each is."""

    problems: list[str] = field(default_factory=list)
    not_proved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quantized: int | None = None
    left_float: int | None = None
    comparison: SourceFindings | None = None

    def of(self, directory: Path) -> Verification:
        """The result for a checkpoint that has been gone through."""
        compared = self.comparison
        return Verification(
            checkpoint=directory,
            verdict=VERDICTS[2 if self.problems else 1 if self.not_proved else 0],
            problems=tuple(self.problems),
            not_proved=tuple(self.not_proved),
            notes=tuple(self.notes),
            layers=tuple(compared.layers) if compared else (),
            quantized=self.quantized,
            left_float=self.left_float,
            made_again=compared.made_again if compared else None,
            measured=compared.measured if compared else None,
            unknown=tuple(compared.unknown) if compared else None,
        )


@dataclass(frozen=True)
class Verification:
    """What :func:`ms_quant.verify_checkpoint` found.

    Attributes:
        checkpoint: the directory.
        verdict: one of ``VERDICTS``.
        problems: what is wrong, one sentence each; empty when the checkpoint is right.
        not_proved: what of a checkpoint that others made is taken on trust, one clause each.
        notes: about files that nothing reads, and oddities that mean the same.
        layers: the linears that were compared with the source.
        quantized: how many linears are quantized; None where the files do not tell.
        left_float: how many stayed float; None where the files do not tell.
        made_again: how many weights were made again from the source, bit for bit; None where
            nothing was compared, as are the next two.
        measured: how many linears were compared by their output alone.
        unknown: paths of the linears that could not be compared.
    """

    checkpoint: Path
    verdict: str
    problems: tuple[str, ...]
    not_proved: tuple[str, ...]
    notes: tuple[str, ...]
    layers: tuple[ComparedLinear, ...]
    quantized: int | None
    left_float: int | None
    made_again: int | None
    measured: int | None
    unknown: tuple[str, ...] | None

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        known = {
            "quantized": self.quantized,
            "float": self.left_float,
            "made_again": self.made_again,
            "measured": self.measured,
            "unknown": None if self.unknown is None else list(self.unknown),
        }
        return {
            "checkpoint": str(self.checkpoint),
            "verdict": self.verdict,
            "problems": list(self.problems),
            "not_proved": list(self.not_proved),
            "notes": list(self.notes),
            "layers": [asdict(layer) for layer in self.layers],
            **{name: value for name, value in known.items() if value is not None},
        }
