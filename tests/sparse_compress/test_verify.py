"""Verification: a right checkpoint passes, each defect is named, a single flipped byte is found.

Most defects are resealed: the digests in the record agree again, and the check proper must speak.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_quant.errors import MsQuantError
from sparse_compress.codec import compress_matrix, decompress_matrix, matrix_info
from sparse_compress.ranks.tensors import RankTensors
from sparse_compress.verify.checkpoint import verify

DESCRIPTION = "quant_model_description_w8a8sc.json"
QKV = "model.layers.0.self_attn.qkv_proj"
DOWN = "model.layers.0.mlp.down_proj"
GATE_UP = "model.layers.0.mlp.gate_up_proj"
NORM = "model.layers.0.input_layernorm.weight"
BLOCK, REST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors], None]


def put(name: str, value: Any, place: Any = 0) -> Change:
    """Sets some values of one tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name][place] = value

    return change


def remove(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def add(name: str, array: np.ndarray) -> Change:
    return lambda tensors: tensors.__setitem__(name, array)


def retype(name: str, dtype: str) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].astype(dtype)})


def shorten(name: str, count: int) -> Change:
    return lambda tensors: tensors.update({name: tensors[name][:-count]})


def flip(name: str, place: int) -> Change:
    """Flips the lowest bit of one byte of a tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name].reshape(-1).view(np.uint8)[place] ^= 1

    return change


def recode(name: str, edit: Callable[[np.ndarray], None], keep_bias: bool = False) -> Change:
    """Changes int8 weights behind their tiles, so that nothing on this rank disagrees."""

    def change(tensors: Tensors) -> None:
        n, k = len(tensors[f"{name}.deq_scale"]), len(tensors[f"{name}.input_scale"])
        info = matrix_info(n, k)
        old = decompress_matrix(tensors[f"{name}.weight"], tensors[f"{name}.index"], info)
        new = old.copy()
        edit(new)
        tensors[f"{name}.weight"], tensors[f"{name}.index"], _ = compress_matrix(new)
        if not keep_bias:
            offset = int(tensors[f"{name}.input_offset"][0])
            step = (new.astype(np.int64) - old).sum(axis=1) * offset
            tensors[f"{name}.quant_bias"] -= step.astype(np.int32)

    return change


def set_one(weight: np.ndarray) -> None:
    """Changes one weight and keeps the number of zeros."""
    row, column = np.argwhere((weight > 0) & (weight < 100))[0]
    weight[row, column] += 1


def fill_zeros(weight: np.ndarray) -> None:
    weight[:256][weight[:256] == 0] = 1


DEFECTS: list[tuple[str, int, str, Change, str]] = [
    ("missing", 0, BLOCK, remove(NORM), f"rank_0: tensor '{NORM}' is missing"),
    ("missing index", 1, BLOCK, remove(f"{QKV}.index"), f"'{QKV}.index' is missing"),
    ("unknown", 1, REST, add("model.x", np.zeros(1, "f4")), "unknown tensor 'model.x'"),
    ("dtype", 0, BLOCK, retype(f"{QKV}.deq_scale", "f4"), "found float32 [512], expected int64"),
    ("shape", 0, BLOCK, shorten(NORM, 1), "found float16 [319], expected float16 [320]"),
    ("vocabulary", 1, REST, shorten("lm_head.weight", 1), "found float16 [159, 320], expected"),
    ("short tiles", 0, BLOCK, shorten(f"{QKV}.weight", 64), "a multiple of 128"),
    ("short index", 0, BLOCK, shorten(f"{QKV}.index", 8), "found int8 [56], expected int8 [64]"),
    ("tile", 1, BLOCK, flip(f"{QKV}.weight", 4), f"tensor '{QKV}.weight': tile 0"),
    ("index", 0, BLOCK, flip(f"{QKV}.index", 1), f"tensor '{QKV}.weight': tile 0"),
    ("negative scale", 0, BLOCK, put(f"{QKV}.deq_scale", -1), "not the bits of a positive finite"),
    ("zero scale", 0, BLOCK, put(f"{QKV}.deq_scale", 0), "rank_0: " + QKV + ".deq_scale: 1 of"),
    ("infinite scale", 1, BLOCK, put(f"{QKV}.deq_scale", 0x7F800000), "not the bits"),
    ("wide scale", 1, BLOCK, put(f"{QKV}.deq_scale", 1 << 40), "not the bits of"),
    ("other scale", 0, BLOCK, flip(f"{GATE_UP}.deq_scale", 0), "deq_scale differs from"),
    (
        "row scale copy",
        1,
        BLOCK,
        flip(f"{DOWN}.deq_scale", 0),
        "rank_1: " + DOWN + ".deq_scale: di",
    ),
    ("bias", 0, BLOCK, flip(f"{QKV}.quant_bias", 0), "q_proj.quant_bias: 1 of 768 values differ"),
    ("row bias", 0, BLOCK, flip(f"{DOWN}.quant_bias", 0), "down_proj.quant_bias: 1 of 320 values"),
    (
        "second bias",
        1,
        BLOCK,
        put(f"{DOWN}.quant_bias", 1),
        "rank_1: " + DOWN + ".quant_bias: hold",
    ),
    ("one input scale", 1, BLOCK, put(f"{QKV}.input_scale", 1), "input_scale: differs from rank_0"),
    ("input scale", 1, BLOCK, put(f"{DOWN}.input_scale", 1), "input_scale differs from"),
    ("small scale", 1, BLOCK, put(f"{DOWN}.input_scale", 1e-6), "below 6.10352e-05"),
    ("nan scale", 1, BLOCK, put(f"{DOWN}.input_scale", np.nan), "1 of 1280 values are not finite"),
    ("offset", 1, BLOCK, flip(f"{DOWN}.input_offset", 3), "expected one zero point"),
    ("offsets", 1, BLOCK, flip(f"{QKV}.input_offset", 3), "input_offset: differs from rank_0"),
    ("norm copy", 1, BLOCK, flip(NORM, 0), f"rank_1: {NORM}: differs from rank_0"),
    ("padding", 1, REST, put("lm_head.weight", 1, 155), "rows 310 and on are padding"),
    ("nan", 0, REST, put("lm_head.weight", np.nan, 5), "lm_head.weight: 320 of 99200 values"),
    ("weight", 0, BLOCK, recode(DOWN, set_one, True), "down_proj.quant_bias: 1 of 320 values"),
    ("dense", 0, BLOCK, recode(QKV, fill_zeros), "zeros of 245760, expected at least 122880"),
]


@pytest.mark.parametrize("defect", DEFECTS, ids=[defect[0] for defect in DEFECTS])
def test_defects_of_tensors_are_named(
    make: Callable[..., Any], damage: Callable[..., Any], defect: Any
) -> None:
    _, rank, file, change, message = defect
    copy = damage(make(tp=2))
    copy.edit(f"rank_{rank}/{file}", change)
    if "weight" in message or "index" in message or defect[0] in ("dense", "weight"):
        copy.edit_json(DESCRIPTION, lambda value: relist(copy.directory, value))
    copy.reseal()
    problems = verify(copy.directory).problems
    assert any(message in problem for problem in problems), problems


def relist(directory: Path, value: dict[str, Any]) -> None:
    """States the lengths of the tiles as they are now."""
    for rank in (0, 1):
        tensors = load_file(directory / f"rank_{rank}" / BLOCK)
        for key in value[f"rank_{rank}"]:
            if key.endswith(".shape") and key.removesuffix(".shape") in tensors:
                value[f"rank_{rank}"][key] = list(tensors[key.removesuffix(".shape")].shape)


def copied_head(tensors: Tensors) -> None:
    tensors[f"{QKV}.deq_scale"][-1] += 1


def test_a_shared_key_value_head_must_agree(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    copy = damage(make(tp=4))
    copy.edit(f"rank_3/{BLOCK}", copied_head)
    copy.reseal()
    problems = verify(copy.directory).problems
    sentence = f"rank_3: {QKV}.deq_scale: differs from rank_2, expected a copy of it"
    assert problems == (sentence,)


def test_a_float_slice_must_be_the_sources(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    made = make(exclude=("*.k_proj", "*.down_proj"))
    copy = damage(made)
    copy.edit(f"rank_1/{BLOCK}", flip(f"{DOWN}.weight", 0))
    copy.reseal()
    assert verify(copy.directory).problems == ()
    problems = verify(copy.directory, made.source).problems
    expected = "model.layers.0.mlp.down_proj.weight: 1 of 409600 values differ from the source's"
    assert [problem[: len(expected)] for problem in problems] == [expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (recode(QKV, set_one), "q_proj.weight: 1 of 245760 values differ from those of the source"),
        (flip("model.layers.0.self_attn.q_norm.weight", 0), "q_norm.weight: 1 of 64 values differ"),
    ],
)
def test_a_consistent_change_is_found_with_the_source(
    make: Callable[..., Any], damage: Callable[..., Any], change: Change, message: str
) -> None:
    made = make(tp=2)
    copy = damage(made)
    ranks = (0,) if "q_proj" in message else (0, 1)
    for rank in ranks:
        copy.edit(f"rank_{rank}/{BLOCK}", change)
    copy.edit_json(DESCRIPTION, lambda value: relist(copy.directory, value))
    copy.reseal()
    assert verify(copy.directory).problems == ()
    problems = verify(copy.directory, made.source).problems
    assert len(problems) == 1 and message in problems[0], problems


def test_a_forged_weight_scale_is_found_with_the_source(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    made = make(tp=2)
    copy = damage(made)

    def forge(tensors: Tensors) -> None:
        tensors["mlp.down_proj.weight_scale"][0] *= 2

    copy.edit("proof/block-00000.proof", forge)
    for rank in (0, 1):  # doubling a float32 adds one to its exponent
        copy.edit(f"rank_{rank}/{BLOCK}", double_scale)
    copy.reseal()
    problems = verify(copy.directory, made.source).problems
    assert any("1 of 320 rows do not follow from the source" in text for text in problems), problems


@pytest.mark.parametrize("counts", ['{"x": Infinity}', '{"mlp.up_proj": {"zeros": 1e999}}', "["])
def test_malformed_counts_are_refused(
    make: Callable[..., Any], damage: Callable[..., Any], counts: str
) -> None:
    copy = damage(make(tp=2))
    path = copy.directory / "proof/block-00000.proof"
    save_file(load_file(path), path, {"counts": counts})
    copy.reseal()
    problems = verify(copy.directory).problems
    assert any("metadata 'counts' is malformed" in problem for problem in problems), problems


@pytest.mark.parametrize("model", [{}, {"tied": True}])
def test_the_vocabulary_is_compared_in_pieces(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]
) -> None:
    made, read, whole = make(model, tp=2), RankTensors.read, set()

    def record(self: RankTensors, name: str) -> np.ndarray:
        whole.add(name)
        return read(self, name)

    monkeypatch.setattr(RankTensors, "read", record)
    monkeypatch.setattr("sparse_compress.ranks.reader.CHUNK_ELEMENTS", 320 * 7)
    assert verify(made.output, made.source).problems == ()
    assert not whole & {"lm_head.weight", "model.embed_tokens.weight"}
    assert NORM in whole


def double_scale(tensors: Tensors) -> None:
    tensors[f"{DOWN}.deq_scale"][0] += 1 << 23


JSON_DEFECTS: list[tuple[str, str, Callable[[dict[str, Any]], Any], str]] = [
    ("device", DESCRIPTION, lambda d: d.update(device_type="910B"), "device_type is '910B'"),
    ("kind", DESCRIPTION, lambda d: d["rank_0"].update({f"{QKV}.weight": "W8A8"}), "is 'W8A8', ex"),
    (
        "length",
        DESCRIPTION,
        lambda d: d["rank_1"].update({f"{QKV}.index.shape": [8]}),
        "[8], expe",
    ),
    (
        "no shape",
        DESCRIPTION,
        lambda d: d["rank_1"].pop(f"{QKV}.weight.shape"),
        "is None, expected",
    ),
    ("unlisted", DESCRIPTION, lambda d: d["rank_1"].clear(), "rank_1: model.layers.0"),
    ("rank", DESCRIPTION, lambda d: d.pop("rank_1"), "rank_1 is None"),
    ("third", DESCRIPTION, lambda d: d.update(rank_2={}), "rank_2 is {}, expected None"),
    ("extra", DESCRIPTION, lambda d: d["rank_0"].update(x="W8A8S"), "x is 'W8A8S', expected None"),
    ("dtype", "config.json", lambda d: d.update(torch_dtype="bfloat16"), "is 'bfloat16', expected"),
    (
        "quantization",
        "config.json",
        lambda d: d.update(compression_config={}),
        "config.json: has compression_config, expected none",
    ),
    (
        "no torch_dtype",
        "config.json",
        lambda d: d.update(torch_dtype=None, dtype="float16"),
        "config.json: torch_dtype is None, expected 'float16'",
    ),
    ("many layers", "config.json", lambda d: d.update(num_hidden_layers=2**31 - 1), "most 4096"),
    ("heads", "config.json", lambda d: d.update(num_attention_heads=6), "o_proj: k = 192"),
    ("layers", "config.json", lambda d: d.update(num_hidden_layers=2), "tensor 'model.layers.1"),
    ("no config", "config.json", lambda d: d.clear(), "model_type None is not supported"),
]


@pytest.mark.parametrize("defect", JSON_DEFECTS, ids=[defect[0] for defect in JSON_DEFECTS])
def test_defects_of_json_files_are_named(
    make: Callable[..., Any], damage: Callable[..., Any], defect: Any
) -> None:
    _, name, change, message = defect
    copy = damage(make(tp=2))
    copy.edit_json(name, change)
    copy.reseal()
    problems = verify(copy.directory).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("value", [5, "x", [1]])
def test_text_config_of_any_type(
    make: Callable[..., Any], damage: Callable[..., Any], value: Any
) -> None:
    made = make(tp=2)
    copy = damage(made)
    copy.edit_json("config.json", lambda config: config.update(text_config=value))
    copy.reseal()
    for source in (None, made.source):
        (found,) = verify(copy.directory, source).problems
        assert "text_config is" in found


def test_a_tokenizer_file_that_the_source_does_not_have(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    made = make(tp=2)
    copy = damage(made)
    (copy.directory / "vocab.json").write_text("{}")
    copy.reseal()
    problems = verify(copy.directory, made.source).problems
    assert list(problems) == [
        f"{copy.directory / 'vocab.json'}: expected no such file, the source has none"
    ]


RECORD_DEFECTS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("tp", lambda r: r["record"].update(tp=1), "has ['rank_0', 'rank_1'], expected ['rank_0']"),
    ("type", lambda r: r["record"].update(tp="2"), "tp is '2', expected int"),
    ("many", lambda r: r["record"].update(tp=1 << 30), "tp is 1073741824, expected 1 to 1024"),
    ("much", lambda r: r["record"].update(exclude=["x"] * 1001), "has 1001 patterns, expected at"),
    ("sparsity", lambda r: r["record"].update(sparsity=0.9), "expected at least"),
    ("kind", lambda r: r["record"].update(pruning="x"), "pruning 'x' is unknown"),
    ("algorithm", lambda r: r["record"].update(algorithm="x"), "algorithm 'x' is unknown"),
    ("format", lambda r: r["record"].pop("format"), "is no record of a W8A8SC checkpoint"),
    ("patterns", lambda r: r["record"].update(exclude=[1]), "exclude is [1], expected patterns"),
    ("excluded", lambda r: r["record"].update(exclude=["*.q_proj"]), "is not uncompressed"),
    ("reason", lambda r: r["uncompressed"].update({QKV: "no"}), "is not compressed, expected"),
    ("reasons", lambda r: r.update(uncompressed=0), "uncompressed is 0, expected reasons"),
]


@pytest.mark.parametrize("defect", RECORD_DEFECTS, ids=[defect[0] for defect in RECORD_DEFECTS])
def test_defects_of_the_record_are_named(
    make: Callable[..., Any], damage: Callable[..., Any], defect: Any
) -> None:
    _, change, message = defect
    copy = damage(make(tp=2))
    copy.edit_json("ms_quant.json", change)
    copy.reseal()
    problems = verify(copy.directory).problems
    assert any(message in problem for problem in problems), problems


def test_a_missing_rank_is_refused_and_not_replaced_by_the_first(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    copy = damage(make(tp=2))
    shutil.rmtree(copy.directory / "rank_1")
    copy.reseal()
    assert "has ['rank_0'], expected ['rank_0', 'rank_1']" in verify(copy.directory).problems[0]


@pytest.mark.parametrize(
    "name", ["rank_0/more.safetensors", "adapter_config.json", "rank_2/x", "x.py"]
)
def test_a_file_too_many_is_found(
    make: Callable[..., Any], damage: Callable[..., Any], name: str
) -> None:
    copy = damage(make(tp=2))
    (copy.directory / name).parent.mkdir(exist_ok=True)
    (copy.directory / name).write_bytes(b"x")
    problems = verify(copy.directory).problems
    assert (
        f"{copy.directory / name}: not listed in ms_quant.json, expected no other file that a "
        "runtime reads" in problems
    )


def test_a_tensor_in_two_files_is_refused(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    copy = damage(make(tp=2))
    copy.edit(f"rank_0/{REST}", add(NORM, np.ones(320, np.float16)))
    copy.reseal()
    assert "expected it only in" in verify(copy.directory).problems[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("qkv.l2_norm"), "tensor 'qkv.l2_norm' is missing"),
        (add("x", np.zeros(1, "f4")), "tensor 'x' is unknown"),
        (shorten("qkv.l2_norm", 1), "'qkv.l2_norm' is float32 [319], expected float32 [320]"),
        (put("qkv.l2_norm", -1), "1 values of 320 that are not finite or below 0"),
        (put("qkv.act_scale", np.inf), "'qkv.act_scale' holds 1 values of 1"),
        (put("mlp.up_proj.weight_scale", 0), "'mlp.up_proj.weight_scale' holds 1"),
        (flip("mlp.up_proj.weight_scale", 0), "gate_up_proj: deq_scale differs from"),
    ],
)
def test_defects_of_the_proof_are_named(
    make: Callable[..., Any], damage: Callable[..., Any], change: Change, message: str
) -> None:
    copy = damage(make(tp=2))
    copy.edit("proof/block-00000.proof", change)
    copy.reseal()
    problems = verify(copy.directory).problems
    assert any(message in problem for problem in problems), problems


def test_another_source_is_found(make: Callable[..., Any]) -> None:
    problems = verify(make(tp=2).output, make({"seed": 1}).source).problems
    assert any("q_proj.weight" in problem for problem in problems)
    assert any("model.norm.weight" in problem for problem in problems)


def test_a_single_flipped_byte_is_found_in_every_file(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    copy, rng = damage(make(tp=2)), np.random.default_rng(0)
    files = sorted(path for path in copy.directory.rglob("*") if path.is_file())
    assert len(files) == 10
    for path in files:
        content = path.read_bytes()
        for place in (0, len(content) - 1, *rng.integers(0, len(content), 4)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            assert verify(copy.directory).problems, f"{path} at {place}"
        path.write_bytes(content)
    assert verify(copy.directory).problems == ()


def test_every_byte_of_the_record_counts(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    from ms_quant.job.output_directory import check_files

    copy, rng = damage(make(tp=2)), np.random.default_rng(1)
    path = copy.directory / "ms_quant.json"
    content = path.read_bytes()
    for place in rng.integers(0, len(content), 200):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert check_files(copy.directory)
        except MsQuantError as error:
            assert "ms_quant.json" in str(error)


def test_truncated_and_deleted_files_are_named(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    copy = damage(make(tp=2))
    for name in (f"rank_1/{BLOCK}", "proof/block-00000.proof", "config.json", DESCRIPTION):
        path = copy.directory / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert any(name in problem for problem in verify(copy.directory).problems), name
        path.unlink()
        assert any(name in problem for problem in verify(copy.directory).problems), name
        path.write_bytes(content)


def test_a_directory_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match="is empty, expected the directory of"):
        verify(tmp_path)


def test_a_golden_stick_checkpoint_is_sent_to_its_verifier(tmp_path: Path) -> None:
    for name in ("ms_quant.json", "quantization_description.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(MsQuantError, match=r"is a golden-stick checkpoint, .*; ms-quant verify"):
        verify(tmp_path)


def test_an_unreadable_source_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match="no such model directory"):
        verify(make(tp=2).output, tmp_path / "none")


def test_the_result_is_json_and_progress_is_told(make: Callable[..., Any]) -> None:
    made, told = make(tp=2), []
    result = verify(made.output, made.source, lambda step, part: told.append((step, part)))
    json.dumps(result.as_json(), allow_nan=False)
    assert told[0] == ("files", 0.0) and told[-1] == ("tensors", 1.0)
    tiles = 2 * (4 * 2 + 3 * 2 + 10 * 2 + 3 * 3)
    expected = {"linears": 7, "tiles": tiles, "recomputed": 7, "float_tensors": 7}
    assert result.checked == expected
