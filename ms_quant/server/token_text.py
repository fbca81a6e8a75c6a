"""What a single token stands for, as likelihoods are told."""

from __future__ import annotations

from functools import lru_cache

from ms_quant.data.tokenizer import ModelTokenizer


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """What byte each character of a byte-level vocabulary stands for (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    found = {chr(byte): byte for byte in shown}
    return found | {chr(256 + place): byte for place, byte in enumerate(hidden)}


class TokenTexts:
    """The bytes and the text of tokens.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: ModelTokenizer):
        self._backend = tokenizer.backend
        self._special = set(self._backend.get_added_tokens_decoder())
        self._byte_level = "ByteLevel" in self._backend.to_str().partition('"decoder"')[2][:4000]
        self.bytes_of = lru_cache(1 << 16)(self._bytes_of)

    def text_of(self, token: int) -> str:
        """Its text; of a part of a character its bytes, as OpenAI writes them."""
        raw = self.bytes_of(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if token in self._special:
            return piece.encode()
        if self._byte_level:
            table = _bytes_of_characters()
            if all(char in table for char in piece):
                return bytes(table[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()
