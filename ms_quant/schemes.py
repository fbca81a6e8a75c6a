"""The schemes, as data. A new one is a row."""

from __future__ import annotations

from ms_quant.errors import MsQuantError
from ms_quant.spec import Granularity, QuantSpec, Scheme

_INT8_WEIGHT = QuantSpec("int8", Granularity.PER_CHANNEL)
_NATIVE = "vllm-mindspore Native (--quantization golden-stick)"
_MINDFORMERS = "vllm-mindspore MindFormers backend"

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "W8A8",
            _INT8_WEIGHT,
            QuantSpec("int8", Granularity.PER_TENSOR, symmetric=False),
            "int8 weights per channel, static int8 activations per tensor",
            (_NATIVE, _MINDFORMERS),
        ),
        Scheme(
            "W8A8_DYNAMIC",
            _INT8_WEIGHT,
            QuantSpec("int8", Granularity.PER_TOKEN, dynamic=True),
            "int8 weights per channel, int8 activations scaled per token at run time",
            (_MINDFORMERS,),
            (f"{_NATIVE} does not serve W8A8_DYNAMIC",),
        ),
    )
}


def get_scheme(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        MsQuantError: there is none.
    """
    if name not in SCHEMES:
        raise MsQuantError(f"scheme {name!r} is unknown, expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
