"""The command that lists schemes and algorithms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ms_quant.cli.console import JsonOption, emit, wide_table
from ms_quant.schemes.storage import FormatSupport, wanted_text

if TYPE_CHECKING:
    from ms_quant.diffusers.methods import Method


def schemes(as_json: JsonOption = False) -> None:
    """The schemes and algorithms there are, and which runtime serves them."""
    from ms_quant.algorithms import ALGORITHMS, PLAIN
    from ms_quant.diffusers.methods import FORMAT, HELD, method_of
    from ms_quant.pipeline.best import BEST
    from ms_quant.schemes.support import support_of
    from ms_quant.schemes.table import KV_CACHES, SCHEMES

    result = {
        "schemes": [
            {
                "name": scheme.name,
                "summary": scheme.summary,
                "formats": [
                    *(_format_row(row) for row in support_of(scheme.name)),
                    *(
                        [_of_diffusers(FORMAT, method_of(scheme.name))]
                        if scheme.name in HELD
                        else []
                    ),
                ],
                "options": list(scheme.options),
                "algorithms": [
                    PLAIN,
                    *(name for name, row in ALGORITHMS.items() if not row.suits(scheme)),
                ],
            }
            for scheme in SCHEMES.values()
        ],
        "algorithms": [
            *({"name": name, "summary": row.summary} for name, row in ALGORITHMS.items()),
            {"name": BEST, "summary": "what did best on real models for the scheme"},
        ],
        "kv_caches": [{"name": name, "summary": what} for name, what in KV_CACHES.items()],
    }
    emit(result, as_json, _show_schemes)


def _format_row(support: FormatSupport) -> dict[str, Any]:
    return {
        "format": support.format,
        "folds": [target.value for target in support.targets],
        "served_by": list(support.served_by),
        "experts_served_by": list(support.experts_served_by),
        "only": dict(support.only),
        "not_served_by": list(support.not_served_by),
        "kernels": support.kernels,
    }


def _of_diffusers(format: str, method: Method) -> dict[str, Any]:
    """A folder of diffusers, whose transformers alone are quantized."""
    served = f"{format} (quant_method {method.name})"
    return _format_row(FormatSupport(format, (served,), method.devices, targets={}))


_NETWORKS = _format_row(
    FormatSupport(
        "",
        not_served_by=(
            "for networks: ms_quant.quantize(network, ...) and ms_quant.save_quantized",
        ),
        targets={},
    )
)


def _only(place: dict[str, Any]) -> list[str]:
    said = wanted_text(place["only"])
    return [f"only with {said}"] if said else []


def _show_schemes(result: dict[str, Any]) -> None:
    table = wide_table("scheme", "what", "algorithms")
    for row in result["schemes"]:
        table.add_row(row["name"], row["summary"], ", ".join(row["algorithms"]))
    Console().print(table)
    table = wide_table("scheme", "format", "served by", "kernels")
    for row in result["schemes"]:
        for place in row["formats"] or [_NETWORKS]:
            experts = [f"experts: {runtime}" for runtime in place["experts_served_by"]]
            lines = [*place["served_by"], *experts, *place["not_served_by"], *_only(place)]
            served = "\n".join(lines)
            table.add_row(row["name"], place["format"], served, place["kernels"])
    Console().print(table)
    for title, rows in (("algorithm", "algorithms"), ("KV cache", "kv_caches")):
        table = Table(title, "what")
        for row in result[rows]:
            table.add_row(row["name"], row["summary"])
        Console().print(table)
