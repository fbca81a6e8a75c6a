"""The reference of a command line, in Markdown, from the functions of its typer app."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, CommandInfo, OptionInfo

APPS = {"ms-quant": "ms_quant.cli.main", "sparse-compress": "sparse_compress.cli"}
KINDS = {str: "TEXT", Path: "PATH", int: "N", float: "X"}


class Parameter(NamedTuple):
    """An argument or option as the reference shows it."""

    spelled: str
    what: str
    default: str
    is_argument: bool


def commands_of(tool: str) -> str:
    app: typer.Typer = importlib.import_module(APPS[tool]).app
    return "\n".join(line for info in app.registered_commands for line in _command(tool, info))


def _command(tool: str, info: CommandInfo) -> Iterator[str]:
    assert info.callback is not None
    name = info.name or info.callback.__name__.replace("_", "-")
    parameters = [*_parameters(info)]
    needed = [p.spelled.replace("`", "") for p in parameters if p.is_argument]
    needed += [
        re.sub(r"(--\S+), -\w", r"\1", p.spelled.replace("`", ""))
        for p in parameters
        if not p.is_argument and p.default == "required"
    ]
    yield f"### {tool} {name}\n"
    yield _markdown(inspect.cleandoc(info.help or info.callback.__doc__ or "")) + "\n"
    yield f"```text\n{tool} {name} {' '.join(needed)} [OPTIONS]\n```\n"
    if info.epilog:
        yield f"```sh\n{info.epilog.removeprefix('Example:').strip()}\n```\n"
    yield "| argument or option | what | default |\n|---|---|---|"
    yield from (f"| {p.spelled} | {p.what} | {p.default} |" for p in parameters)
    yield ""


def _parameters(info: CommandInfo) -> Iterator[Parameter]:
    assert info.callback is not None
    hints = get_type_hints(info.callback, include_extras=True)
    for name, parameter in inspect.signature(info.callback).parameters.items():
        given, *notes = get_args(hints[name])
        said = next(note for note in notes if isinstance(note, ArgumentInfo | OptionInfo))
        if not said.hidden:
            yield _parameter(name, given, said, parameter.default)


def _parameter(name: str, given: Any, said: ArgumentInfo | OptionInfo, default: Any) -> Parameter:
    what, _, stated = (said.help or "").partition(" Default: ")
    if default is inspect.Parameter.empty:
        shown = "required"
    elif stated or isinstance(said.show_default, str):
        shown = _markdown(stated or str(said.show_default))
    else:
        shown = "" if default in (None, False, "") else f"`{default}`"
    if isinstance(said, ArgumentInfo):
        return Parameter(f"`{name.upper()}`", _markdown(what), shown, True)
    first = said.default  # in Annotated the first spelling stands where a default may, too
    names = (*([first] if isinstance(first, str) else []), *(said.param_decls or ()))
    names = names or (f"--{name.replace('_', '-')}",)
    spelled = ", ".join(f"`{one}`" for one in names) + _kind(given)
    return Parameter(spelled, _markdown(what), shown, False)


def _kind(given: Any) -> str:
    """What a value of this type is called: "" of a flag, which has none."""
    if isinstance(given, UnionType):
        given = next(one for one in get_args(given) if one is not NoneType)
    if get_origin(given) is list:
        return f" {KINDS[get_args(given)[0]]}, repeated"
    return "" if given is bool else f" {KINDS[given]}"


def _markdown(text: str) -> str:
    """Rich's bold as code; what a table or Markdown would read in another way, escaped."""
    text = re.sub(r"([|*_<])", r"\\\1", text)
    return re.sub(r"\[b\](.*?)\[/b\]", r"`\1`", text)
