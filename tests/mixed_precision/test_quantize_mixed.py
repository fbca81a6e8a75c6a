"""Automatic mixed precision from end to end."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from killed import KILLED_AT_RENAME

from ms_quant.analysis.run import analyze
from ms_quant.data.calibration import eval_windows
from ms_quant.errors import MsQuantError
from ms_quant.evaluation.comparison import compare
from ms_quant.mixed_precision.run import MixedResult, quantize_mixed
from ms_quant.pipeline.quantize import quantize_checkpoint
from ms_quant.verify.checkpoint import verify_checkpoint

ROOT = Path(__file__).parent.parent.parent
MODEL, TEXT = ROOT / "models" / "stdlib-qwen3-6m", ROOT / "models" / "text"
DATA: dict[str, Any] = {"samples": 8, "seq_len": 64}
TINY: dict[str, Any] = {"samples": 6, "seq_len": 24}
TENSORS = "quant-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with outlier channels in every norm."""
    made = tmp_path_factory.mktemp("model") / "twin"
    runpy.run_path(str(ROOT / "tools" / "inject_outliers.py"))["inject"](MODEL, made)
    return made


def make(model: Path, output: Path, choose: list[str], **more: Any) -> MixedResult:
    more = {"calibration": TEXT / "calibration.txt", **DATA, **more}
    return quantize_mixed(model, output, choose, **more)


