"""From a request's body to the texts that are computed for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ms_quant.data.tokenizer import ModelTokenizer
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig
from ms_quant.server.answers import Answer, Piece
from ms_quant.server.options import ServerOptions
from ms_quant.server.protocol import ChatRequest, CompletionRequest
from ms_quant.server.replies import RefusedError
from ms_quant.server.shapes import ChatShape, CompletionShape, Shape
from ms_quant.server.text_request import TextRequest
from ms_quant.server.token_text import TokenTexts

COMPLETION_TOKENS = 16  # new ones, as OpenAI's API has it where nothing is said
CHAT_TOKENS = 1024  # of an answer where nothing is said, if there is room


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it.

    Attributes:
        ids: of its tokens.
        echo: its text, if that is part of the answer.
    """

    ids: list[int]
    echo: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A request that can be computed.

    Attributes:
        texts: what the scheduler is given.
        shape: what its answers look like.
        prompt_tokens: of all prompts.
        streams: whether the answer comes in pieces.
        usage: whether a stream ends with a count.
    """

    texts: list[TextRequest]
    shape: Shape
    prompt_tokens: int
    streams: bool
    usage: bool


class Preparer:
    """Makes texts of requests.

    Args:
        config: the model's shape.
        tokenizer: of the model.
        options: of the server.
        cache_tokens: that all texts may have together.
        stops: tokens that end every text.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: ModelTokenizer,
        options: ServerOptions,
        cache_tokens: int,
        stops: frozenset[int],
    ):
        self.config, self.tokenizer, self.options = config, tokenizer, options
        self.cache_tokens, self.stops = cache_tokens, stops
        self.token_texts = TokenTexts(tokenizer)

    def completion(
        self,
        body: CompletionRequest,
        post: Callable[[Piece], None],
        begun: Callable[[], None],
    ) -> Prepared:
        """The texts of a completion.

        Raises:
            RefusedError: a field is wrong, or there is no room for it.
        """
        self._require_model(body.model)
        prompts = [self._prompt(prompt, body) for prompt in body.prompts]
        shape = CompletionShape(self.options.names[0], self.token_texts, body.logprobs is not None)
        wanted = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if wanted == 0 and not body.echo:
            raise RefusedError("max_tokens is 0 without echo, expected some", param="max_tokens")
        return self._prepared(body, prompts, wanted, body.logprobs, shape, post, begun)

    def chat(
        self, body: ChatRequest, post: Callable[[Piece], None], begun: Callable[[], None]
    ) -> Prepared:
        """The texts of the answers in a conversation.

        Raises:
            RefusedError: as of :meth:`completion`, or the template refuses the messages.
        """
        self._require_model(body.model)
        messages = [message.as_template_sees_it() for message in body.messages]
        try:
            text = self.tokenizer.render(
                messages, body.add_generation_prompt, names=body.chat_template_kwargs
            )
        except MsQuantError as error:
            raise RefusedError(
                str(error).replace(f"{self.tokenizer.directory}: ", ""), param="messages"
            ) from None
        prompt = Prompt(self.tokenizer.encode(text).tolist())
        given = (body.max_tokens, body.max_completion_tokens)
        wanted = next((one for one in given if one is not None), None)
        if wanted is None:
            wanted = max(1, min(CHAT_TOKENS, self._most(len(prompt.ids))))
        if wanted == 0:
            raise RefusedError("max_tokens is 0, expected some", param="max_tokens")
        shape = ChatShape(self.options.names[0], self.token_texts, bool(body.logprobs))
        top = (body.top_logprobs or 0) if body.logprobs else None
        return self._prepared(body, [prompt], wanted, top, shape, post, begun)

    def _prepared(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: list[Prompt],
        wanted: int,
        top: int | None,
        shape: Shape,
        post: Callable[[Piece], None],
        begun: Callable[[], None],
    ) -> Prepared:
        answers, deadline = body.n or 1, time.monotonic() + self.options.timeout
        self._require_texts(len(prompts) * answers)
        for number, prompt in enumerate(prompts):
            self._require_room(prompt.ids, wanted, number if len(prompts) > 1 else None)
        stops = frozenset(body.stop_token_ids or ())
        stops |= frozenset() if body.ignore_eos else self.stops
        echoes = isinstance(body, CompletionRequest) and bool(body.echo)
        texts = []
        for number, prompt in enumerate(prompts):
            for which in range(answers):
                index = number * answers + which
                answer = Answer(
                    *(index, self.tokenizer, prompt.ids, prompt.echo, body.stops),
                    *(bool(body.stream), post, begun),
                )
                texts.append(
                    TextRequest(
                        np.array(prompt.ids, np.int64),
                        wanted,
                        answer,
                        body.sampling,
                        which,
                        stops,
                        top,
                        of_prompt=echoes and top is not None,
                        deadline=deadline,
                    )
                )
        tokens = sum(len(prompt.ids) for prompt in prompts)
        return Prepared(texts, shape, tokens, bool(body.stream), body.wants_usage)

    def _prompt(self, given: str | list[int], body: CompletionRequest) -> Prompt:
        if isinstance(given, str):
            encode = (
                self.tokenizer.encode_prompt if body.add_special_tokens else self.tokenizer.encode
            )
            return Prompt(encode(given).tolist(), given if body.echo else None)
        size = self.config.vocab_size
        wrong = [token for token in given if token >= size]
        if wrong:
            raise RefusedError(
                f"prompt has the token {wrong[0]}, expected less than {size}", param="prompt"
            )
        return Prompt(given, self.tokenizer.decode(given) if body.echo else None)

    def _require_model(self, name: str | None) -> None:
        if name is not None and name not in self.options.names:
            raise RefusedError(
                f"there is no model {name!r:.100}, expected {self.options.names[0]!r}",
                404,
                param="model",
            )

    def _require_texts(self, count: int) -> None:
        if count > self.options.max_texts:
            raise RefusedError(
                f"the request asks for {count} texts, expected at most {self.options.max_texts} "
                "(--max-texts)",
                param="prompt",
            )

    def _most(self, prompt: int) -> int:
        """New tokens that a prompt of so many leaves room for."""
        most = min(self.config.longest - prompt, self.cache_tokens + 1 - prompt)
        return most if self.options.max_tokens is None else min(most, self.options.max_tokens)

    def _require_room(self, ids: list[int], wanted: int, number: int | None) -> None:
        which = "the prompt" if number is None else f"prompt {number}"
        if not ids:
            raise RefusedError(f"{which} has no tokens, expected at least one", param="prompt")
        limit = self.options.max_tokens
        if limit is not None and wanted > limit:
            raise RefusedError(
                f"max_tokens is {wanted}, expected at most {limit} (--max-tokens)",
                param="max_tokens",
            )
        if wanted <= self._most(len(ids)) or (wanted == 0 and self._most(len(ids)) >= 0):
            return
        longest, have = self.config.longest, self.cache_tokens
        where = f"the model's context of {longest}"
        if have < longest:
            where = f"the key-value cache of {have} (--kv-cache-tokens)"
        raise RefusedError(
            f"{which} has {len(ids)} tokens and max_tokens is {wanted}, which does not fit {where}",
            param="max_tokens" if len(ids) < min(longest, have) else "prompt",
        )
