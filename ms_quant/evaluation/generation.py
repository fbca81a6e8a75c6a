"""Greedy text of a checkpoint, with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.caches import new_caches
from ms_quant.evaluation.float32_forward import LastNorm, check_output, load_block
from ms_quant.evaluation.head import EMBEDDING, head_name, require_head
from ms_quant.formats.opening import ServedModel
from ms_quant.models.block_forward import Positions
from ms_quant.models.cache import KeyValueCache
from ms_quant.models.embedding import Table


class Generator:
    """A whole model in memory, for greedy generation with a key-value cache.

    Args:
        model: the checkpoint.
        kv_cache: how keys and values are cached, see :func:`ms_quant.evaluation.caches.new_caches`.
        stops: tokens that end a generation beside those of the config, such as the tokenizer's.

    Raises:
        MsQuantError: the model has no head.
    """

    def __init__(
        self, model: ServedModel, kv_cache: str | None = None, stops: Collection[int] = ()
    ):
        require_head(model)
        self.stops = {*model.config.eos_token_ids, *stops}
        self.config = model.config
        self.table = Table(model.tensor(EMBEDDING))
        self.prefill = [load_block(model, index) for index in range(model.config.num_layers)]
        self.decode = [block.in_decode() for block in self.prefill]
        self.new_caches = new_caches(model, kv_cache)
        self.norm = LastNorm(model)
        tied = model.config.tied
        self.head = self.table if tied else Table(model.tensor(head_name(model)))

    def generate(self, prompt: np.ndarray, new_tokens: int) -> Iterator[int]:
        """Yields the most likely next token again and again, until an end token or the limit.

        Args:
            prompt: int32 (S,), at least one token.
            new_tokens: at most this many.
        """
        if not len(prompt):
            raise MsQuantError("the prompt has no tokens, expected at least one")
        caches = [new_cache() for new_cache in self.new_caches]
        ids = np.asarray(prompt, np.int64)
        for _ in range(new_tokens):
            token = int(np.argmax(self._step(ids, caches)))
            if token in self.stops:
                return
            yield token
            ids = np.array([token])

    def _step(self, ids: np.ndarray, caches: list[KeyValueCache]) -> np.ndarray:
        """Logits of the token after ``ids``."""
        start = caches[0].length
        positions = Positions(self.config, start + len(ids), start)
        hidden = self.table.rows(ids)[None]
        blocks = self.decode if start else self.prefill
        for index, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
            hidden = check_output(block(hidden, positions, cache.extend), index)
        return self.head.matmul(self.norm(hidden[:, -1:]).reshape(-1))
