"""What clients may ask, as OpenAI's API has it. A field that would change the answer and is not
known here is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ms_quant.server.replies import RefusedError
from ms_quant.server.sampling import Sampling

MOST_STOPS, STOP_CHARS = 16, 1000
MOST_LOGPROBS = 20
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Fields that may be there with a value that changes nothing."""
UNUSED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "request_id"})
"""Fields that never change an answer."""

Count = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    """Attributes:
    include_usage: whether a last chunk counts tokens.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= STOP_CHARS for stop in stops):
            raise ValueError(
                f"expected at most {MOST_STOPS} texts of 1 to {STOP_CHARS} characters each"
            )
        return value

    @property
    def stops(self) -> list[str]:
        """The strings that end a text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        seed = None if self.seed is None else self.seed & (2**64 - 1)
        return Sampling(
            1.0 if self.temperature is None else self.temperature,
            self.top_p or 1.0,
            max(self.top_k or 0, 0),
            seed,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Refuses fields that are not known, and those that do not go together.

        Raises:
            RefusedError: there is one; names it.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name in UNUSED:
                continue
            allowed = NEUTRAL.get(name)
            if name == "best_of" and type(value) is int and value == (self.n or 1):
                continue
            if allowed is None:
                raise RefusedError(f"{name} is not supported, expected no such field", param=name)
            if value not in allowed:
                shown = f", or {allowed[0]!r}" if allowed else ""
                raise RefusedError(
                    f"{name} {value!r:.60} is not supported, expected no such field{shown}",
                    param=name,
                )
        if self.stream_options is not None and not self.stream:
            raise RefusedError("stream_options needs stream true", param="stream_options")


Prompt = str | list[str] | list[Count] | list[list[Count]]


class CompletionRequest(_Request):
    """The body of ``/v1/completions``.

    Attributes:
        prompt: a text, texts, token ids, or lists of them.
        echo: whether the prompt is part of the answer.
        logprobs: how many most likely tokens are told of each token.
        add_special_tokens: whether a prompt of text gets what the tokenizer puts before every text.
    """

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        given: Any = self.prompt
        several = isinstance(given, list) and not (given and isinstance(given[0], int))
        return given if several else [given]

    def check(self) -> None:
        """See :meth:`_Request.check`."""
        super().check()
        if not self.prompts or any(len(prompt) == 0 for prompt in self.prompts[1:]):
            raise RefusedError("prompt is empty, expected some text or token ids", param="prompt")


class ContentPart(BaseModel):
    """A part of a message.

    Attributes:
        type: only text is understood.
        text: the text.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation; templates may read further fields of it.

    Attributes:
        role: who speaks.
        content: what is said.
    """

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[ContentPart] | None = None

    def as_template_sees_it(self) -> dict[str, Any]:
        """With the text of all parts as one."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content or "", **(self.model_extra or {})}


class ChatRequest(_Request):
    """The body of ``/v1/chat/completions``.

    Attributes:
        messages: the conversation.
        max_completion_tokens: the newer name of ``max_tokens``.
        logprobs: whether likelihoods are told.
        top_logprobs: how many most likely tokens are told of each token.
        add_generation_prompt: whether the assistant's turn is begun.
        chat_template_kwargs: further names for the template.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """See :meth:`_Request.check`."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusedError("top_logprobs needs logprobs true", param="top_logprobs")
        given = (self.max_tokens, self.max_completion_tokens)
        if None not in given and given[0] != given[1]:
            raise RefusedError(
                "max_tokens and max_completion_tokens differ, expected one of them",
                param="max_tokens",
            )


Body = TypeVar("Body", CompletionRequest, ChatRequest)


def read_body(kind: type[Body], raw: bytes) -> Body:
    """A request.

    Raises:
        RefusedError: it is no JSON, or a field is missing, wrong or unknown.
    """
    try:
        found = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error) from None
    found.check()
    return found


def _refusal(error: ValidationError) -> RefusedError:
    first = error.errors(include_url=False, include_context=False)[0]
    names = [str(part) for part in first["loc"]]
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RefusedError(f"the body is no JSON: {what.partition(': ')[2] or what}")
    if names[:1] == ["prompt"] and first["type"] != "missing":
        return RefusedError(
            "prompt is neither a text, nor token ids, nor a list of either", param="prompt"
        )
    place = ".".join(name for name in names if not name.startswith(("list[", "function-")))
    if first["type"] == "missing":
        return RefusedError(f"{place} is missing", param=names[0] if names else None)
    return RefusedError(
        f"{place or 'the body'}: {what[:1].lower()}{what[1:]}", param=next(iter(names), None)
    )
