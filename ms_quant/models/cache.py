"""The key-value cache of a generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ms_quant import kernels
from ms_quant.numerics import affine, groupwise

if TYPE_CHECKING:
    from ms_quant.models.block_spec import BlockSpec

FIRST_TOKENS = 64  # that arrays have room for; they grow by half


class _Room:
    """An array (B, heads, T, D) that grows along its tokens."""

    def __init__(self, first_tokens: int) -> None:
        self.length, self._first_tokens = 0, first_tokens
        self._held: np.ndarray | None = None

    @property
    def token_bytes(self) -> int:
        """What a token takes."""
        return 0 if self._held is None else self._held.nbytes // self._held.shape[2]

    def append(self, new: np.ndarray) -> np.ndarray:
        """Adds (B, heads, S, D), and gives a view of all."""
        start, self.length = self.length, self.length + new.shape[2]
        if self._held is None or self._held.shape[2] < self.length:
            tokens = max(self._first_tokens, self.length * 3 // 2)
            grown = np.empty((*new.shape[:2], tokens, new.shape[3]), new.dtype)
            if self._held is not None:
                grown[:, :, :start] = self._held[:, :, :start]
            self._held = grown
        self._held[:, :, start : self.length] = new
        return self._held[:, :, : self.length]

    def shorten(self, length: int) -> None:
        """Forgets what was added after so many tokens."""
        self.length = min(self.length, length)


class KeyValueCache:
    """Keys and values of one attention layer in float32, for the tokens seen so far.

    Of latent attention they are the rotary key that heads share, and the latent vectors.

    Args:
        first_tokens: how many there is room for at first.

    Attributes:
        absorbs: whether latent attention works in the latent space for first tokens, too.
    """

    absorbs = False

    def __init__(self, first_tokens: int = FIRST_TOKENS) -> None:
        self._keys, self._values = _Room(first_tokens), _Room(first_tokens)

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self._keys.length

    @property
    def token_bytes(self) -> int:
        """What a token takes; known once there is one."""
        return self._keys.token_bytes + self._values.token_bytes

    def extend(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds float32 (B, heads, S, D) keys and values, and gives all of them, (B, heads, T, D);
        what is given are views."""
        return self._keys.append(keys), self._values.append(values)

    def shorten(self, length: int) -> None:
        """Forgets all tokens after the first so many, so that others may go on from there."""
        self._keys.shorten(length)
        self._values.shorten(length)

    def queries(self, brought: np.ndarray) -> np.ndarray:
        """What attention in the latent space reads of queries, (B, heads, S, rank)."""
        return brought


