"""docs/models.md says what the tables of families, keys and companion files say."""

from __future__ import annotations

from pathlib import Path

from ms_quant.files.companion_files import PATTERNS
from ms_quant.models.config_keys import BIASES, NEUTRAL
from ms_quant.models.families import FAMILIES, Family
from ms_quant.models.spellings import READ_BY_NEW, READ_BY_OLD

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def _says(rule: bool | str) -> str:
    return f"`{rule}`" if isinstance(rule, str) else ("yes" if rule else "no")


def _window(family: Family) -> str:
    if family.flagged_window:
        return "only where `use_sliding_window`"
    default = family.defaults.get("sliding_window")
    return f"`sliding_window`, {default} where absent" if default else "`sliding_window`"


def families() -> list[str]:
    lines = [
        "| model_type | classes | bias of q, k, v | of o | of the MLP | norms of q, k | a window |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        biases = map(_says, (family.qkv_bias, family.o_bias, family.mlp_bias, family.qk_norm))
        cells = [f"`{name}`", f"{family.base}...", *biases, _window(family)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def neutral_keys() -> list[str]:
    lines = ["| key | values that pass, beside null |", "|---|---|"]
    for key, values in NEUTRAL.items():
        shown = ", ".join(f"`{value!r}`" for value in values) or "none"
        lines.append(f"| `{key}` | {shown} |")
    return lines


def patterns() -> list[str]:
    return ["```", *PATTERNS, "```"]


def test_the_document_has_the_tables() -> None:
    text = DOCUMENT.read_text()
    for table in (families(), neutral_keys(), patterns()):
        assert "\n".join(table) in text


def test_the_document_names_the_keys() -> None:
    text = DOCUMENT.read_text()
    for key in (*BIASES, *READ_BY_OLD, *READ_BY_NEW):
        assert f"`{key}`" in text
