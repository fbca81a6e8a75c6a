"""The text model in a larger one: where its keys, its tensors and the others are.

New checkpoints have the text model's keys in ``text_config`` and its tensors under
``model.language_model.``; old ones have both where a text model by itself has them. Its rotary
embedding has three positions for each token (``mrope_section``), which are equal in text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ms_quant.errors import BadFileError, short
from ms_quant.models.spellings import DTYPE_KEYS, ROPE_KEYS

INNER, OUTER = "model.language_model.", "model."
_PARTS = ("layers.", "embed_tokens.", "norm.")
_SECTIONS = ("mrope_section", "mrope_interleaved")
_MAY_DIFFER = {"model_type", "architectures", "tie_word_embeddings", *DTYPE_KEYS, *ROPE_KEYS}


def is_inner(name: str) -> bool:
    """Whether a tensor has the name that text models have in a larger one."""
    return name.startswith(INNER)


def house_name(name: str) -> str:
    """The name that the rest of the house knows a stored tensor by."""
    return OUTER + name.removeprefix(INNER) if is_inner(name) else name


def stored_name(name: str) -> str:
    """The other way round, also of modules; of other texts what they are."""
    own = name.startswith(tuple(OUTER + part for part in _PARTS)) or name == f"{OUTER}norm"
    return INNER + name.removeprefix(OUTER) if own else name


def renamed(description: Mapping[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    """A description of a checkpoint with other names for its keys and in its lists."""
    return {name(key): _renamed(value, name) for key, value in description.items()}


def _renamed(value: Any, name: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return renamed(value, name)
    if isinstance(value, list):
        return [name(one) if isinstance(one, str) else _renamed(one, name) for one in value]
    return value


def text_part(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of the text model as if it were one by itself, with the other keys beside it.

    Args:
        raw: the content of ``config.json``.
        where: the file, for errors.

    Raises:
        MsQuantError: ``text_config`` is no object, or says something else than the keys beside it.
    """
    inner = raw.get("text_config")
    if inner is not None and not isinstance(inner, dict):
        raise BadFileError(f"{where}: text_config is {short(inner)}, expected an object")
    inner = inner or {}
    for key in inner.keys() & raw.keys() - _MAY_DIFFER:
        if inner[key] != raw[key] and None not in (inner[key], raw[key]):
            raise BadFileError(
                f"{where}: {key} is {short(raw[key])} and text_config.{key} {short(inner[key])}, "
                "expected one value: some runtimes read the first, others the second"
            )
    outer = {key: value for key, value in raw.items() if key != "text_config"}
    said = {key: value for key, value in inner.items() if value is not None}
    flat = {**outer, **said, "model_type": raw["model_type"]}
    if "architectures" in raw:
        flat["architectures"] = raw["architectures"]
    else:
        flat.pop("architectures", None)
    if True in (raw.get("tie_word_embeddings"), inner.get("tie_word_embeddings")):
        flat["tie_word_embeddings"] = True
    for key in ROPE_KEYS:
        if isinstance(flat.get(key), dict):
            flat[key] = _plain(flat[key])
    return flat


def _plain(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A rotary object without what tells the three positions of a token apart."""
    found = {key: value for key, value in rope.items() if key not in _SECTIONS}
    return {
        key: "default" if key in ("type", "rope_type") and value == "mrope" else value
        for key, value in found.items()
    }


def whole_config(
    raw: Mapping[str, Any], flat: Mapping[str, Any], written: Mapping[str, Any]
) -> dict[str, Any]:
    """``config.json`` of the larger model with the changes of its text model.

    Args:
        raw: the content of the source's.
        flat: what :func:`text_part` made of it.
        written: what that becomes.
    """
    inner = raw.get("text_config")
    part: Mapping[str, Any] = inner if isinstance(inner, dict) else raw
    ropes = [part[key] for key in ROPE_KEYS if isinstance(part.get(key), dict)]
    sections = {key: rope[key] for rope in ropes for key in _SECTIONS if key in rope}
    changes = {
        key: value
        for key, value in written.items()
        if key not in ROPE_KEYS and (key not in flat or flat[key] != value)
    }
    rope = dict(written["rope_parameters"])
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    spelled = {
        "rope_parameters": {**rope, **sections},
        "rope_scaling": {"type": rope["rope_type"], **old, **sections},
    }
    if not sections and rope["rope_type"] == "default":
        del spelled["rope_scaling"]
    changes |= {key: value for key, value in spelled.items() if not part.get(key)}
    if part is raw:
        return {**raw, **changes}
    beside = {key: value for key, value in changes.items() if raw.get(key) is not None}
    return {**raw, **beside, "text_config": {**part, **changes}}