@pytest.mark.slow
def test_a_budget_is_met_and_measured_and_the_recipe_makes_it_again(
    twin: Path, tmp_path: Path
) -> None:
    heldout = TEXT / "heldout.txt"
    made = make(twin, tmp_path / "out", ["W8A8", "FLOAT"], max_ppl_increase=0.01, heldout=heldout)
    assert 1 <= made.groups["FLOAT"] <= 6
    assert made.perplexity_increase is not None and made.perplexity_increase <= 0.01
    tokens = eval_windows(heldout, twin, DATA["seq_len"], DATA["samples"])
    measured = compare(tmp_path / "out", twin, tokens)
    assert made.perplexity_increase == pytest.approx(measured.perplexity_increase, abs=1e-5)
    assert made.perplexity_increase_error == pytest.approx(
        measured.perplexity_increase_error, rel=1e-3
    )
    assert len(made.moved) == made.groups["FLOAT"] and "is FLOAT, as W8A8" in made.moved[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.recipe.yaml"]
    quantize_checkpoint(twin, tmp_path / "again", recipe=made.recipe)
    for name in (TENSORS, "quantization_description.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not verify_checkpoint(tmp_path / "out", source=twin).problems


@pytest.mark.slow
def test_phases_are_measured_apart_and_pdmix_gives_up_less(twin: Path, tmp_path: Path) -> None:
    shared = {"max_ppl_increase": 0.015, "format": "ascend", "heldout": TEXT / "heldout.txt"}
    shared["samples"] = windows = 32
    mixed = make(twin, tmp_path / "mix", ["W8A8_MIX", "W8A8_DYNAMIC", "FLOAT"], **shared)
    assert mixed.groups["W8A8_MIX"] >= 3 and mixed.groups.get("FLOAT", 0) <= 1
    tokens = eval_windows(TEXT / "heldout.txt", twin, DATA["seq_len"], windows)
    phases = [
        compare(tmp_path / "mix", twin, tokens, decode=decode).perplexity_increase
        for decode in (False, True)
    ]
    record = yaml.safe_load(mixed.recipe.read_text())["made"]
    measured = phases[record["phase"] == "decode"]
    assert mixed.perplexity_increase == pytest.approx(measured, abs=1e-5)
    assert max(phases) <= 0.015


@pytest.mark.slow
def test_a_size_is_kept(twin: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheme_options": {"group_size": 64}, "format": "compressed-tensors"}
    made = make(twin, tmp_path / "out", ["W4A16", "W8A16"], target_bits=6.0, **options)
    assert 5.8 < made.bits <= 6.0 and set(made.groups) == {"W4A16", "W8A16"}
    assert made.perplexity_increase is not None  # it is told, too
    quantize_checkpoint(twin, tmp_path / "again", recipe=made.recipe)
    assert not verify_checkpoint(tmp_path / "again", source=twin).problems


def test_bits_are_those_of_the_files(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
) -> None:
    model = tiny_model()
    made = quantize_mixed(
        model, tmp_path / "out", ["W8A8", "FLOAT"], calibration=calib_text, target_bits=15, **TINY
    )
    linear = {
        name: array
        for name, array in load_tensors(tmp_path / "out").items()
        if ".layers." in name and "norm" not in name
    }
    weights = sum(array.size for name, array in linear.items() if name.endswith(".weight"))
    stored = sum(array.nbytes for array in linear.values())
    assert made.bits == pytest.approx(8 * stored / weights) and made.bits <= 15


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_token_are_those_of_the_files(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
    tied: bool,
) -> None:
    """Of the embedding a row, and all of it where it is the head."""
    asked = partial(
        quantize_mixed,
        tiny_model(tied=tied),
        choose=["W8A8", "FLOAT"],
        calibration=calib_text,
        **TINY,
    )
    some = asked(tmp_path / "bits", target_bits=15)
    tensors = load_tensors(tmp_path / "bits")
    embedding = tensors["model.embed_tokens.weight"]
    assert ("lm_head.weight" in tensors) != tied
    read = sum(array.nbytes for array in tensors.values())
    read += embedding[0].nbytes if tied else -embedding[1:].nbytes
    assert some.bytes_per_token == read == some.as_json()["bytes_per_token"]
    assert set(some.groups) == {"W8A8", "FLOAT"}
    same = asked(tmp_path / "bytes", target_bytes_per_token=read + 1)
    assert same.groups == some.groups and same.bytes_per_token == read
    assert yaml.safe_load(same.recipe.read_text())["made"]["bytes_per_token"] == read
    less = asked(tmp_path / "less", target_bytes_per_token=read - 1)
    assert less.bytes_per_token is not None and less.bytes_per_token < read


def test_bytes_of_a_token_count_the_head_that_a_rotation_unties(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
) -> None:
    model = tiny_model(tied=True, head_dim=8)
    options: dict[str, Any] = {"calibration": calib_text, "target_bits": 15, **TINY}
    made = quantize_mixed(
        model, tmp_path / "out", ["W8A8", "FLOAT"], algorithm="quarot+smoothquant", **options
    )
    tensors = load_tensors(tmp_path / "out")
    read = sum(array.nbytes for array in tensors.values())
    read -= tensors["model.embed_tokens.weight"][1:].nbytes
    assert "lm_head.weight" in tensors and made.bytes_per_token == read


def test_a_second_call_only_says_so_and_another_is_refused(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    def again(**more: Any) -> MixedResult:
        options = {"target_bits": 15, **TINY, **more}
        return quantize_mixed(
            model, tmp_path / "out", ["W8A8", "FLOAT"], calibration=calib_text, **options
        )

    model = tiny_model()
    made = again()
    after = again()
    assert after.result.outputs[0].finished_before and after.groups == made.groups
    assert after.moved == made.moved
    with pytest.raises(MsQuantError, match="is the recipe of another request"):
        again(target_bits=15.5)
    with pytest.raises(MsQuantError, match="is the recipe of another request"):
        again(seed=1)
    made.recipe.unlink()
    with pytest.raises(MsQuantError, match=r"exists without the recipe out\.recipe\.yaml"):
        again()


def test_a_recipe_with_another_history_is_refused(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"calibration": calib_text, "target_bits": 15, **TINY}
    again = partial(quantize_mixed, tiny_model(), tmp_path / "out", ["W8A8", "FLOAT"], **options)
    made = again()
    text = made.recipe.read_text()
    for key, value, said in (
        ("groups", 3, "groups is 3"),
        ("groups", {"W8A8": "many"}, "groups.W8A8 is 'many'"),
        ("moved", "nothing", "moved is 'nothing'"),
        ("bits_per_weight", None, "bits_per_weight is missing"),
    ):
        recipe = yaml.safe_load(text)
        recipe["made"].pop(key)
        recipe["made"] |= {} if value is None else {key: value}
        made.recipe.write_text(yaml.safe_dump(recipe))
        with pytest.raises(MsQuantError) as caught:
            again()
        assert f"out.recipe.yaml: made.{said}, expected what this command" in str(caught.value)
    made.recipe.write_text(text)
    assert again().groups == made.groups


KILLED = (
    KILLED_AT_RENAME
    + """
from ms_quant.mixed_precision.run import quantize_mixed
quantize_mixed(model, output, ["W8A8", "FLOAT"], calibration=calib, target_bits=15, samples=6,
               seq_len=24)
"""
)


@pytest.mark.slow
def test_killed_at_renames_it_goes_on_to_the_same_bytes(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    package_environment: dict[str, str],
    file_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    model, output = tiny_model(), tmp_path / "killed"
    options: dict[str, Any] = {"calibration": calib_text, "target_bits": 15, **TINY}
    whole = quantize_mixed(model, tmp_path / "whole", ["W8A8", "FLOAT"], **options)
    arguments = [sys.executable, "-c", KILLED, *map(str, (model, calib_text, output))]
    kills = 0
    while not output.exists() or output.with_name("killed.job").exists():
        run = subprocess.run([*arguments, "12"], env=package_environment, capture_output=True)
        assert run.returncode in (0, -signal.SIGKILL), run.stderr.decode()
        kills += run.returncode != 0
        assert kills < 20
    assert kills >= 2
    assert file_contents(output) == file_contents(tmp_path / "whole")
    text = output.with_name("killed.recipe.yaml").read_text()
    assert text.replace("killed.recipe", "whole.recipe") == whole.recipe.read_text()


def test_an_analysis_is_taken_back(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    model, path = tiny_model(), tmp_path / "hurts.json"
    analyze(model, calib_text, ["W8A8", "W8A8_DYNAMIC"], output=path, **TINY)
    options: dict[str, Any] = {"calibration": calib_text, "sensitivity": path, **TINY}
    made = quantize_mixed(model, tmp_path / "out", ["W8A8", "FLOAT"], target_bits=15, **options)
    assert made.bits <= 15
    other = tiny_model("other", seed=5)
    with pytest.raises(MsQuantError, match="the analysis is of another model"):
        quantize_mixed(other, tmp_path / "no", ["W8A8", "FLOAT"], target_bits=15, **options)
    with pytest.raises(MsQuantError, match="has no scheme W8A16, expected an analysis of W8A16"):
        quantize_mixed(model, tmp_path / "no", ["W8A16", "FLOAT"], target_bits=15, **options)


def test_what_is_excluded_stays_float(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    made = quantize_mixed(
        tiny_model(),
        tmp_path / "out",
        ["W8A8", "W8A16"],
        calibration=calib_text,
        target_bits=15,
        exclude=["*.0.*down_proj"],
        **TINY,
    )
    assert "model.layers.0.mlp.down_proj" in made.result.outputs[0].float_linears


@pytest.mark.parametrize(
    ("choose", "options", "said"),
    [
        (
            ["W8A8", "FLOAT"],
            {},
            "choosing schemes needs a goal, expected one of --max-ppl-increase",
        ),
        (
            ["W8A8", "FLOAT"],
            {"target_bits": 9, "max_ppl_increase": 0.01},
            "choosing schemes has one goal, and several are given, expected one of "
            "--max-ppl-increase, --target-bits and --target-bytes-per-token",
        ),
        (
            ["W8A8", "FLOAT"],
            {"target_bits": 9, "target_bytes_per_token": 10**6},
            "has one goal, and several are given",
        ),
        (
            ["W8A8", "FLOAT"],
            {"target_bytes_per_token": 1000},
            "target bytes per token 1,000 cannot be reached: the smallest that W8A8, FLOAT read, "
            "scales, norms and the head included, is ",
        ),
        (["W8A8", "FLOAT"], {"target_bytes_per_token": 0}, "is 0, expected 1 or more"),
        (["W8A8", "FLOAT"], {"target_bytes_per_token": 10**9}, "every linear may stay float"),
        (["W8A8"], {"target_bits": 9}, "choose is W8A8, expected two names or more, each once"),
        (["W8A8", "W8A8"], {"target_bits": 9}, "each once"),
        (["W8A8", "W9A9"], {"target_bits": 9}, "scheme 'W9A9' is unknown, expected one of W8A8"),
        ("W8A8", {"target_bits": 9}, "choose is 'W8A8', expected a list of names"),
        (["W8A8", "FLOAT"], {"target_bits": 0.5}, "target bits is 0.5, expected 1 to 16"),
        (["W8A8", "FLOAT"], {"target_bits": 8}, "target bits 8 cannot be reached: the smallest"),
        (["W8A8", "FLOAT"], {"target_bits": 16}, "every linear may stay float"),
        (["W8A8", "FLOAT"], {"max_ppl_increase": 2.0}, "max ppl increase is 2.0, expected a share"),
        (
            ["W8A8", "W4A4_MXFP4_SVD"],
            {"target_bits": 9},
            "no runtime serves ascend checkpoints of W8A8, W4A4_MXFP4_SVD together",
        ),
        (
            ["W4A16", "W8A8"],
            {"target_bits": 9, "format": "golden-stick"},
            "no golden-stick checkpoint can hold it",
        ),
        (
            ["W8A16", "FLOAT"],
            {"target_bits": 9, "algorithm": "smoothquant"},
            "algorithm smoothquant suits no scheme of W8A16",
        ),
        (
            ["W8A8", "FLOAT"],
            {"target_bits": 9, "algorithm": "magic"},
            "algorithm 'magic' is unknown",
        ),
        (["W8A8", "FLOAT"], {"target_bits": 9, "exclude": ["*.7.*"]}, "matches no linear"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    choose: Any,
    options: dict[str, Any],
    said: str,
) -> None:
    more = {**TINY, **options}
    with pytest.raises(MsQuantError) as caught:
        quantize_mixed(tiny_model(), tmp_path / "out", choose, calibration=calib_text, **more)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.recipe.yaml").exists()


@pytest.mark.slow
def test_a_budget_that_nothing_meets(twin: Path, tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match=r"cannot be reached with W4A4_DYNAMIC, W4A4_MXFP4: "):
        make(
            twin,
            tmp_path / "out",
            ["W4A4_DYNAMIC", "W4A4_MXFP4"],
            max_ppl_increase=1e-5,
            heldout=TEXT / "heldout.txt",
        )


@pytest.mark.slow
def test_the_command(
    ms_quant_command: Callable, tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    arguments = ["quantize", tiny_model(), "-o", tmp_path / "out", "--samples", 6]
    arguments += ["--seq-len", 24, "--calib", calib_text, "--target-bits", 15]
    run = ms_quant_command(*arguments, "--choose", "W8A8,FLOAT", "--scheme", "W8A8")
    assert run.returncode == 1 and "--choose says which schemes there are" in run.stderr
    run = ms_quant_command(*arguments, "--dry-run", "--json")
    assert run.returncode == 0, run.stderr
    plan = json.loads(run.stdout)
    assert plan["choose"] == ["W8A8", "FLOAT"] and plan["groups"] == 8
    assert plan["least_bits_per_weight"] < 15 < plan["most_bits_per_weight"]
    assert plan["least_bytes_per_token"] < plan["most_bytes_per_token"]
    run = ms_quant_command(*arguments[:-2], "--target-bytes-per-token", "100 parsecs")
    assert run.returncode == 1 and run.stderr.strip().endswith(
        "target bytes per token is '100 parsecs', expected a size such as 100MB, 1.5GiB or 250000"
    )
    run = ms_quant_command(*arguments[:-2], "--target-bytes-per-token", "1kB")
    assert run.returncode == 1 and "per token 1,000 cannot be reached" in run.stderr
    assert not (tmp_path / "out.job").exists()
    run = ms_quant_command(*arguments, "--json")  # --scheme is W8A8 where nothing else is said
    assert run.returncode == 0, run.stderr
    assert " is FLOAT, as W8A8 of it alone costs about" in run.stderr
    found = json.loads(run.stdout)
    assert found["bits_per_weight"] <= 15 and set(found["groups"]) == {"W8A8", "FLOAT"}
    shutil.rmtree(tmp_path / "out")
    again = ["quantize", tmp_path / "model", "--recipe", found["recipe"], "-o", tmp_path / "out"]
    run = ms_quant_command(*again)
    assert run.returncode == 0, run.stderr
