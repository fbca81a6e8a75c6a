"""The three ways to put a hook in the place of an attention; no library is edited.

What is put there are objects, not closures, so that a deep copy of a network has hooks of its own.
"""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

from mindspore import Tensor, nn

from ms_quant.cells.diffusion.hook import HOOK, Hook
from ms_quant.cells.diffusion.sites import DISPATCH, FA_QUANT, PROTOCOL, SDPA, processor_of
from ms_quant.errors import UnsupportedError

CAUSAL, SHARED_KEYS = "causal", "keys shared by heads"
_OWN_BACKEND = "ms_quant_own_backend"
_MISSING = "ms_quant: no attribute"
_current: ContextVar[tuple[Hook, Any] | None] = ContextVar("ms_quant_attention_hook", default=None)


def refusal(cell: nn.Cell) -> str:
    """Why a hook cannot be put at a Cell; "" where it can."""
    processor = processor_of(cell)
    if isinstance(processor, nn.Cell):
        return f"its processor {type(processor).__name__} is a Cell"
    return ""


def put(hook: Hook) -> None:
    """Puts a hook at its site.

    Raises:
        MsQuantError: mindone's dispatcher has no name left for it.
    """
    cell, family = hook.site.cell, hook.site.family
    if family == DISPATCH:
        hook.before = processor_of(cell)
        cell.set_processor(_with_hook(hook.before, hook))
    elif family == PROTOCOL:
        _set_attribute(hook, FA_QUANT, _Protocol(hook))
    else:
        _set_attribute(hook, SDPA, _Method(hook, getattr(cell, SDPA)))
    vars(cell)[HOOK] = hook


def remove(hook: Hook) -> None:
    """Gives an attention back what it was."""
    cell, family = hook.site.cell, hook.site.family
    del vars(cell)[HOOK]
    if family == DISPATCH:
        cell.set_processor(hook.before)
        return
    name = FA_QUANT if family == PROTOCOL else SDPA
    if hook.before == _MISSING:
        del vars(cell)[name]
    else:
        vars(cell)[name] = hook.before


def _set_attribute(hook: Hook, name: str, value: Any) -> None:
    """Sets an attribute of the instance, past what a Cell makes of parameters and Cells."""
    attributes = vars(hook.site.cell)
    hook.before = attributes.get(name, _MISSING)
    attributes[name] = value


@dataclass
class _Protocol:
    """In the place of MindIE-SD's ``fa_quant``."""

    hook: Hook

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: str = "BNSD",
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        return self.hook(q, k, v, layout, attn_mask, scale, None)


@dataclass
class _Method:
    """In the place of the method that processors of mindone's older kind call."""

    hook: Hook
    own: Any

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        def original(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.own(q, k, v, attn_mask, dropout_p, is_causal, scale)

        reason = CAUSAL if is_causal else ""
        return self.hook(query, key, value, "BNSD", attn_mask, scale, original, reason)


def _with_hook(own: Any, hook: Hook) -> Any:
    """A copy of a processor that calls the backend below, with the hook at hand.

    Raises:
        MsQuantError: mindone's dispatcher has no name left for the backend.
    """
    processor = copy.copy(own)
    found = vars(processor).pop("_attention_backend", own._attention_backend)
    processor.__class__ = _hooked(type(own), _backend())
    vars(processor).update({HOOK: hook, _OWN_BACKEND: found})
    return processor


def _hooked(kind: Any, backend: Any) -> type:
    """A class of processors whose backend is ours; what it is set to is kept for other calls."""

    class Hooked(kind):
        @property
        def _attention_backend(self) -> Any:
            return backend

        @_attention_backend.setter
        def _attention_backend(self, own: Any) -> None:
            self.__dict__[_OWN_BACKEND] = own

        @wraps(kind.__call__)  # attentions pass on only the arguments that it names
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            token = _current.set((vars(self)[HOOK], vars(self)[_OWN_BACKEND]))
            try:
                return super().__call__(*args, **kwargs)
            finally:
                _current.reset(token)

    Hooked.__name__, Hooked.__qualname__ = kind.__name__, kind.__qualname__
    return Hooked


def _backend() -> Any:
    """The name under which mindone's dispatcher finds our backend, registered once.

    Names are an enumeration that takes no new ones: it is one that mindone has no backend for.

    Raises:
        MsQuantError: all have one.
    """
    from mindone.diffusers.models import attention_dispatch as dispatch

    registry, names = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName
    for name in (names.SAGE, names.FLEX, names.XFORMERS):
        found = registry._backends.get(name)
        if found is _attend:
            return name
        if found is None:
            registry.register(name)(_attend)
            return name
    raise UnsupportedError(
        "mindone.diffusers: has backends for all names of its dispatcher, expected one of sage, "
        "flex and xformers to be free, as in mindone 0.5"
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The backend: the hook of the attention that is being called."""
    from mindone.diffusers.models.attention_dispatch import dispatch_attention_fn

    current = _current.get()
    if current is None:
        raise UnsupportedError(
            "mindone.diffusers: the backend of ms_quant was called outside of an attention that "
            "it is attached to, expected ms_quant to set it"
        )
    hook, backend = current
    rest = attn_mask, dropout_p, is_causal, scale, enable_gqa

    def original(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dispatch_attention_fn(q, k, v, *rest, backend=backend)

    reason = CAUSAL if is_causal else SHARED_KEYS if enable_gqa else ""
    return hook(query, key, value, "BSND", attn_mask, scale, original, reason)
