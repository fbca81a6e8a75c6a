"""``quantization_config`` of config.json, which describes a compressed-tensors checkpoint.

It names no scheme: it spells out the arguments of weights and inputs. Read back, a scheme is the
one that is spelled so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import ActivationFormat, Float, PerToken, StaticInt8
from ms_quant.numerics.grid import AffineFormat
from ms_quant.schemes import SCHEMES, get_scheme, held_by
from ms_quant.spec import Scheme

NAME = "compressed-tensors"
KEY = "quantization_config"
PLAIN, PACKED, MIXED = "int-quantized", "pack-quantized", "mixed-precision"
EVERY = "Linear"
HEAD, CLASSIFIER = "lm_head", "score"


def format_of(scheme: Scheme) -> str:
    """How the codes of a scheme's weights are stored.

    Raises:
        MsQuantError: no format holds the scheme.
    """
    weight, activation = scheme.weight, scheme.activation
    if isinstance(weight, AffineFormat):
        if isinstance(activation, Float):
            return PACKED
        if weight == AffineFormat(8) and activation in (StaticInt8(False), PerToken(8)):
            return PLAIN
    raise MsQuantError(f"the {NAME} flavour cannot hold scheme {scheme.name}")


def quantization_config(
    groups: Sequence[tuple[Scheme, Sequence[str]]], floats: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json.

    Args:
        groups: schemes, each with the paths of the linears that have it.
        floats: paths of the linears that stay float.
    """
    formats = sorted({format_of(scheme) for scheme, _ in groups})
    return {
        "quant_method": NAME,
        "format": formats[0] if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": [EVERY] if len(groups) == 1 else list(paths),
                **arguments(scheme),
            }
            for index, (scheme, paths) in enumerate(groups)
        },
        # What no target names is float too, but vllm-ascend fails on it if this does not name it.
        "ignore": [*floats, HEAD],
    }


def arguments(scheme: Scheme) -> dict[str, Any]:
    """How a group spells a scheme."""
    format, weight = format_of(scheme), scheme.weight
    assert isinstance(weight, AffineFormat)
    return {
        "weights": _integers(
            weight.bits,
            symmetric=weight.symmetric,
            strategy="group" if weight.group_size else "channel",
            group_size=weight.group_size or None,
        ),
        "input_activations": _inputs(scheme.activation),
        "output_activations": None,
        "format": format,
    }


def _inputs(activation: ActivationFormat) -> dict[str, Any] | None:
    if isinstance(activation, Float):
        return None
    if activation.dynamic:
        return _integers(8, symmetric=True, strategy="token", dynamic=True)
    return _integers(8, symmetric=False, strategy="tensor")


def _integers(
    bits: int,
    *,
    symmetric: bool,
    strategy: str,
    group_size: int | None = None,
    dynamic: bool = False,
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "group_size": group_size,
        "strategy": strategy,
        "dynamic": dynamic,
    }


def read_schemes(config: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Scheme | None]:
    """The scheme of each linear; None where it stays float.

    Args:
        config: ``quantization_config`` as stored.
        paths: of the decoder's linears.

    Raises:
        MsQuantError: a group spells no known scheme, or is for anything but all linears or some by
            their paths.
    """
    targets: dict[str, Scheme] = {}
    for name, group in _groups(config):
        scheme = _scheme(group, f"{KEY}: {name}")
        for target in _names(group, "targets", f"{KEY}: {name}", {EVERY, *paths}):
            if targets.setdefault(target, scheme) != scheme:
                raise MsQuantError(f"{KEY}: {target} is a target of several schemes, expected one")
    ignored = _names(config, "ignore", KEY, {HEAD, CLASSIFIER, *paths})
    every = targets.get(EVERY)
    return {path: None if path in ignored else targets.get(path, every) for path in paths}


def _groups(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise MsQuantError(f"{KEY}: config_groups is {groups!r:.80}, expected groups of linears")
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise MsQuantError(f"{KEY}: {name} is {group!r:.80}, expected an object")
    return list(groups.items())


def _names(entry: Mapping[str, Any], key: str, where: str, known: set[str]) -> list[str]:
    names = entry.get(key)
    if not isinstance(names, list):
        raise MsQuantError(f"{where}: {key} is {names!r:.80}, expected a list of names")
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise MsQuantError(
                f"{where}: {key} has {name!r:.80}, expected {EVERY!r} or the path of a linear"
            )
    return names


def _scheme(group: Mapping[str, Any], where: str) -> Scheme:
    """The scheme that a group spells."""
    weights = group.get("weights")
    if isinstance(weights, Mapping):
        options = {
            "group_size": weights.get("group_size") or 0,
            "symmetric": weights.get("symmetric"),
        }
        for name in held_by(NAME):
            taken = SCHEMES[name].options
            chosen: dict[str, Any] = {key: options[key] for key in options if key in taken}
            try:
                scheme = get_scheme(name, NAME, **chosen)
                spelled = arguments(scheme)
            except MsQuantError:
                continue
            if all(group.get(key) == value for key, value in spelled.items()):
                return scheme
    said = {key: group.get(key) for key in ("weights", "input_activations", "format")}
    raise MsQuantError(f"{where} is {said!r:.300}, expected the arguments of a scheme")
