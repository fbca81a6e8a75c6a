"""The names of types of attention: MindIE-SD's, and those that msModelSlim builds of parts.

A built name has groups of Q, K, V and P (the probabilities), each with its type and ``_DYNAMIC``
where scales are made for each call: ``QK_INT8_V_FP8_DYNAMIC``. Where Q, K and V are alike the
group has no letters: ``FP8_DYNAMIC``.
"""

from __future__ import annotations

import re

from ms_quant.errors import BadFileError

ATTENTION_TYPES = {  # to the kind that computes it
    **{f"{kind}_DYNAMIC": f"{kind}_DYNAMIC" for kind in ("FP8", "MXFP8", "MXFP4", "INT8")},
    "FAQUANT": "INT8",
    "FAKQUANT": "INT8",
}
_GROUP = r"(Q?K?V?P?)_(INT8|MXFP8|FP8|MXFP4)(_DYNAMIC)?"
_ONE, _NAME = re.compile(_GROUP), re.compile(f"{_GROUP}(?:_{_GROUP})*")


def is_attention_type(value: object) -> bool:
    """Whether something is a name of a type of attention, or is built like one."""
    if not isinstance(value, str):
        return False
    name = value.upper()
    return name in ATTENTION_TYPES or name == "INT8" or bool(_parts(name))


def check_attention_type(value: object, where: str) -> str:
    """The name of a type that attention can have, as ``ATTENTION_TYPES`` has it.

    Raises:
        MsQuantError: it is none, or is one of parts that are not quantized alike.
    """
    name = value.upper() if isinstance(value, str) else ""
    parts = {"QKV": "INT8"} if name == "INT8" else _parts(name)
    alike = len(parts) == 1 and "QKV" in parts
    if alike:
        name = "FAQUANT" if parts["QKV"] == "INT8" else parts["QKV"]
    if name in ATTENTION_TYPES:
        return name
    known = ", ".join(ATTENTION_TYPES)
    if parts:
        said = "; ".join(f"{' and '.join(letters)} in {kind}" for letters, kind in parts.items())
        raise BadFileError(
            f"{where} is {value!r}, {said}, which nothing computes here, expected Q, K and V alike "
            f"and P float: {known}"
        )
    raise BadFileError(f"{where} is {value!r:.80}, expected a type of attention: {known}")


def _parts(name: str) -> dict[str, str]:
    """Letters to type of a built name; {} for another name, or one that has a letter twice."""
    if not _NAME.fullmatch(name):
        return {}
    groups = _ONE.findall(name)
    letters = "".join(group for group, _, _ in groups)
    right = len(set(letters)) == len(letters) and all(group for group, _, _ in groups)
    return {group: kind + dynamic for group, kind, dynamic in groups} if right else {}
