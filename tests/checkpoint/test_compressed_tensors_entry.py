"""``quantization_config`` as versions of LLM Compressor write it, read as the schemes it spells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from plans import held

from ms_quant.errors import MsQuantError
from ms_quant.formats.compressed_tensors.config import quantization_config, read_schemes

FORMAT = "compressed-tensors"
LINEARS = [
    f"model.layers.{index}.{member}_proj"
    for index in range(2)
    for member in ("self_attn.q", "self_attn.k", "self_attn.o", "mlp.up", "mlp.down")
]
DOWN = [path for path in LINEARS if path.endswith("down_proj")]
Entry = dict[str, Any]


def arguments(**more: Any) -> Entry:
    """Every key that some version writes."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "channel",
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
        **more,
    }


TOKEN = arguments(dynamic=True, observer=None, strategy="token")
FP8 = {"type": "float"}
WEIGHTS: dict[str, tuple[Entry, Entry | None, str, tuple[str, dict]]] = {
    "W8A8": (arguments(), TOKEN, "int-quantized", ("W8A8_DYNAMIC", {})),
    "W8A16": (arguments(), None, "pack-quantized", ("W8A16", {})),
    "W8A16, groups": (
        arguments(strategy="group", group_size=64),
        None,
        "pack-quantized",
        ("W8A16", {"group_size": 64}),
    ),
    "W4A16": (
        arguments(num_bits=4, strategy="group", group_size=128, actorder="static"),
        None,
        "pack-quantized",
        ("W4A16", {}),
    ),
    "W4A16, asymmetric": (
        arguments(
            num_bits=4, strategy="group", group_size=32, symmetric=False, zp_dtype="torch.int8"
        ),
        None,
        "pack-quantized",
        ("W4A16", {"group_size": 32, "symmetric": False}),
    ),
    "FP8_DYNAMIC": (
        arguments(**FP8),
        TOKEN | FP8,
        "float-quantized",
        ("W8A8FP8_DYNAMIC", {}),
    ),
    "FP8_BLOCK": (
        arguments(**FP8, strategy="block", block_structure=[128, 128]),
        TOKEN | FP8 | {"strategy": "group", "group_size": 128},
        "float-quantized",
        ("W8A8FP8_BLOCK", {}),
    ),
}


def entry(name: str, **more: Any) -> Entry:
    """The entry as versions of 2024 write it."""
    weights, inputs, format, _ = WEIGHTS[name]
    group = {
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": format,
        "global_compression_ratio": 1.47,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        **more,
    }


def group(found: Entry) -> Entry:
    return found["config_groups"]["group_0"]


def own_format(found: Entry) -> None:
    group(found)["format"] = found["format"]


def only_own_format(found: Entry) -> None:
    group(found)["format"] = found.pop("format")


def without(*keys: str) -> Callable[[Entry], None]:
    def change(found: Entry) -> None:
        for key in keys:
            group(found)["weights"].pop(key, None)

    return change


def dense(found: Entry) -> None:
    found["sparsity_config"] = {
        "format": "dense",
        "global_sparsity": 0.14,
        "ignore": [],
        "registry_requires_subclass": False,
        "sparsity_structure": "unstructured",
        "targets": ["Linear"],
    }


VERSIONS: dict[str, Callable[[Entry], Any]] = {
    "2024": lambda found: None,
    "with a version": lambda found: found.update(version="0.9.4"),
    "empty parts": lambda found: found.update(sparsity_config={}, transform_config={}),
    "null parts": lambda found: found.update(sparsity_config=None, transform_config=None),
    "no groups of transforms": lambda f: f.update(transform_config={"config_groups": {}}),
    "dense": dense,
    "frozen": lambda found: found.update(quantization_status="frozen"),
    "no status": lambda found: found.pop("quantization_status"),
    "format in the group": own_format,
    "format in the group alone": only_own_format,
    "no format": lambda found: found.pop("format"),
    "mixed format": lambda found: (own_format(found), found.update(format="mixed-precision")),
    "upper case": lambda f: group(f)["weights"].update(type=group(f)["weights"]["type"].upper()),
    "few arguments": without(
        "actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype", "dynamic"
    ),
    "no order": lambda found: group(found)["weights"].update(actorder=False),
    "another observer": lambda f: group(f)["weights"].update(
        observer="mse", observer_kwargs={"maxshrink": 0.2}
    ),
    "no ignore": lambda found: found.pop("ignore"),
    "null ignore": lambda found: found.update(ignore=None),
    "ignore by pattern": lambda f: f.update(ignore=["re:.*lm_head", "re:visual.*", "model.x"]),
    "targets by pattern": lambda found: group(found).update(targets=["re:.*_proj$"]),
    "targets by path": lambda found: group(found).update(targets=LINEARS),
    "what transformers adds": lambda f: f.update(run_compressed=True, dequantize=False),
    "no ratio": lambda found: found.update(global_compression_ratio=None),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_versions_entry_is_read(name: str, version: str) -> None:
    found = entry(name)
    VERSIONS[version](found)
    scheme, options = WEIGHTS[name][3]
    expected = held(scheme, FORMAT, **options)
    assert read_schemes(found, LINEARS) == dict.fromkeys(LINEARS, expected)


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("W8A8", {"strategy": None, "group_size": -1}),
        ("W8A16", {"group_size": -1}),
        ("W4A16", {"strategy": None}),
        ("FP8_BLOCK", {"block_structure": "128x128"}),
        ("FP8_BLOCK", {"strategy": None}),
    ],
)
def test_other_spellings_of_arguments(name: str, spelled: Entry) -> None:
    found = entry(name)
    group(found)["weights"].update(spelled)
    scheme, options = WEIGHTS[name][3]
    assert read_schemes(found, LINEARS)[DOWN[0]] == held(scheme, FORMAT, **options)


