"""FP8 in blocks, read as the float model that it stands for.

tests/golden/float8/library.json was made by tools/make_golden_float8.py with torch and
transformers; its formulas stand here again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from encoded import Tensors, dequantized, edit_config, maker, scale_of, value_of

from ms_quant.errors import MsQuantError
from ms_quant.files.digest import CHUNK_ELEMENTS
from ms_quant.files.first_pass import read_source
from ms_quant.files.float8_source import VALUES
from ms_quant.files.reader import Checkpoint, fingerprint
from ms_quant.formats.float_source import open_source

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "float8" / "library.json").read_text())
E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
SCALES = {"F32": np.dtype("f4"), "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E8M0": E8M0}
SCALES["U8"] = np.dtype("u1")
W, S = "a.weight", "a.weight_scale_inv"

Make = Callable[..., Checkpoint]


def config(block: Any = (128, 128), **entry: Any) -> dict[str, Any]:
    found = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block, **entry}
    return {"quantization_config": found}


@pytest.fixture
def make(tmp_path: Path, write: Callable[..., None]) -> Make:
    """Opens a directory of some tensors; those of ``second`` are in another shard."""

    def run(
        tensors: Tensors, block: Any = (128, 128), second: Tensors | None = None, **entry: Any
    ) -> Checkpoint:
        (tmp_path / "config.json").write_text(json.dumps(config(block, **entry)))
        write(tmp_path / "model-00001-of-00002.safetensors", tensors)
        write(tmp_path / "model-00002-of-00002.safetensors", second or {})
        places = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
        places |= dict.fromkeys(second or {}, "model-00002-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": places}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return open_source(tmp_path)

    return run


@pytest.fixture(scope="session")
def write() -> Callable[[Path, Tensors], None]:
    def run(path: Path, tensors: Tensors) -> None:
        codes = {dtype: code for code, dtype in maker.TYPES.items()}
        stored = {
            name: maker.Stored(codes[array.dtype], array.shape, array.tobytes)
            for name, array in tensors.items()
        }
        maker.write_tensors(path, stored)

    return run


def random_codes(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    codes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    codes[codes & 127 == 127] = 5
    return codes.view(E4M3)


def random_scales(shape: tuple[int, ...], code: str = "F32", seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if SCALES[code].itemsize == 1:
        return rng.integers(100, 140, shape).astype(np.uint8).view(SCALES[code])
    return np.exp(rng.standard_normal(shape)).astype(SCALES[code])


@pytest.mark.parametrize("code", SCALES)
@pytest.mark.parametrize("powers", [False, True])
def test_what_the_tool_makes_is_near_the_weight(code: str, powers: bool) -> None:
    """Half a step of three bits, and half the smallest step of a block."""
    weight = np.random.default_rng(0).standard_normal((13, 9), np.float32)
    weight[:4, :5] = 0
    codes, stored = maker.to_blocks(weight, (4, 5), code, powers)
    found, scales = dequantized(codes, stored, (4, 5)), scale_of(stored)
    step = scales.repeat(4, 0).repeat(5, 1)[:13, :9]
    clipped = np.abs(weight) * (2.0**-8 if code == "BF16" else 0)  # a scale rounded down
    bound = np.maximum(np.abs(weight) / 16, step * 2.0**-10) + clipped
    assert (np.abs(found - weight) <= bound).all() and (found[:4, :5] == 0).all()
    if powers or SCALES[code].itemsize == 1:
        assert (np.frexp(scales)[0] == 0.5).all()


def test_every_code_is_what_torch_and_the_definition_say() -> None:
    golden = np.array([np.nan if v is None else v for v in GOLDEN["e4m3"]], np.float32)
    np.testing.assert_array_equal(VALUES, golden)
    assert np.signbit(VALUES[128]) and np.signbit(golden[128])
    np.testing.assert_array_equal(VALUES, np.array([value_of(code) for code in range(256)], "f4"))


@pytest.mark.parametrize("code", SCALES)
def test_whole_blocks_are_what_transformers_makes_of_them(code: str, make: Make) -> None:
    i, j = np.ogrid[:384, :256]
    codes = ((37 * i + 11 * j) % 126 + 128 * ((i + j) % 2)).astype(np.uint8).view(E4M3)
    i, j = np.ogrid[:3, :2]
    scales = ((8 + 3 * i + 5 * j).astype("f4") / np.float32(4096) / np.float32(3)).astype("f4")
    stored = scales.astype(SCALES[code])
    if SCALES[code].itemsize == 1:
        stored = (115 + 3 * i + j).astype(np.uint8).view(SCALES[code])
    found = make({W: codes, S: stored}).read_float32(W)
    assert hashlib.sha256(found.tobytes()).hexdigest() == GOLDEN["blocks"][code]


SIZES = [
    ((300, 576), (128, 128), (3, 5)),
    ((576, 130), (128, 128), (5, 2)),
    ((1, 1), (128, 128), (1, 1)),
    ((1, 300), (128, 128), (1, 3)),
    ((192, 3), (128, 128), (2, 1)),
    ((7, 10), (4, 3), (2, 4)),
    ((64, 64), (1, 32), (64, 2)),
    ((5, 6), (5, 6), (1, 1)),
    ((5, 6), (1 << 30, 1 << 40), (1, 1)),
]


@pytest.mark.parametrize(("shape", "block", "scales"), SIZES)
@pytest.mark.parametrize("code", SCALES)
def test_blocks_are_cut_at_the_ends(
    shape: tuple[int, int], block: tuple[int, int], scales: tuple[int, int], code: str, make: Make
) -> None:
    codes, scale = random_codes(shape), random_scales(scales, code)
    checkpoint = make({W: codes}, list(block), {S: scale})
    expected = dequantized(codes.view(np.uint8), scale, block)
    assert checkpoint.names == [W] and W in checkpoint and S not in checkpoint
    info = checkpoint.info(W)
    assert (info.code, info.shape, info.stop - info.start) == ("F32", shape, expected.nbytes)
    found = checkpoint.read_float32(W)
    np.testing.assert_array_equal(found.view("u4"), expected.view("u4"))
    for elements in (1, 3 * shape[1], CHUNK_ELEMENTS):
        pieces = list(checkpoint.float32_chunks(W, elements))
        assert all(part.size <= max(elements, shape[1]) for _, part in pieces)
        np.testing.assert_array_equal(np.concatenate([part for _, part in pieces]), expected)
        assert [start for start, _ in pieces] == list(
            range(0, shape[0], max(1, elements // shape[1]))
        )
    rows = slice(shape[0] // 3, shape[0])
    parts = [part for _, part in checkpoint.float_chunks(W, rows)]
    np.testing.assert_array_equal(np.concatenate(parts), expected[rows])


def test_products_are_not_rounded_to_bfloat16(make: Make) -> None:
    scale = np.array([[1 + 2**-20]], "f4")
    found = make({W: np.full((2, 2), 1.125, E4M3), S: scale}).read_float32(W)
    assert (found == np.float32(1.125) * scale[0, 0]).all()
    assert (found.astype(ml_dtypes.bfloat16).astype("f4") != found).all()


def test_matrices_in_one_tensor_have_blocks_each(make: Make) -> None:
    codes, scale = random_codes((3, 10, 9)), random_scales((3, 3, 2))
    name = "a.matrices"
    checkpoint = make({name: codes, f"{name}_scale_inv": scale}, [4, 5])
    expected = [
        dequantized(one.view(np.uint8), by, (4, 5)) for one, by in zip(codes, scale, strict=True)
    ]
    np.testing.assert_array_equal(checkpoint.read_float32(name), np.stack(expected))
    np.testing.assert_array_equal(
        next(checkpoint.float_chunks(name, slice(1, 2)))[1], np.stack(expected[1:2])
    )


def test_a_scale_may_be_called_so(make: Make) -> None:
    codes, scale = random_codes((4, 4)), random_scales((2, 1), "F8_E8M0")
    checkpoint = make({W: codes, "a.scale": scale}, [2, 4])
    np.testing.assert_array_equal(
        checkpoint.read_float32(W), codes.astype("f4") * scale_of(scale).repeat(2, 0)
    )


def test_types_tell_what_is_encoded_and_names_do_not(make: Make) -> None:
    plain = np.full((4, 4), 0.1, ml_dtypes.bfloat16)
    tensors = {W: random_codes((4, 4)), S: random_scales((1, 1)), "lm_head.weight": plain}
    checkpoint = make(tensors, modules_to_not_convert=["a"])
    assert checkpoint.info("lm_head.weight").code == "BF16"
    (_, found), *_ = checkpoint.float_chunks("lm_head.weight")
    assert found.dtype == plain.dtype and found.tobytes() == plain.tobytes()
    assert checkpoint.info(W).code == "F32"


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_the_text_model_of_a_larger_one_says_it_itself(
    key: str, make: Make, tmp_path: Path
) -> None:
    codes, scale = random_codes((3, 3)), random_scales((2, 2))
    checkpoint = make({W: codes, S: scale}, [2, 2])
    expected = checkpoint.read_float32(W)
    edit_config(
        tmp_path, lambda c: c.update(text_config={key: c.pop("quantization_config"), "x": 1})
    )
    np.testing.assert_array_equal(open_source(tmp_path).read_float32(W), expected)


REFUSED: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("no scale", lambda t: t.pop(S), rf"'{W}' is F8_E4M3 and has no scale, expected .*'{S}'"),
    ("no weight", lambda t: t.pop(W), rf"'{S}' is a scale of '{W}', which is not there"),
    (
        "a float weight",
        lambda t: t.update({W: t[W].astype(ml_dtypes.bfloat16)}),
        rf"'{S}' is a scale of '{W}', which is BF16, expected F8_E4M3",
    ),
    (
        "one row of scales too few",
        lambda t: t.update({S: t[S][:-1]}),
        rf"'{S}' has shape \[4, 2\], expected \[5, 2\] for a weight of shape \[576, 200\]",
    ),
    (
        "scales in another type",
        lambda t: t.update({S: t[S].astype(np.float16)}),
        rf"'{S}' is F16, expected one of F32, BF16, F8_E8M0, U8",
    ),
    (
        "a vector",
        lambda t: t.update({W: t[W][0]}),
        rf"'{S}' is of a weight of shape \[200\], expected a matrix",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_headers_show_is_refused_at_once(
    change: Callable[[Tensors], object], message: str, make: Make
) -> None:
    tensors = {W: random_codes((576, 200)), S: random_scales((5, 2))}
    change(tensors)
    with pytest.raises(MsQuantError, match=rf"^.*\.safetensors: tensor {message}"):
        make(tensors)


def test_an_entry_that_is_no_object_is_refused(make: Make, tmp_path: Path) -> None:
    make({W: random_codes((4, 4)), S: random_scales((1, 1))})
    edit_config(tmp_path, lambda c: c.update(quantization_config="fp8"))
    with pytest.raises(MsQuantError, match="quant_method 'fp8', expected a float checkpoint or"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"block": None}, "weight_block_size is None, expected two positive numbers"),
        ({"block": [128]}, r"weight_block_size is \[128\]"),
        ({"block": [128, 0]}, r"weight_block_size is \[128, 0\]"),
        ({"block": [128, True]}, r"weight_block_size is \[128, True\]"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2', expected 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static', expected 'dynamic'"),
        ({"quant_method": "gptq"}, "quant_method 'gptq', expected a float checkpoint or one in"),
    ],
)
def test_other_encodings_are_refused(entry: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(MsQuantError, match=rf"^.*config\.json: .*{message}"):
        make({W: random_codes((4, 4)), S: random_scales((1, 1))}, **entry)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("code", ["F32", "BF16"])
def test_a_scale_that_is_no_positive_number_is_named(value: float, code: str, make: Make) -> None:
    scale = random_scales((3, 3), code)
    scale[2, 1] = value
    checkpoint = make({W: random_codes((5, 5)), S: scale}, [2, 2])
    with pytest.raises(MsQuantError, match=rf"'{S}' holds 1 scales of 9 that are zero, negative"):
        checkpoint.read_float32(W)
    for _ in checkpoint.float_chunks(W, slice(0, 3)):
        pass  # whose scales are right


@pytest.mark.parametrize("code", ["F8_E8M0", "U8"])
def test_a_nan_of_e8m0_is_named(code: str, make: Make, tmp_path: Path) -> None:
    scale = np.array([[255]], np.uint8).view(SCALES[code])
    checkpoint = make({W: random_codes((5, 5)), S: scale})
    with pytest.raises(MsQuantError, match=rf"'{S}' holds 1 scales of 1"):
        checkpoint.read_float32(W)
    with pytest.raises(MsQuantError, match=rf"'{S}' holds 1 (scales|NaN or infinite values) of 1"):
        read_source(checkpoint, tmp_path)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_refused_with_the_tensors_name(code: int, make: Make, tmp_path: Path) -> None:
    codes = random_codes((5, 5))
    codes.view(np.uint8)[3, 4] = code
    checkpoint = make({W: codes, S: random_scales((1, 1))})
    with pytest.raises(MsQuantError, match=rf"'{W}' holds 1 NaN codes in rows 0 to 5"):
        checkpoint.read_float32(W)
    with pytest.raises(MsQuantError, match=rf"'{W}' holds 1 NaN or infinite values of 25"):
        read_source(checkpoint, tmp_path)


def test_products_beyond_float32_are_refused(make: Make) -> None:
    codes = np.full((2, 2), 448, E4M3)
    checkpoint = make({W: codes, S: np.array([[1e37]], "f4")})
    with pytest.raises(MsQuantError, match=rf"'{W}' has a scale of 1e\+37, expected values that"):
        checkpoint.read_float32(W)
    checkpoint = make({W: np.full((2, 2), 2, E4M3), S: np.array([[1e37]], "f4")})
    assert (checkpoint.read_float32(W) == np.float32(2e37)).all()


@pytest.mark.parametrize("code", SCALES)
def test_codes_and_scales_are_hashed_and_scales_looked_at_before_work(
    code: str, make: Make, tmp_path: Path
) -> None:
    codes, scale = random_codes((5, 5)), random_scales((3, 3), code)
    found = read_source(make({W: codes}, [2, 2], {S: scale}), tmp_path)
    assert found.digests == {
        W: hashlib.sha256(codes.tobytes()).hexdigest(),
        S: hashlib.sha256(scale.tobytes()).hexdigest(),
    }


@pytest.mark.parametrize("changed", [W, S])
def test_a_changed_code_or_scale_is_noticed_where_it_is_read(
    changed: str, make: Make, tmp_path: Path
) -> None:
    tensors = {W: random_codes((5, 5)), S: random_scales((3, 3))}
    checkpoint = make({W: tensors[W]}, [2, 2], {S: tensors[S]})
    found = read_source(checkpoint, tmp_path)
    before = fingerprint(checkpoint)
    tensors[changed] = tensors[changed][::-1].copy()
    checkpoint = make({W: tensors[W]}, [2, 2], {S: tensors[S]})
    assert fingerprint(checkpoint) != before
    checkpoint.expect(found.digests, found.trusted, found.stamps)
    with pytest.raises(MsQuantError, match=f"'{changed}' changed since the job was begun"):
        checkpoint.read_float32(W)


def test_tens_of_thousands_of_tensors_are_opened_in_seconds(make: Make, tmp_path: Path) -> None:
    """32,000 tensors in 40 shards, of which only the headers are on the disk."""
    sizes = {W: ("F8_E4M3", (7168, 2048)), S: ("F32", (56, 16))}
    places: dict[str, str] = {}
    for shard in range(40):
        name, offset, header = f"model-{shard}.safetensors", 0, {}
        for expert in range(400):
            for suffix, (code, shape) in sizes.items():
                ends = [offset, offset + int(np.prod(shape)) * (4 if code == "F32" else 1)]
                key, offset = f"layers.{shard}.experts.{expert}.{suffix}", ends[1]
                header[key] = {"dtype": code, "shape": list(shape), "data_offsets": ends}
                places[key] = name
        text = json.dumps(header).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    start = time.process_time()
    checkpoint = open_source(tmp_path)
    assert len(checkpoint.names) == 16_000
    assert all(checkpoint.info(name).code == "F32" for name in checkpoint.names)
    assert time.process_time() - start < 10  # 0.7 alone; a quadratic step takes 30


def test_zero_scales_are_found_by_the_first_pass(make: Make, tmp_path: Path) -> None:
    scale = random_scales((3, 3))
    scale[0, 0] = 0
    with pytest.raises(MsQuantError, match=f"'{S}' holds 1 scales of 9"):
        read_source(make({W: random_codes((5, 5)), S: scale}, [2, 2]), tmp_path)
