"""The tokenizer of a model directory and its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ms_quant.errors import MsQuantError
from ms_quant.strict_json import read_json, require_file

MAX_TOKENIZER_BYTES = 256 << 20
MAX_RENDERED_CHARS = 64 << 20
# Templates that print today's date would make the same data give other tokens tomorrow.
TEMPLATE_DATE = datetime(2024, 7, 26)
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer with the parts of ``tokenizer_config.json`` that text data needs.

    Attributes:
        directory: where it was read from.
        backend: the tokenizer proper.
        special: ``bos_token``, ``eos_token``, ... to their text.
        vocab_size: one more than the largest id the model takes.
        template: the chat template, if there is one.
    """

    directory: Path
    backend: Tokenizer
    special: dict[str, str]
    vocab_size: int
    template: str | None

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text as int32, without special tokens."""
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of some ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids])

    @property
    def first_ids(self) -> np.ndarray:
        """int32 ids that the tokenizer puts before every text that a server encodes.

        The begin-of-sequence token, or none: whether there is one the tokenizer's post-processor
        says. Models that have it show their largest activations there.
        """
        bos = self.backend.token_to_id(self.special.get("bos_token", ""))
        added = self.backend.encode("", add_special_tokens=True).ids
        return np.array(added[:1] if bos is not None and added[:1] == [bos] else [], np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids of a text as a server sees it."""
        return np.concatenate([self.first_ids, self.encode(text)])

    @property
    def eos_id(self) -> int | None:
        """The id of the end-of-sequence token, if one is known."""
        token = self.special.get("eos_token")
        return None if token is None else self.backend.token_to_id(token)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Writes a conversation as text with the chat template of the model.

        Args:
            messages (list[dict]): ``role`` and ``content`` of each message.
            add_generation_prompt (bool): end with the beginning of the assistant's answer.

        Returns:
            str, at most 64 Mi characters.

        Raises:
            MsQuantError: there is no chat template, or it fails or refuses the messages.
        """
        if self.template is None:
            raise MsQuantError(
                f"{self.directory}: has no chat template, expected chat_template.jinja or a "
                "chat_template in tokenizer_config.json"
            )
        names = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            pieces = _environment().from_string(self.template).generate(**self.special, **names)
            return "".join(_bounded(pieces))
        except TEMPLATE_ERRORS as error:
            raise MsQuantError(f"{self.directory}: the chat template failed ({error})") from error


def load_tokenizer(directory: Path | str) -> ModelTokenizer:
    """Reads ``tokenizer.json`` and what stands beside it in a model directory.

    Args:
        directory (Path | str): the model directory. ``vocab_size`` of its ``config.json`` counts
            where there is one, as the embedding may be larger than the vocabulary.

    Returns:
        ModelTokenizer, without the truncation and padding that the file may ask for.

    Raises:
        MsQuantError: a file is missing or malformed.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    check_file(path, MAX_TOKENIZER_BYTES)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise MsQuantError(f"{path}: not a tokenizer ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    vocab_size = model_vocab_size(directory)
    if vocab_size is None:
        vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    special = {key: _token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    known = {key: text for key, text in special.items() if text is not None}
    return ModelTokenizer(directory, backend, known, vocab_size, _template(directory, config))


def model_vocab_size(directory: Path) -> int | None:
    """``vocab_size`` of a model directory's ``config.json``, if it has one."""
    path = directory / "config.json"
    value = read_json(path).get("vocab_size") if path.is_file() else None
    return value if type(value) is int and value > 0 else None


def check_file(path: Path, limit: int) -> None:
    """Refuses a file that is missing, empty or absurdly large.

    Raises:
        MsQuantError: one of these.
    """
    require_file(path)
    size = path.stat().st_size
    if not 0 < size <= limit:
        raise MsQuantError(f"{path}: {size} bytes, expected between 1 and {limit}")


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        check_file(path, MAX_TOKENIZER_BYTES)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise MsQuantError(f"{path}: not UTF-8 text") from None
    value = config.get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives to chat templates, but for the fixed date."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike the filter of jinja2, does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _bounded(pieces: Iterable[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_RENDERED_CHARS:
            raise ValueError(f"it writes more than {MAX_RENDERED_CHARS} characters")
        yield piece