@pytest.mark.parametrize(
    ("ignore", "floats"),
    [
        (["re:.*down_proj", "lm_head"], DOWN),
        ([r"re:model\.layers\.1\.mlp\.down_proj$"], DOWN[1:]),
        (["model.layers.0.mlp.down_proj"], DOWN[:1]),
        (["re:down_proj", "re:.*embed.*"], []),  # patterns begin where names do
        (["Linear"], LINEARS),
        (["model.layers.0.mlp"], []),  # a module that is no linear
    ],
)
def test_what_is_ignored_stays_float(ignore: list[str], floats: list[str]) -> None:
    found = read_schemes(entry("W8A8", ignore=ignore), LINEARS)
    assert [path for path, scheme in found.items() if scheme is None] == floats


def two_groups(first: list[str], second: list[str]) -> Entry:
    found = entry("W8A8", format="mixed-precision")
    own = group(found) | {"targets": first, "format": "int-quantized"}
    other = group(entry("W4A16")) | {"targets": second, "format": "pack-quantized"}
    return found | {"config_groups": {"group_0": own, "group_1": other}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["Linear"], DOWN),
        (["Linear"], ["re:.*down_proj"]),
        (["re:.*"], DOWN),
        (["re:.*(q|k|o|up)_proj"], ["re:.*down_proj"]),
        (["re:z", "re:.*z?[qkou]p?_proj"], ["Linear"]),
    ],
)
def test_a_path_goes_before_patterns_and_those_before_the_class(
    first: list[str], second: list[str]
) -> None:
    found = read_schemes(two_groups(first, second), LINEARS)
    w4 = [path for path, scheme in found.items() if scheme and scheme.name == "W4A16"]
    assert w4 == DOWN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kv_cache_scheme": arguments(type="float", strategy="tensor")},
            r"kv_cache_scheme is an object of 12 keys \(actorder, .*\), expected null",
        ),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config is .*sparse-bitmask"),
        ({"format": "marlin-24"}, "group_0.format is 'marlin-24', expected one of"),
        ({"format": "dense"}, "group_0.format is 'dense', expected one of"),
        ({"format": "naive-quantized"}, ""),
    ],
)
def test_what_changes_numbers_is_refused_by_name(change: Entry, message: str) -> None:
    if not message:
        assert read_schemes(entry("W8A8", **change), LINEARS)
        return
    with pytest.raises(MsQuantError, match=message):
        read_schemes(entry("W8A8", **change), LINEARS)


PRESETS: list[tuple[Entry, Entry | None, str]] = [
    (
        arguments(type="float", strategy="tensor"),
        arguments(type="float", strategy="tensor"),
        r"weights\.strategy is 'tensor', expected 'channel' as in W8A8FP8_DYNAMIC",
    ),
    (
        arguments(num_bits=4, strategy="group", group_size=128),
        TOKEN,
        r"weights\.num_bits is 4, expected 8 as in W8A8_DYNAMIC",
    ),
    (
        arguments(type="float", num_bits=4, strategy="tensor_group", group_size=16),
        arguments(type="float", num_bits=4, strategy="tensor_group", dynamic="local"),
        r"weights\.(type|num_bits|strategy) is",
    ),
    (
        arguments(),
        TOKEN | {"symmetric": False},
        r"input_activations\.symmetric is False, expected True as in W8A8_DYNAMIC",
    ),
    (
        arguments(**FP8, strategy="block", block_structure=[64, 128]),
        TOKEN | FP8 | {"strategy": "group", "group_size": 128},
        r"weights\.block_structure is \[64, 128\], expected \[128, 128\] as in W8A8FP8_BLOCK",
    ),
    (
        arguments(num_bits=4, strategy="group", group_size=128, actorder="group"),
        None,
        r"weights\.actorder is 'group', expected null, 'static' or 'weight'",
    ),
]


@pytest.mark.parametrize(("weights", "inputs", "message"), PRESETS)
def test_what_is_not_read_names_the_first_key(
    weights: Entry, inputs: Entry | None, message: str
) -> None:
    found = entry("W8A8")
    found.pop("format")
    group(found).update(weights=weights, input_activations=inputs)
    with pytest.raises(MsQuantError, match=f"^quantization_config: group_0.{message}") as raised:
        read_schemes(found, LINEARS)
    assert len(str(raised.value)) < 300


def test_static_inputs_may_be_symmetric() -> None:
    found = entry("W8A8")
    group(found)["input_activations"] = arguments(strategy="tensor")
    scheme = read_schemes(found, LINEARS)[DOWN[0]]
    assert scheme is not None and scheme.name == "W8A8" and scheme.activation.symmetric
    group(found)["input_activations"] = arguments(strategy="tensor", symmetric=False)
    assert read_schemes(found, LINEARS)[DOWN[0]] == held("W8A8", FORMAT)


def test_our_own_entry_is_read_back() -> None:
    for name in ("W8A8FP8_DYNAMIC", "W8A8FP8_BLOCK"):
        scheme = held(name, FORMAT)
        config = quantization_config([(scheme, LINEARS)], DOWN)
        assert config["format"] == "float-quantized"
        expected = {path: None if path in DOWN else scheme for path in LINEARS}
        assert read_schemes(config, LINEARS) == expected
