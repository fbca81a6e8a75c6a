"""The chat template of a model directory: where it is, and a conversation written with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import MAX_CONFIG_BYTES, read_json, require_file

DEFAULT, WITH_TOOLS = "default", "tool_use"
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


def find_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str] | None:
    """The chat templates of a model by name, one of them mostly ``"default"``.

    They are, as in transformers, ``chat_template.jinja`` and those of
    ``additional_chat_templates/``; else the ``chat_template`` of ``tokenizer_config.json``, a text
    or a list of named ones; else, as servers do, ``chat_template.json`` of a processor.

    Args:
        directory (Path): the model directory.
        config (Mapping): the content of its ``tokenizer_config.json``.

    Raises:
        MsQuantError: a file is malformed.
    """
    found = {}
    if (directory / "chat_template.jinja").is_file():
        found[DEFAULT] = _read(directory / "chat_template.jinja")
    more = directory / "additional_chat_templates"
    found |= {path.stem: _read(path) for path in sorted(more.glob("*.jinja"))}
    if found:
        return found
    value = config.get("chat_template")
    processor = directory / "chat_template.json"
    if value is None and processor.is_file():
        value = read_json(processor).get("chat_template")
    if isinstance(value, list):
        named = [t for t in value if isinstance(t, dict)]
        value = {t.get("name"): t.get("template") for t in named}
    if isinstance(value, str):
        value = {DEFAULT: value}
    if not isinstance(value, dict):
        return None
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, str)} or None


def choose_template(templates: Mapping[str, str], tools: bool, directory: Path) -> str:
    """The template of a conversation.

    Raises:
        MsQuantError: several have names, and none of them is the default.
    """
    for name in [WITH_TOOLS] * tools + [DEFAULT]:
        if name in templates:
            return templates[name]
    raise BadFileError(
        f"{directory}: has the chat templates {', '.join(templates)}, expected one named {DEFAULT}"
    )


def render_here(template: str, names: Mapping[str, Any]) -> str:
    """What a template writes. It can run no code, but may take all time and memory: others than the
    process of :mod:`ms_quant.data.template_process` call :func:`render_template` there.

    Args:
        template (str): in Jinja.
        names (Mapping): what it may use.

    Returns:
        str, at most 64 Mi characters.

    Raises:
        ValueError: it fails or refuses; says why.
    """
    try:
        return "".join(_bounded(_compiled(template).generate(**names)))
    except TEMPLATE_ERRORS as error:
        raise ValueError(str(error)) from error


def _read(path: Path) -> str:
    require_file(path)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise BadFileError(f"{path}: is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadFileError(f"{path}: not UTF-8 text") from None


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives to chat templates, but for the fixed date."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]
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
