"""Our own recipe language: the records as they are."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
)

from ms_quant.errors import BadFileError
from ms_quant.recipe.records import EVERYTHING, Recipe, Rule, Step

APIVERSION = "ms_quant_v1"


def _scalar(value: Any) -> Any:
    if isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value)):
        return value
    raise ValueError("expected true, false, text or a finite number")


Options = dict[str, Annotated[Any, AfterValidator(_scalar)]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


class _Step(_Strict):
    algorithm: str
    options: Options = {}
    include: list[str] = list(EVERYTHING)
    exclude: list[str] = []
    groups: list[str] = []
    by_producer: bool = False
    together: bool = False


class _Rule(_Strict):
    scheme: str
    options: Options = {}
    algorithms: list[str] = []
    algorithm_options: Options = {}
    include: list[str] = list(EVERYTHING)
    exclude: list[str] = []


class _Document(_Strict):
    apiversion: Literal["ms_quant_v1"]
    rules: list[_Rule] = []
    steps: list[_Step] = []
    kv_cache: str = ""
    kv_cache_exclude: list[str] = []
    formats: list[str] = []
    calib: Annotated[str, Field(min_length=1)] | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    shard_bytes: int | None = None
    lenient: bool = False
    not_for: dict[str, str] = {}
    made: dict[str, JsonValue] = {}


_SETTINGS = ("kv_cache", "calib", "samples", "seq_len", "seed", "shard_bytes")


def from_native(document: Mapping[str, Any]) -> Recipe:
    """The recipe of an ms_quant_v1 document.

    Raises:
        MsQuantError: a key is unknown, missing or of another type.
    """
    try:
        read = _Document.model_validate(dict(document))
    except ValidationError as error:
        raise BadFileError(_said(error)) from None
    return Recipe(
        rules=tuple(
            Rule(**_lists(rule), where=f"rules[{index}]") for index, rule in enumerate(read.rules)
        ),
        steps=tuple(
            Step(**_lists(step), where=f"steps[{index}]") for index, step in enumerate(read.steps)
        ),
        kv_cache_exclude=tuple(read.kv_cache_exclude),
        formats=tuple(read.formats),
        lenient=read.lenient,
        not_for=read.not_for,
        made=read.made,
        **{name: getattr(read, name) for name in _SETTINGS},
    )


def to_native(recipe: Recipe) -> dict[str, Any]:
    """The document of a recipe, without what is as by default."""
    document: dict[str, Any] = {"apiversion": APIVERSION}
    for key in ("rules", "steps"):
        records = [_plain(record) for record in getattr(recipe, key)]
        document |= {key: records} if records else {}
    for key in ("formats", "kv_cache_exclude"):
        listed = list(getattr(recipe, key))
        document |= {key: listed} if listed else {}
    settings = {name: getattr(recipe, name) for name in _SETTINGS}
    document |= {name: v for name, v in settings.items() if v not in ("", None)}
    document |= {"lenient": True} if recipe.lenient else {}
    document |= {"not_for": dict(recipe.not_for)} if recipe.not_for else {}
    return document | ({"made": dict(recipe.made)} if recipe.made else {})


def _plain(record: Rule | Step) -> dict[str, Any]:
    values = {name: value for name, value in vars(record).items() if name != "where"}
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
    plain = {n: dict(v) if isinstance(v, Mapping) else v for n, v in plain.items()}
    return {n: v for n, v in plain.items() if v and (n, v) != ("include", list(EVERYTHING))}


def _lists(model: _Rule | _Step) -> dict[str, Any]:
    return {n: tuple(v) if isinstance(v, list) else v for n, v in model.model_dump().items()}


def _said(error: ValidationError) -> str:
    """The first thing that is wrong, by the path of its key."""
    first = error.errors()[0]
    where = ""
    for part in first["loc"]:
        if isinstance(part, int):
            where += f"[{part}]"
        else:
            where += f".{part}" if where else part
    if first["type"] == "extra_forbidden":
        return f"{where}: is no known key, expected one of {', '.join(_siblings(first['loc']))}"
    if first["type"] == "missing":
        return f"{where}: is missing"
    return f"{where} is {first['input']!r:.80}: {first['msg'].removeprefix('Value error, ')}"


def _siblings(loc: tuple[int | str, ...]) -> list[str]:
    models: dict[int | str, type[BaseModel]] = {"rules": _Rule, "steps": _Step}
    model = models[loc[0]] if len(loc) > 1 else _Document
    return list(model.model_fields)
