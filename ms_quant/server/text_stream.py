"""Tokens become text, piece by piece: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from ms_quant.data.tokenizer import ModelTokenizer

HALF = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
CONTEXT = 6  # tokens of the prompt that are decoded with the first new ones, which decides spaces


class Detokenizer:
    """The text of new tokens as far as it is certain.

    Each piece is decoded with the one before it, as a token's text may depend on its neighbour.

    Args:
        tokenizer: of the model.
        prompt: the ids before them.
    """

    def __init__(self, tokenizer: ModelTokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT:])
        self._known = len(self._ids)  # of which the text was told
        # A character that the prompt began is told when it is whole.
        self._told = tokenizer.decode(self._ids).rstrip(HALF)

    def add(self, token: int) -> str:
        """What is certain after one more token."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        new = text[len(self._told) :]
        if not new or new.endswith(HALF):
            return ""
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        self._told = self._tokenizer.decode(self._ids)
        return new

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._tokenizer.decode(self._ids)[len(self._told) :]


class StopStrings:
    """Text up to the first of some strings.

    Args:
        stops: the strings, none of them empty.

    Attributes:
        met: whether one was found.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.met = tuple(stops), "", False

    def add(self, text: str) -> str:
        """What may be told after some more text; nothing once one was found."""
        if self.met:
            return ""
        self._held += text
        places = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.met = True
            told, self._held = self._held[: min(places)], ""
            return told
        keep = max((_begun(self._held, stop) for stop in self._stops), default=0)
        told, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return told

    def rest(self) -> str:
        """What was held back, at the end."""
        told, self._held = self._held, ""
        return told


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text a stop string may begin with."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
