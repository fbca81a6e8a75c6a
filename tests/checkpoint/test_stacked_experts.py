"""Experts that one tensor of a layer holds: what is read of them, and what is refused.

The layout is that of transformers 5 in memory: ``gate_up_proj`` [E, 2 I, H] with the rows of gate
first, ``down_proj`` [E, H, I].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from encoded import Tensors, dequantized, edit_config, maker
from routed_models import DEEPSEEK, QWEN, save_routed

from ms_quant.errors import MsQuantError
from ms_quant.files.safetensors_file import SafetensorsFile
from ms_quant.formats.float_model import model_notes, open_float
from ms_quant.formats.inspection import inspect_checkpoint
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.pipeline.request import prepare
from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.verify.checkpoint import verify_checkpoint

Load, Save = Callable[[Path], Tensors], Callable[[Path, Tensors], None]
MLP = "model.layers.1.mlp.experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def stacked(tensors: Tensors, fused: bool = True, suffix: str = "") -> Tensors:
    """The tensors with those of all experts of a layer in one."""
    made, layers = dict(tensors), {name.split(".experts.")[0] for name in tensors if ".ex" in name}
    for layer in layers:
        count = sum(name.startswith(f"{layer}.experts.") for name in tensors) // 3
        of = {
            part: np.stack([made.pop(f"{layer}.experts.{e}.{part}.weight") for e in range(count)])
            for part in PROJECTIONS
        }
        if fused:
            of = {
                "gate_up_proj": np.concatenate([of["gate_proj"], of["up_proj"]], axis=1),
                "down_proj": of["down_proj"],
            }
        made |= {f"{layer}.experts.{part}{suffix}": array for part, array in of.items()}
    return made


@pytest.fixture
def models(tmp_path: Path, load_tensors: Load, save_tensors: Save) -> Callable[..., list[Path]]:
    """A model with a tensor for each expert, and the same with stacks."""

    def make(fused: bool = True, suffix: str = "") -> list[Path]:
        plain = save_routed(tmp_path / "plain", QWEN)
        stack = tmp_path / "stacked"
        stack.mkdir()
        (stack / "config.json").write_bytes((plain / "config.json").read_bytes())
        tensors = stacked(load_tensors(plain), fused, suffix)
        save_tensors(stack / "model.safetensors", tensors)
        return [plain, stack]

    return make


@pytest.mark.parametrize(("fused", "suffix"), [(True, ""), (False, ""), (False, ".weight")])
def test_the_output_is_that_of_the_model_with_a_tensor_for_each_expert(
    fused: bool, suffix: str, models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    written = []
    for source in models(fused, suffix):
        output = tmp_path / f"{source.name}-out"
        run_job(QuantizeOptions(source, output, "W8A8_DYNAMIC", exclude=("*.3.mlp.experts.*",)))
        found = verify_checkpoint(output, source)
        assert found.problems == () and found.made_again == found.quantized
        written.append({path.name: path.read_bytes() for path in output.glob("*.safetensors")})
    assert written[0] == written[1]


def test_a_copy_has_a_tensor_for_each_expert(
    models: Callable[..., list[Path]], tmp_path: Path, load_tensors: Load
) -> None:
    plain, stack = models()
    convert_checkpoint(stack, tmp_path / "copy", "float")
    expected, found = load_tensors(plain), load_tensors(tmp_path / "copy")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes()), name


def test_notes_and_inspect_know_them(models: Callable[..., list[Path]]) -> None:
    _, stack = models()
    assert any(
        "96 weights are stored as stacks of all experts" in note
        for note in model_notes(*open_float(stack))
    )
    rows = {row["name"]: row for row in inspect_checkpoint(stack)["linears"]}
    assert rows["model.layers.1.mlp.experts.3.up_proj"]["stored_as"] == "BF16"


def test_only_the_rows_that_are_asked_for_are_read(
    models: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stack = models()
    checkpoint, read, fill = open_float(stack).checkpoint, list[int](), SafetensorsFile._fill

    def counted(file: SafetensorsFile, buffer: np.ndarray, start: int) -> None:
        read.append(len(buffer))
        fill(file, buffer, start)

    monkeypatch.setattr(SafetensorsFile, "_fill", counted)
    checkpoint.read_float32(f"{MLP}.7.up_proj.weight")
    assert sum(read) == 32 * 64 * 2
    list(checkpoint.float_chunks(f"{MLP}.7.up_proj.weight", slice(3, 5)))
    assert sum(read) == (32 + 2) * 64 * 2


def in_fp8(tensors: Tensors, block: tuple[int, int]) -> tuple[Tensors, Tensors]:
    """Stacks in FP8 with scales for blocks of each matrix, and the floats they stand for."""
    stored, exact = {}, {}
    for name, array in stacked(tensors).items():
        stored[name] = array
        if array.ndim == 3:
            pairs = [maker.to_blocks(matrix.astype(np.float32), block) for matrix in array]
            codes, scales = (np.stack(parts) for parts in zip(*pairs, strict=True))
            stored[name] = codes.view(ml_dtypes.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
            both = zip(codes, scales, strict=True)
            exact[name] = np.stack([dequantized(c, s, block) for c, s in both])
    return stored, exact


def test_stacks_in_fp8_are_decoded_expert_by_expert(
    tmp_path: Path, load_tensors: Load, save_tensors: Save
) -> None:
    """Blocks of 24 rows: the rows of up begin inside of one."""
    source = save_routed(tmp_path / "model", DEEPSEEK)
    stored, exact = in_fp8(load_tensors(source), (24, 20))
    save_tensors(source / "model.safetensors", stored)
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 20]}
    edit_config(source, lambda raw: raw.update(quantization_config=entry))
    checkpoint = open_float(source).checkpoint
    for name, stack in exact.items():
        module, _, kind = name.rpartition(".")
        for expert, matrix in enumerate(stack):
            parts = {"gate_proj": matrix[:32], "up_proj": matrix[32:]}
            for part, expected in parts.items() if kind == "gate_up_proj" else [(kind, matrix)]:
                key = f"{module}.{expert}.{part}.weight"
                np.testing.assert_array_equal(checkpoint.read_float32(key), expected)
                assert np.float32(checkpoint.largest(key)) >= np.abs(expected).max()
    output = tmp_path / "out"
    run_job(QuantizeOptions(source, output, "W8A8_DYNAMIC"))
    assert verify_checkpoint(output, source).problems == ()


def short_stack(tensors: Tensors) -> None:
    tensors[f"{MLP}.gate_up_proj"] = tensors[f"{MLP}.gate_up_proj"][:-1]


def turned(tensors: Tensors) -> None:
    tensors[f"{MLP}.down_proj"] = tensors[f"{MLP}.down_proj"].transpose(0, 2, 1).copy()


def flat(tensors: Tensors) -> None:
    tensors[f"{MLP}.down_proj"] = tensors[f"{MLP}.down_proj"].reshape(-1, 32)


def odd(tensors: Tensors) -> None:
    tensors[f"{MLP}.gate_up_proj"] = tensors[f"{MLP}.gate_up_proj"][:, :-1].copy()


def integers(tensors: Tensors) -> None:
    tensors[f"{MLP}.down_proj"] = tensors[f"{MLP}.down_proj"].astype(np.int8)


def both_ways(tensors: Tensors) -> None:
    tensors[f"{MLP}.2.down_proj.weight"] = tensors[f"{MLP}.down_proj"][2]


def two_stacks(tensors: Tensors) -> None:
    tensors[f"{MLP}.up_proj"] = tensors[f"{MLP}.gate_up_proj"][:, 32:].copy()


WRONG: list[tuple[Callable[[Tensors], None], str]] = [
    (short_stack, r"'model\.layers\.1\.mlp\.experts\.7\.gate_proj\.weight' of shape \[32, 64\]"),
    (turned, r"experts\.0\.down_proj\.weight' in 'model\.layers\.1\.mlp\.experts\.down_proj' has"),
    (flat, r"'model\.layers\.1\.mlp\.experts\.down_proj' has shape \[512, 32\], expected three"),
    (odd, r"experts\.gate_up_proj' has shape \[8, 63, 64\], expected an even number of rows"),
    (integers, r"'model\.layers\.1\.mlp\.experts\.down_proj' has dtype I8, expected one of"),
    (both_ways, r"holds tensor 'model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight', expected"),
    (two_stacks, r"experts\.up_proj' holds '.*experts\.0\.up_proj\.weight', as does"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[c.__name__ for c, _ in WRONG])
def test_wrong_stacks_are_refused_by_name(
    change: Callable[[Tensors], None],
    message: str,
    models: Callable[..., list[Path]],
    load_tensors: Load,
    save_tensors: Save,
) -> None:
    _, stack = models()
    tensors = load_tensors(stack)
    change(tensors)
    save_tensors(stack / "model.safetensors", tensors)
    with pytest.raises(MsQuantError, match=message):
        open_float(stack)


def missing(tensors: Tensors) -> None:
    del tensors[f"{MLP}.5.up_proj.weight"]


def smaller(tensors: Tensors) -> None:
    tensors[f"{MLP}.5.up_proj.weight"] = tensors[f"{MLP}.5.up_proj.weight"][:-1]


def one_more(tensors: Tensors) -> None:
    tensors[f"{MLP}.8.up_proj.weight"] = tensors[f"{MLP}.5.up_proj.weight"].copy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"1 of \d+ tensors are missing, expected 'model.*experts\.5\.up_proj\.weight'"),
        (smaller, r"experts\.5\.up_proj\.weight' has shape \[31, 64\], expected \[32, 64\]"),
        (one_more, r"experts\.8\.up_proj\.weight' is not a tensor of a qwen3_moe model"),
    ],
)
def test_an_expert_that_is_not_like_the_others_is_refused_before_work(
    change: Callable[[Tensors], None],
    message: str,
    tmp_path: Path,
    load_tensors: Load,
    save_tensors: Save,
) -> None:
    source = save_routed(tmp_path / "model", QWEN)
    tensors = load_tensors(source)
    change(tensors)
    save_tensors(source / "model.safetensors", tensors)
    with pytest.raises(MsQuantError, match=message):
        prepare(QuantizeOptions(source, tmp_path / "out", "W8A8_DYNAMIC"))


def test_nan_in_a_stack_is_refused_before_work(
    models: Callable[..., list[Path]], load_tensors: Load, save_tensors: Save, tmp_path: Path
) -> None:
    _, stack = models()
    tensors = load_tensors(stack)
    tensors[f"{MLP}.down_proj"][6, 2, 3] = np.nan
    save_tensors(stack / "model.safetensors", tensors)
    with pytest.raises(MsQuantError, match=rf"'{MLP}.down_proj' holds 1 NaN"):
        run_job(QuantizeOptions(stack, tmp_path / "out", "W8A8_DYNAMIC"))
    with pytest.raises(MsQuantError, match=r"holds 1 NaN or infinite values of 2048 of expert 6"):
        open_float(stack).checkpoint.read_float32(f"{MLP}.6.down_proj.weight")
    assert json.loads((stack / "config.json").read_text())["num_experts"] == 8
