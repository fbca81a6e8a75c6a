"""What becomes of one text, told to the client's coroutine in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ms_quant.data.tokenizer import ModelTokenizer
from ms_quant.server.sampling import TokenLogprob
from ms_quant.server.text_request import END
from ms_quant.server.text_stream import Detokenizer, StopStrings


@dataclass(frozen=True)
class Told:
    """A token as clients are told of it.

    Attributes:
        found: its id, and how likely it was.
        offset: where its text begins in the text that the client gets.
    """

    found: TokenLogprob
    offset: int


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        index: which answer of a request.
        text: what it goes on with.
        tokens: what was made since the last piece, and the prompt's where they are asked for.
        made: how many new tokens that is.
        reason: why the answer ends; None if it goes on.
        error: what broke; nothing comes after that.
    """

    index: int
    text: str = ""
    tokens: tuple[Told, ...] = ()
    made: int = 0
    reason: str | None = None
    error: BaseException | None = None


class Answer:
    """The listener of one text. Its methods run in the thread that computes.

    Args:
        index: which answer of a request.
        tokenizer: of the model.
        prompt: token ids.
        echo: the text of the prompt, if it is part of the answer.
        stops: strings that end it.
        streams: whether each piece is posted; else all of it as one.
        post: takes pieces.
        begun: is called with the first token.
    """

    def __init__(
        self,
        index: int,
        tokenizer: ModelTokenizer,
        prompt: Sequence[int],
        echo: str | None,
        stops: Sequence[str],
        streams: bool,
        post: Callable[[Piece], None],
        begun: Callable[[], None] = lambda: None,
    ):
        self._index, self._tokenizer, self._prompt = index, tokenizer, prompt
        self._text, self._stops = Detokenizer(tokenizer, prompt), StopStrings(stops)
        self._streams, self._post, self._begun = streams, post, begun
        self._pending, self._tokens, self._made = echo or "", list[Told](), 0
        self._length, self._any = len(self._pending), False

    def prompt(self, found: list[TokenLogprob]) -> None:
        """How likely the tokens of the prompt were."""
        text, offset = Detokenizer(self._tokenizer), 0
        for one in found:
            self._tokens.append(Told(one, offset))
            offset += len(text.add(one.token))

    def token(self, found: TokenLogprob) -> bool:
        """A new token; whether the text goes on."""
        if not self._any:
            self._any = True
            self._begun()
        if found.logprob is not None:
            self._tokens.append(Told(found, self._length))
        self._made += 1
        new = self._text.add(found.token)
        self._length += len(new)
        self._pending += self._stops.add(new)
        if self._streams and (self._pending or self._tokens):
            self._flush()
        return not self._stops.met

    def finished(self, reason: str) -> None:
        """The text is whole."""
        if not self._stops.met:
            self._pending += self._stops.add(self._text.rest())
            self._pending += self._stops.rest()
        self._flush(END if self._stops.met else reason)

    def failed(self, error: BaseException) -> None:
        """There will be no more of it."""
        self._post(Piece(self._index, error=error))

    def _flush(self, reason: str | None = None) -> None:
        self._post(Piece(self._index, self._pending, tuple(self._tokens), self._made, reason))
        self._pending, self._tokens, self._made = "", [], 0
