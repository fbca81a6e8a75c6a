"""A whole model in memory that goes on with several texts at once.

What is computed of a text does not depend on the others, bit for bit: its prompt is computed alone,
and in steps no number of one row depends on which others there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.evaluation.caches import new_caches
from ms_quant.evaluation.float32_forward import LastNorm, check_output, load_block
from ms_quant.evaluation.head import EMBEDDING, head_name, require_head
from ms_quant.formats.opening import ServedModel
from ms_quant.models.block_forward import Positions
from ms_quant.models.cache import FIRST_TOKENS, KeyValueCache, StepCaches
from ms_quant.models.embedding import Table

KEPT_POSITIONS = 4096  # whose rotary angles stay in memory


def _never() -> None:
    """Nothing ends a computation early."""


@dataclass(frozen=True)
class DecodedText:
    """A text that a model goes on with.

    Attributes:
        caches: of each block.
    """

    caches: list[KeyValueCache]

    @property
    def length(self) -> int:
        """How many tokens are cached."""
        return self.caches[0].length


class Decoder:
    """A model in memory.

    Args:
        model: the checkpoint.
        kv_cache: how keys and values are cached, see :func:`ms_quant.evaluation.caches.new_caches`.
        loaded: is called after each block that was read.

    Raises:
        MsQuantError: the model has no head.
    """

    def __init__(
        self,
        model: ServedModel,
        kv_cache: str | None = None,
        loaded: Callable[[int, float], None] = lambda index, part: None,
    ):
        require_head(model)
        self.config, self.new_caches = model.config, new_caches(model, kv_cache)
        self.table = Table(model.tensor(EMBEDDING))
        self.first, self.further = [], []
        for index in range(model.config.num_layers):
            block = load_block(model, index)
            self.first.append(block)
            self.further.append(block.in_steps())
            loaded(index, 1.0)
        self.norm = LastNorm(model)
        tied = model.config.tied
        self.head = self.table if tied else Table(model.tensor(head_name(model)))
        self._position = lru_cache(KEPT_POSITIONS)(self._one_position)

    def begin(self, tokens: int = FIRST_TOKENS) -> DecodedText:
        """A text without tokens; there is room for some from the beginning."""
        return DecodedText([new_cache(first_tokens=tokens) for new_cache in self.new_caches])

    def prefill(
        self, sequence: DecodedText, ids: np.ndarray, between: Callable[[], None] = _never
    ) -> np.ndarray:
        """Logits of the token after a prompt, float32 (vocab,).

        Args:
            sequence: a text without tokens, which gets those of the prompt.
            ids: of the prompt, int64 (S,), at least one.
            between: is called before each block; what it raises ends the computation.

        Raises:
            MsQuantError: there is no token, or activations overflow.
        """
        return self._logits(self._prompt(sequence, ids, between)[:, -1:])[0]

    def prefill_all(
        self, sequence: DecodedText, ids: np.ndarray, between: Callable[[], None] = _never
    ) -> Callable[[slice], np.ndarray]:
        """The same of every token: a function from a slice of positions to the logits of the tokens
        after them, float32 (positions, vocab)."""
        hidden = self._prompt(sequence, ids, between)
        return lambda part: self._logits(hidden[:, part])

    def step(self, tokens: Sequence[int], sequences: Sequence[DecodedText]) -> np.ndarray:
        """Adds a token to each text; logits of those after them, float32 (texts, vocab).

        Raises:
            MsQuantError: activations overflow.
        """
        at = Positions.of_step([self._position(one.length) for one in sequences])
        hidden = self.table.rows(np.asarray(tokens, np.int64))[None]
        for index, block in enumerate(self.further):
            caches = StepCaches([one.caches[index] for one in sequences])
            hidden = check_output(block(hidden, at, caches), index)
        return self._logits(hidden)

    def _prompt(
        self, sequence: DecodedText, ids: np.ndarray, between: Callable[[], None]
    ) -> np.ndarray:
        if not len(ids):
            raise BadArgumentError("the prompt has no tokens, expected at least one")
        at, hidden = Positions(self.config, len(ids)), self.table.rows(ids)[None]
        for index, (block, cache) in enumerate(zip(self.first, sequence.caches, strict=True)):
            between()
            hidden = check_output(block(hidden, at, cache), index)
        return hidden

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        return self.head.matmul(self.norm(hidden).reshape(-1, hidden.shape[2]))

    def _one_position(self, position: int) -> Positions:
        return Positions(self.config, position + 1, position)
