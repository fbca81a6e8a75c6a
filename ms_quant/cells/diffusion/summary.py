"""What became of the attention of a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mindspore import nn

from ms_quant.cells.diffusion.attach import why_float
from ms_quant.cells.diffusion.hook import TAKEN, hook_of
from ms_quant.cells.diffusion.sites import AttentionSite, attention_sites
from ms_quant.cells.diffusion.state import HeadDensities
from ms_quant.cells.tables import table

FLOAT = "FLOAT"


@dataclass(frozen=True)
class AttentionSummary:
    """What became of one attention.

    Attributes:
        path: of the Cell.
        kind: name of its class.
        tokens: what its tokens are, as in :class:`AttentionSite`.
        heads, head_size: None where the Cell does not say them.
        attention: what computes it; ``"FLOAT"`` where that is the network itself.
        reason: why it is float; "" where it is not.
        calls: how many calls were computed in which way since it was attached.
        densities: the share of pairs that each head computes by the last mask that was made; ()
            where none was.
        kinds: the mask of each head, such as ``"temporal"``, likewise.
    """

    path: str
    kind: str
    tokens: str
    heads: int | None
    head_size: int | None
    attention: str = FLOAT
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    densities: tuple[float, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionSummaries:
    """What became of the attention of a network; printed, it is a table.

    Attributes:
        layers: in definition order.
    """

    layers: tuple[AttentionSummary, ...]

    def __iter__(self) -> Iterator[AttentionSummary]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def heat_map(self) -> dict[str, list]:
        """What each head of each sparse layer computes, as plain JSON.

        Returns:
            ``layers``, paths of those that made a mask; and of each a row with a value of each
            head: ``densities`` and ``kinds``.
        """
        rows = [row for row in self.layers if row.densities]
        return {
            "layers": [row.path for row in rows],
            "densities": [list(row.densities) for row in rows],
            "kinds": [list(row.kinds) for row in rows],
        }

    def __str__(self) -> str:
        header = ("path", "cell", "tokens", "heads x size", "attention", "density", "calls")
        return table(header, [_cells(row) for row in self.layers])


def _cells(row: AttentionSummary) -> tuple[str, ...]:
    tokens = {"first": "text first", "last": "text last", "none": "picture", "": "not known"}
    size = f"{row.heads or '?'} x {row.head_size or '?'}"
    attention = f"{row.attention}: {row.reason}" if row.reason else row.attention
    calls = ", ".join(f"{count} {how}" for how, count in row.calls.items())
    none = "-" if row.attention == FLOAT else "none yet"
    said = tokens.get(row.tokens, row.tokens)
    return row.path, row.kind, said, size, attention, _density(row), calls or none


def _density(row: AttentionSummary) -> str:
    """The mean over heads, and how many heads have which mask."""
    if not row.densities:
        return "-"
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(row.kinds).items())
    return f"{sum(row.densities) / len(row.densities):.2f}: {counts}"


def attention_summary(network: nn.Cell) -> AttentionSummaries:
    """What became of the attention of a network: which is quantized, sparse or float, and why.

    Args:
        network (Cell): any network, before or after something was attached.

    Returns:
        AttentionSummaries, one row for each attention that can be taken over. ``calls`` counts what
        was really computed: an attention whose processor never asks for it has none. ``density`` is
        the share of pairs of the last mask, and how many heads have which.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)
    """
    return AttentionSummaries(tuple(_row(site) for site in attention_sites(network)))


def _row(site: AttentionSite) -> AttentionSummary:
    common = site.path, site.kind, site.tokens, site.heads, site.head_size
    hook = hook_of(site.cell)
    if hook is None:
        return AttentionSummary(*common, reason=why_float(site) or "not chosen")
    named = (getattr(hook.function, key, "") for key in ("label", "__name__"))
    name = next(filter(None, named), type(hook.function).__name__)
    taken = getattr(hook.function, "calls", None)
    if taken is None:
        taken = Counter({name: hook.calls[TAKEN]})
    left = {f"{FLOAT} ({why})": count for why, count in hook.calls.items() if why != TAKEN}
    calls = {how: count for how, count in {**taken, **left}.items() if count}
    mask = getattr(hook.function, "last_mask", HeadDensities())
    return AttentionSummary(*common, name, "", calls, mask.densities, mask.kinds)
