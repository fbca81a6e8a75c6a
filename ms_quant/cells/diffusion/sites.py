"""Finding attention in a network: by what a Cell and its processor call, not by their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from mindspore import nn

from ms_quant.cells.diffusion.models import CROSS, MODELS, TEXT_ALONE, Model
from ms_quant.errors import BadArgumentError
from ms_quant.recipe.patterns import matches

DISPATCH, METHOD, PROTOCOL = "dispatch", "method", "fa_quant"
FAMILIES = (DISPATCH, METHOD, PROTOCOL)
SDPA, FA_QUANT = "scaled_dot_product_attention", "fa_quant"


@dataclass(frozen=True)
class AttentionSite:
    """An attention of a network.

    Attributes:
        path: of the Cell.
        cell: that Cell.
        family: how something else is put in its place: ``"dispatch"`` and ``"method"`` are the two
            kinds of processors of mindone, ``"fa_quant"`` is MindIE-SD's: the Cell calls its own
            attribute of that name.
        tokens: ``"none"``, ``"first"`` or ``"last"`` for self attention, by where text stands among
            the tokens of the picture; ``"cross"`` and ``"text alone"``; "" for self attention of a
            network that is not known here.
        heads: how many; None where the Cell does not say it.
        head_size: channels of each; None where the Cell does not say it.
        model: path of the known network that it is in; None where there is none.
    """

    path: str
    cell: nn.Cell
    family: str
    tokens: str
    heads: int | None
    head_size: int | None
    model: str | None

    @property
    def kind(self) -> str:
        """Name of the Cell's class."""
        return type(self.cell).__name__

    @property
    def is_self(self) -> bool:
        """Whether it is self attention over the tokens of a picture."""
        return self.tokens not in (CROSS, TEXT_ALONE)


def attention_sites(network: nn.Cell) -> tuple[AttentionSite, ...]:
    """Every attention of a network whose computing can be taken over, in definition order.

    Args:
        network (Cell): any network.

    Returns:
        tuple[AttentionSite], empty where there is none.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)
    """
    return tuple(_sites(network))


def _sites(network: nn.Cell) -> Iterator[AttentionSite]:
    models: dict[str, Model] = {}
    for path, cell in network.cells_and_names():
        known = MODELS.get(type(cell).__name__)
        if known is not None:
            models[path] = known
        family = family_of(cell)
        if family is None:
            continue
        inside = [p for p in models if not p or path.startswith(f"{p}.")]
        model = max(inside, key=len, default=None)
        tokens = _tokens(cell, path, model, models)
        yield AttentionSite(path, cell, family, tokens, *_sizes(cell), model)


def family_of(cell: nn.Cell) -> str | None:
    """How the computing of a Cell can be taken over; None where it cannot, or is no attention."""
    processor = processor_of(cell)
    if processor is not None and hasattr(processor, "_attention_backend"):
        return DISPATCH
    if processor is not None and hasattr(cell, SDPA) and _mentions(type(processor), SDPA):
        return METHOD
    if hasattr(cell, FA_QUANT) or _mentions(type(cell), FA_QUANT):
        return PROTOCOL
    return None


def processor_of(cell: nn.Cell) -> Any:
    """mindone's processor of an attention, None for other Cells."""
    get = getattr(cell, "get_processor", None)
    return get() if callable(get) else None


def _mentions(kind: type, name: str) -> bool:
    """Whether the code of a class or of those that it extends has a name or a text in it."""
    own = [base for base in kind.__mro__ if base is not nn.Cell and base is not object]
    functions = [f for base in own for f in vars(base).values() if isinstance(f, FunctionType)]
    return any(_has(function.__code__, name) for function in functions)


def _has(code: CodeType, name: str) -> bool:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return name in code.co_names or name in code.co_consts or any(_has(c, name) for c in inner)


def _tokens(cell: nn.Cell, path: str, model: str | None, models: dict[str, Model]) -> str:
    if model is not None:
        inner = path[len(model) + 1 :] if model else path
        for pattern, tokens in models[model].tokens.items():
            if matches(inner, [pattern]):
                return tokens
    return CROSS if getattr(cell, "is_cross_attention", False) else ""


def _sizes(cell: nn.Cell) -> tuple[int | None, int | None]:
    found = (getattr(cell, name, None) for name in ("heads", "num_heads", "n_heads"))
    heads = next((value for value in found if isinstance(value, int) and value > 0), None)
    inner, size = getattr(cell, "inner_dim", None), getattr(cell, "head_dim", None)
    if isinstance(size, int):
        return heads, size
    return heads, inner // heads if isinstance(inner, int) and heads else None


def chosen_sites(network: nn.Cell, layers: tuple[str, ...]) -> list[AttentionSite]:
    """The attentions that patterns of paths or class names match.

    Raises:
        MsQuantError: there is no attention, or a pattern matches none.
    """
    sites = attention_sites(network)
    if not sites:
        raise BadArgumentError(
            f"{network.cls_name}: holds no attention that can be taken over, expected processors "
            "of mindone.diffusers, or a Cell that calls self.fa_quant(q, k, v, layout=...)"
        )
    for pattern in layers:
        if not any(is_matched(site, pattern) for site in sites):
            shown = ", ".join(f"{site.path} ({site.kind})" for site in sites[:4])
            raise BadArgumentError(
                f"layers: pattern {pattern!r} matches no attention, expected one of: {shown}, ..."
            )
    return [site for site in sites if any(is_matched(site, pattern) for pattern in layers)]


def is_matched(site: AttentionSite, pattern: str) -> bool:
    """Whether a pattern matches the path of an attention or the name of its class."""
    return matches(site.path, [pattern]) or matches(site.kind, [pattern])