class Int8KeyValueCache(KeyValueCache):
    """C8: codes of all tokens, with one scale for each channel or one for each token.

    What is not in int8 is only what :meth:`extend` gives. Codes and values are bit-equal to those
    of :mod:`ms_quant.numerics.kv_cache`.

    Args:
        scales: float32 (kv heads * head_dim,) arrays, static scales of the keys and the values by
            the linears that make them, in this order; None for one scale for each token's keys and
            one for its values, of what they are.
        first_tokens: how many there is room for at first.
    """

    def __init__(
        self, scales: Mapping[str, np.ndarray] | None = None, first_tokens: int = FIRST_TOKENS
    ) -> None:
        super().__init__(first_tokens)
        self._static = None if scales is None else list(scales.values())
        self._scales = _Room(first_tokens), _Room(first_tokens)

    def shorten(self, length: int) -> None:
        """As of :class:`KeyValueCache`."""
        super().shorten(length)
        for scales in self._scales:
            scales.shorten(length)

    def extend(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As of :class:`KeyValueCache`, but what is given are what the codes of all stand for.

        Raises:
            MsQuantError: a key or a value is NaN or infinite.
        """
        return self._extend(0, self._keys, keys), self._extend(1, self._values, values)

    def _extend(self, which: int, codes: _Room, x: np.ndarray) -> np.ndarray:
        x = groupwise.finite(x, f"cached {('keys', 'values')[which]}")
        if self._static is not None:
            scale = every = self._static[which].reshape(1, x.shape[1], 1, x.shape[3])
        else:
            scale = affine.symmetric_scale(np.abs(x).max(axis=(1, 3), keepdims=True))
            every = self._scales[which].append(scale)
        held = codes.append(affine.quantize(x, scale)).astype(np.float32)
        return np.multiply(held, every, out=held)


class Int8LatentCache(KeyValueCache):
    """C8 of latent attention: codes of the latent vectors, queries in int8, rotary keys in float.

    Args:
        scales: float32 scales, by what holds them, of the queries of each head and of the latent
            vectors as keys, in this order. What more there is no runtime reads: it has one code
            for both uses of a latent vector.
        first_tokens: how many there is room for at first.
    """

    absorbs = True

    def __init__(self, scales: Mapping[str, np.ndarray], first_tokens: int = FIRST_TOKENS) -> None:
        super().__init__(first_tokens)
        self._queries, self._latents, *_ = scales.values()

    def extend(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As of :class:`KeyValueCache`, but the latent vectors given are what their codes stand
        for.

        Raises:
            MsQuantError: a latent vector holds NaN or infinity.
        """
        new = affine.quantize(groupwise.finite(values, "cached latent vectors"), self._latents)
        return self._keys.append(keys), affine.dequantize(self._values.append(new), self._latents)

    def queries(self, brought: np.ndarray) -> np.ndarray:
        """What the codes of the queries stand for.

        Raises:
            MsQuantError: a query is NaN or infinite.
        """
        scale = self._queries.reshape(1, -1, 1, 1)
        codes = affine.quantize(groupwise.finite(brought, "queries in the latent space"), scale)
        return affine.dequantize(codes, scale)


class StepCaches:
    """The caches of one attention layer of several sequences, to each of which a step adds one
    token. What a sequence gets does not depend on the others.

    Args:
        caches: of each sequence.
    """

    def __init__(self, caches: Sequence[KeyValueCache]) -> None:
        self._caches = caches

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
        """Attention of one query of each sequence, whose key and value are cached first.

        Args:
            q: float32 (1, heads, sequences, D).
            k, v: float32 (1, kv heads, sequences, D).
            scale: factor on the scores.

        Returns:
            float32 (1, sequences, heads, D).
        """
        held = [cache.extend(*_of_one(i, k, v)) for i, cache in enumerate(self._caches)]
        keys, values = [keys[0] for keys, _ in held], [values[0] for _, values in held]
        return kernels.step_attention(q[0].transpose(1, 0, 2), keys, values, scale)[None]

    def attend_latent(
        self,
        brought: np.ndarray,
        turned: np.ndarray,
        key: np.ndarray,
        latent: np.ndarray,
        scale: float,
    ) -> np.ndarray:
        """The same of latent attention, in the latent space.

        Args:
            brought: queries there, float32 (1, heads, sequences, rank).
            turned: the rotary channels of the queries, float32 (1, heads, sequences, D).
            key: the rotary keys, float32 (1, 1, sequences, D).
            latent: the latent vectors, float32 (1, 1, sequences, rank).
            scale: factor on the scores.

        Returns:
            float32 (1, sequences, heads, rank).
        """
        q = np.concatenate([self._caches[0].queries(brought), turned], axis=3)
        held = [cache.extend(*_of_one(i, key, latent)) for i, cache in enumerate(self._caches)]
        keys = [np.concatenate([latents, keys], axis=3)[0] for keys, latents in held]
        values = [latents[0] for _, latents in held]
        return kernels.step_attention(q[0].transpose(1, 0, 2), keys, values, scale)[None]


def _of_one(index: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(array[:, :, index : index + 1] for array in arrays)


AnyCache = KeyValueCache | StepCaches


def static_cache(
    block: BlockSpec, scales: Mapping[str, np.ndarray]
) -> Callable[..., KeyValueCache]:
    """What makes an empty cache of a block with static scales, by the paths of what is cached."""
    heads = any(spec.heads for spec in block.cached.values())
    return partial(Int8LatentCache if heads else Int8KeyValueCache, scales)
