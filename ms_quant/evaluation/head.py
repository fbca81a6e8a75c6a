"""The two tables of a checkpoint that predicts tokens."""

from __future__ import annotations

from typing import Protocol

from ms_quant.errors import BadArgumentError
from ms_quant.models.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"


class Configured(Protocol):
    """Attributes:
    config: what the model is.
    """

    @property
    def config(self) -> ModelConfig: ...


def require_head(model: Configured) -> None:
    """Refuses a model that predicts no tokens.

    Raises:
        MsQuantError: it gives out labels or its last hidden states.
    """
    if not model.config.predicts:
        what = "a classifier" if model.config.labels else "its last hidden states (no lm_head)"
        raise BadArgumentError(
            f"the model gives out {what}, expected one that predicts tokens: there is no "
            "perplexity and no text of it"
        )


def head_name(model: Configured) -> str:
    """The tensor whose rows are multiplied with the last hidden states."""
    return EMBEDDING if model.config.tied else "lm_head.weight"
