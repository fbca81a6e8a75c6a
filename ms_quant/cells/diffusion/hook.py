"""What stands in the place of one attention, and counts what became of its calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from inspect import signature
from typing import Any

from mindspore import Tensor, nn

from ms_quant.cells.diffusion.function import AttentionCall, AttentionFunction, Pictures
from ms_quant.cells.diffusion.models import MODELS
from ms_quant.cells.diffusion.sites import AttentionSite
from ms_quant.errors import BadArgumentError

HOOK = "ms_quant_attention"
"""Name of a Cell's attribute that is its hook."""

TAKEN, OTHER_LENGTH = "", "other length of keys"

Original = Callable[[Tensor, Tensor, Tensor], Tensor]
_seen: ContextVar[tuple[int, Pictures | None] | None] = ContextVar(
    "ms_quant_latent_shape", default=None
)


class LatentShapes:
    """The latent shape of the call that a known network is in, from what it is called with.

    Args:
        network: of a row of ``MODELS``.
    """

    def __init__(self, network: nn.Cell):
        self.model = MODELS[type(network).__name__]
        self._handle = network.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, network: nn.Cell, arguments: tuple, named: dict[str, Any]) -> None:
        given = signature(network.construct).bind_partial(*arguments, **named).arguments
        _seen.set((id(self), self.model.grid(network.config, given)))

    def __call__(self) -> Pictures | None:
        seen = _seen.get()
        return seen[1] if seen is not None and seen[0] == id(self) else None

    def remove(self) -> None:
        """Lets the network alone again."""
        self._handle.remove()


class Hook:
    """Calls an attention function in the place of a network's own attention.

    Only where queries and keys are equally many and it can say all that was asked for: other calls
    are the network's own, as they were.

    Attributes:
        site: where it is.
        function: what is called.
        shapes: gives the latent shape of the call that a known network is in.
        before: what its adapter put away.
        calls: how many calls the function took (``TAKEN``), and how many each reason left to the
            network.
    """

    def __init__(self, site: AttentionSite, function: AttentionFunction):
        self.site, self.function = site, function
        self.shapes: LatentShapes | None = None
        self.before: Any = None
        self.calls: Counter[str] = Counter()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: str,
        mask: Tensor | None,
        scale: float | None,
        original: Original | None,
        reason: str = TAKEN,
    ) -> Tensor:
        """What the function makes of q, k and v, or, for a reason, what the network does."""
        length = 2 if layout == "BNSD" else 1
        if q.ndim != 4 or q.shape[length] != k.shape[length]:
            reason = OTHER_LENGTH
        self.calls[reason] += 1
        if reason == TAKEN:
            shape = None if self.shapes is None else self.shapes()
            call = AttentionCall(self.site.path, self.site.tokens, shape, original)
            return self.function(q, k, v, layout=layout, mask=mask, scale=scale, call=call)
        if original is not None:
            return original(q, k, v)
        raise BadArgumentError(
            f"{self.site.path}: fa_quant was called with queries of shape {q.shape} and keys of "
            f"shape {k.shape} in layout {layout}, expected self attention"
        )


def hook_of(cell: nn.Cell) -> Hook | None:
    """The hook of a Cell, None where its attention is its own."""
    return vars(cell).get(HOOK)
