"""How FlatQuant trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field


@dataclass(frozen=True)
class FlatOptions:
    """How to train.

    Attributes:
        steps: of Adam; 0 returns the best start.
        batch_tokens: tokens of one step, drawn without replacement.
        batch_rows: weight rows of one step, drawn likewise.
        learning_rate: largest change of a factor in a step, relative to the factor; divided by
            the square root of the factor's order.
        clip_learning_rate: of the clipping logits.
        row_clips: how many ratios from 0.5 to 1 are tried for each weight row at the end.
        seed: of the Hadamard matrices' signs and of the batches.
    """

    steps: Annotated[int, Field(ge=0)] = 400
    batch_tokens: Annotated[int, Field(ge=1)] = 128
    batch_rows: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.15
    clip_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    row_clips: Annotated[int, Field(ge=1)] = 41
    seed: Annotated[int, Field(ge=0)] = 0
