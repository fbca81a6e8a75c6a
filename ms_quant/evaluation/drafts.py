"""How often a block for further tokens drafts what the model itself predicts next."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ms_quant import kernels
from ms_quant.budget import BUDGET, Budget
from ms_quant.errors import BadArgumentError
from ms_quant.evaluation.float32_forward import Float32Forward, check_output, load_block
from ms_quant.evaluation.head import head_name, require_head
from ms_quant.evaluation.perplexity import last_states
from ms_quant.formats.opening import ServedModel
from ms_quant.models.block_forward import Positions
from ms_quant.models.embedding import best_tokens, cross_entropy, used_rows
from ms_quant.models.further_tokens import EMBEDDING, HEAD, HEAD_NORM, FurtherInput
from ms_quant.models.names import block_prefix
from ms_quant.progress import BlockProgress, silent


@dataclass(frozen=True)
class Drafts:
    """How good a model's drafts are.

    Attributes:
        acceptance: the share of drafts that are what the model predicts after its own next token.
        loss: of the draft of the next but one token, mean negative log likelihood.
        tokens: how many drafts there were.
    """

    acceptance: float
    loss: float
    tokens: int


def drafts(
    model: ServedModel,
    tokens: np.ndarray,
    progress: BlockProgress = silent,
    *,
    kv_cache: str | None = None,
    budget: Budget = BUDGET,
) -> Drafts:
    """Drafts of a text by the first block for further tokens, each with the text's own next token.

    Args:
        model: what ``ms_quant.open_model`` opened.
        tokens: the text, int32 (windows, tokens), at least 3 tokens each.
        progress: told how far each block is.
        kv_cache: how keys and values are cached; None is as the checkpoint says.
        budget: what bounds the memory of a forward.

    Raises:
        MsQuantError: the model has no such block, or a window is shorter than 3 tokens.
    """
    require_head(model)
    config, (count, length) = model.config, tokens.shape
    if not config.further_layers:
        raise BadArgumentError(
            "drafts: the model has no layer that predicts further tokens "
            "(num_nextn_predict_layers is 0 or its tensors are absent), expected one"
        )
    if length < 3:
        raise BadArgumentError(f"seq_len is {length}, expected at least 3")
    prefix = block_prefix(config.num_layers)
    forward = Float32Forward(model, length, False, kv_cache, budget)
    with tempfile.TemporaryDirectory(prefix="ms-quant-drafts-") as directory:
        last = last_states(model, forward, tokens, Path(directory), progress, budget)
        following = tokens[:, 1:]
        rows = used_rows(model.chunks(f"{prefix}{EMBEDDING}.weight"), following)
        made, block = FurtherInput(config, model.tensor), load_block(model, config.num_layers)
        at, gain = Positions(config, length - 1), model.tensor(prefix + HEAD_NORM)
        hits, losses = 0, 0.0
        for start in range(0, count, budget.windows(length)):
            part = slice(start, start + budget.windows(length))
            x = made.of_normed(np.array(last[part, :-1]), rows(following[part]))
            y = check_output(block(x, at), config.num_layers)
            drafted = kernels.rms_norm(y, gain, config.rms_norm_eps).reshape(-1, y.shape[2])
            own = last[part, 1:].reshape(-1, y.shape[2])
            head = prefix + HEAD
            predicted = best_tokens(model.chunks(head_name(model)), own, budget.logit_bytes)
            hits += int((best_tokens(model.chunks(head), drafted) == predicted).sum())
            targets = np.roll(following[part], -1, axis=1).ravel()
            lost = cross_entropy(model.chunks(head), drafted, targets, budget.logit_bytes)
            losses += float(lost.reshape(-1, length - 1)[:, :-1].sum())
        del last
    return Drafts(
        hits / (count * (length - 1)), losses / (count * (length - 2)), count * (length - 1)
    )
