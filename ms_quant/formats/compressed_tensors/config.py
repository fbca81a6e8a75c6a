"""``quantization_config`` of config.json, which describes a compressed-tensors checkpoint.

It names no scheme: it spells out the arguments of weights and inputs. Read back, a scheme is the
one that is spelled so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ms_quant.errors import BadFileError, MsQuantError, UnsupportedError, short
from ms_quant.formats.compressed_tensors.entry import (
    EVERY,
    HEAD,
    KEY,
    Difference,
    Targets,
    arguments_of,
    check_entry,
    first_difference,
    groups_of,
    names_of,
)
from ms_quant.numerics.activation import (
    ActivationFormat,
    Float,
    GroupFloat8,
    PerToken,
    PerTokenFloat8,
    StaticInt8,
)
from ms_quant.numerics.float8_blocks import BLOCK, Float8BlockFormat
from ms_quant.numerics.float_grid import Float8Format
from ms_quant.numerics.grid import AffineFormat, WeightFormat
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.support import held_by, store
from ms_quant.schemes.table import SCHEMES, get_scheme

NAME = "compressed-tensors"
PLAIN, PACKED, FLOAT8 = "int-quantized", "pack-quantized", "float-quantized"
MIXED, NAIVE = "mixed-precision", "naive-quantized"
CLASSIFIER = "score"
STORED_AS = {PLAIN: (PLAIN, NAIVE), PACKED: (PACKED,), FLOAT8: (FLOAT8, NAIVE)}
"""The names under which versions of the library store the same tensors, ours first."""
FLOATS = (
    (Float8Format(), PerTokenFloat8()),
    (Float8BlockFormat(), GroupFloat8()),
)
"""Weights and inputs of float8."""


def format_of(scheme: Scheme) -> str:
    """How the codes of a scheme's weights are stored.

    Raises:
        MsQuantError: no format holds the scheme.
    """
    weight, activation = scheme.weight, scheme.activation
    if isinstance(weight, AffineFormat):
        if isinstance(activation, Float):
            return PACKED
        if weight == AffineFormat(8) and _is_plain_input(activation):
            return PLAIN
    if (weight, activation) in FLOATS:
        return FLOAT8
    raise UnsupportedError(f"the {NAME} format cannot hold scheme {scheme.name}")


def _is_plain_input(activation: ActivationFormat) -> bool:
    if isinstance(activation, StaticInt8):
        return not (activation.per_channel or activation.folds_bias)
    return activation == PerToken(8)


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
    format = format_of(scheme)
    return {
        "weights": _weights(scheme.weight),
        "input_activations": _inputs(scheme.activation),
        "output_activations": None,
        "format": format,
    }


def _weights(weight: WeightFormat) -> dict[str, Any]:
    if isinstance(weight, Float8BlockFormat):
        block = [weight.row_block, weight.group_size]
        return _arguments(8, strategy="block", type="float", block_structure=block)
    if isinstance(weight, Float8Format):
        return _arguments(8, strategy="channel", type="float")
    assert isinstance(weight, AffineFormat)
    return _arguments(
        weight.bits,
        symmetric=weight.symmetric,
        strategy="group" if weight.group_size else "channel",
        group_size=weight.group_size or None,
    )


def _inputs(activation: ActivationFormat) -> dict[str, Any] | None:
    if isinstance(activation, Float):
        return None
    if isinstance(activation, StaticInt8):
        return _arguments(8, symmetric=activation.symmetric, strategy="tensor")
    if isinstance(activation, GroupFloat8):
        return _arguments(8, strategy="group", type="float", group_size=BLOCK, dynamic=True)
    kind = "float" if isinstance(activation, PerTokenFloat8) else "int"
    return _arguments(8, strategy="token", type=kind, dynamic=True)


def _arguments(
    bits: int,
    *,
    strategy: str,
    type: str = "int",
    symmetric: bool = True,
    group_size: int | None = None,
    dynamic: bool = False,
    block_structure: list[int] | None = None,
) -> dict[str, Any]:
    blocks = {"block_structure": block_structure} if block_structure else {}
    return {
        **blocks,
        "num_bits": bits,
        "type": type,
        "symmetric": symmetric,
        "group_size": group_size,
        "strategy": strategy,
        "dynamic": dynamic,
    }


def read_schemes(config: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Scheme | None]:
    """The scheme of each linear; None where it stays float.

    Args:
        config: ``quantization_config`` as stored, by any version of the library.
        paths: of the decoder's linears.

    Raises:
        MsQuantError: a group spells no known scheme; names the first key that differs from the
            nearest, or what is not read here.
    """
    check_entry(config)
    targets: dict[str, Scheme] = {}
    for where, group in groups_of(config):
        scheme = _scheme(group, where)
        for target in names_of(group, "targets", where):
            if targets.setdefault(target, scheme) != scheme:
                raise BadFileError(
                    f"{KEY}: {short(target)} is a target of several schemes, expected one"
                )
    ignored, chosen = Targets(names_of(config, "ignore", KEY)), Targets(targets)
    if HEAD in targets and ignored.of(HEAD) is None:
        raise BadFileError(f"{KEY}: {HEAD} is a target, expected it in ignore: it stays float")
    schemes: dict[str, Scheme | None] = {}
    for path in paths:
        name = None if ignored.of(path) else chosen.of(path)
        schemes[path] = None if name is None else targets[name]
    return schemes


def _scheme(group: Mapping[str, Any], where: str) -> Scheme:
    """The scheme that a group spells."""
    if group.get("output_activations") is not None:
        raise BadFileError(
            f"{where}.output_activations is {short(group['output_activations'])}, expected null"
        )
    known = [MIXED, *dict.fromkeys(name for names in STORED_AS.values() for name in names)]
    if group["format"] not in (None, *known):
        listed = ", ".join(known)
        raise BadFileError(f"{where}.format is {short(group['format'])}, expected one of {listed}")
    weights = arguments_of(group.get("weights"), f"{where}.weights")
    inputs = arguments_of(group.get("input_activations"), f"{where}.input_activations")
    if weights is None:
        raise BadFileError(f"{where}.weights is null, expected arguments")
    differences = []
    for scheme in _candidates(weights, inputs):
        found = _difference(group, weights, inputs, scheme, where)
        if found is None:
            return scheme
        differences.append((found, scheme.name))
    raise BadFileError(_nearest(differences))


def _nearest(differences: Sequence[tuple[Difference, str]]) -> str:
    """The sentence about the first key that keeps a group from being one of the nearest schemes."""
    first, _ = min(differences, key=lambda row: row[0].count)
    same = (first.count, first.place)
    rows = [row for row in differences if (row[0].count, row[0].place) == same]
    values = " or ".join(dict.fromkeys(difference.expected for difference, _ in rows))
    names = " or ".join(name for _, name in rows)
    return (
        f"{first.place} is {first.found}, expected {values} as in {names}, the nearest that is read"
    )


def _candidates(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Iterator[Scheme]:
    """Every scheme that the format holds, with the options that the arguments state."""
    size = weights["group_size"]
    stated = {"group_size": 0 if size is None else size, "symmetric": weights["symmetric"]}
    for name in held_by(NAME):
        row = SCHEMES[name]
        for option in SCHEMES[name].options:
            try:
                row = get_scheme(name, **{**row.chosen, option: stated[option]})
            except MsQuantError:
                continue  # the difference is named
        row, _ = store(row, DTYPES["bfloat16"], NAME)
        if isinstance(row.activation, StaticInt8):
            symmetric = inputs is not None and inputs["symmetric"] is True
            row = replace(row, activation=replace(row.activation, symmetric=symmetric))
        yield row


def _difference(
    group: Mapping[str, Any],
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any] | None,
    scheme: Scheme,
    where: str,
) -> Difference | None:
    """How a group differs from what a scheme is spelled as: in how many keys, and where first."""
    spelled, stored = arguments(scheme), group["format"]
    found = [
        first_difference(given, arguments_of(spelled[key], f"{where}.{key}"), f"{where}.{key}")
        for key, given in (("weights", weights), ("input_activations", inputs))
    ]
    if stored is not None and stored not in STORED_AS[spelled["format"]]:
        known = " or ".join(repr(name) for name in STORED_AS[spelled["format"]])
        found.append(Difference(1, f"{where}.format", short(stored), known))
    wrong = [difference for difference in found if difference is not None]
    total = sum(difference.count for difference in wrong)
    return replace(wrong[0], count=total) if wrong else None
