"""An analysis from end to end, beside a slow oracle: the whole model with one group quantized."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed import KILLED_AT_RENAME

from ms_quant.analysis.page import check_page
from ms_quant.analysis.records import Sensitivity
from ms_quant.analysis.run import analyze
from ms_quant.data.calibration import load_tokens
from ms_quant.errors import BadArgumentError, BadFileError, JobConflictError, MsQuantError
from ms_quant.formats.opening import FloatModel, open_model
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.cache import Int8KeyValueCache
from ms_quant.models.linear_forward import QuantizedForward
from ms_quant.pipeline.quantize import quantize_checkpoint

DATA: dict[str, Any] = {"samples": 6, "seq_len": 24}
SCHEMES = ["W8A8", "W8A8_MIX", "W4A16", "C8"]
Layer = Callable[[int], Any]


class Slow:
    """The whole model on the probe, one layer after the other, in the plainest way."""

    def __init__(self, directory: Path, found: Sensitivity, calib: Path):
        self.model, probe = FloatModel(directory), found.request["probe"]
        tokens = load_tokens(calib, directory, DATA["samples"], DATA["seq_len"], 0)
        self.tokens = tokens[probe["windows"], : probe["tokens"]]
        config = self.config = self.model.config
        self.at = Positions(config, probe["tokens"])
        self.blocks = [
            BlockForward.load(config, index, self.model.tensor)
            for index in range(config.num_layers)
        ]

    def states(self, block: int = -1, linears: Any = None, cache: Any = None) -> list[np.ndarray]:
        """What enters each block, and what leaves the last one."""
        x = self.model.tensor("model.embed_tokens.weight")[self.tokens]
        states = [x]
        for index, forward in enumerate(self.blocks):
            if index == block and linears:
                forward = forward.with_linears(linears)
            held = cache if index == block and cache is not None else None
            states.append(forward.run(states[-1], self.at, held))
        return states

    def divergence(self, exact: np.ndarray, changed: np.ndarray) -> float:
        head = self.model.tensor("lm_head.weight").astype(np.float64)
        gain = self.model.tensor("model.norm.weight").astype(np.float64)
        logs = []
        for states in (exact, changed):
            wide = states.astype(np.float64)
            mean = np.square(wide).mean(axis=-1, keepdims=True)
            logits = (wide / np.sqrt(mean + self.config.rms_norm_eps) * gain) @ head.T
            logits -= logits.max(axis=-1, keepdims=True)
            logs.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
        return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean())


def relative(made: np.ndarray, exact: np.ndarray) -> float:
    shares, size = [], made.shape[-1]
    for one, other in zip(made.reshape(-1, size), exact.reshape(-1, size), strict=True):
        shares.append(sum((one - other).astype(float) ** 2) / sum(other.astype(float) ** 2))
    return float(np.mean(shares))


@pytest.fixture
def quantized(tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path) -> Callable:
    """A scheme to the checkpoint that has all groups so."""

    def make(model: Path, scheme: str, **more: Any) -> Any:
        data = {} if scheme == "W4A16" else {"calibration": calib_text, **DATA}
        output = tmp_path / f"{scheme}-{len(more)}"
        quantize_checkpoint(model, output, scheme, **data, **more)
        return open_model(output)

    return make


def test_every_measure_is_that_of_the_slow_oracle(
    tiny_model: Callable[..., Path], calib_text: Path, quantized: Callable
) -> None:
    model = tiny_model(layers=3)
    options = {"group_size": 0}
    found = analyze(model, calib_text, SCHEMES, **DATA, scheme_options=options, probe_tokens=48)
    probe = found.request["probe"]
    assert (probe["windows"], probe["tokens"]) == ([0, 3], 24)
    slow = Slow(model, found, calib_text)
    exact = slow.states()
    served = {
        "W8A8": quantized(model, "W8A8"),
        "W8A8_MIX": quantized(model, "W8A8_MIX"),
        "W4A16": quantized(model, "W4A16", scheme_options=options),
    }
    linears = [group for group in found.groups if group.name != "kv_cache"]
    assert len(linears) == 3 * 4 and len(found.groups) == 3 * 5
    for group in linears:
        assert set(group.schemes) == set(served)
        for scheme, checkpoint in served.items():
            made = {path.split(".", 3)[3]: checkpoint.linear(path) for path in group.linears}
            forward: dict[str, Any] = {p: QuantizedForward(one) for p, one in made.items()}
            _compare(slow, exact, group.block, forward, group.schemes[scheme])
            if scheme == "W8A8_MIX":
                decode = {p: lambda x, one=one: one(x, decode=True) for p, one in forward.items()}
                _compare(slow, exact, group.block, decode, group.schemes[scheme].decode)


def _compare(slow: Slow, exact: list, block: int, linears: dict, error: Any) -> None:
    changed = slow.states(block, linears)
    output, should = changed[block + 1], exact[block + 1]
    assert error.block_error == pytest.approx(relative(output, should), rel=1e-3)
    assert error.block_mse == pytest.approx(float(np.square(output - should).mean()), rel=1e-3)
    # The divergence is a difference of float32 logits: below 1e-7 it is rounding.
    loss = slow.divergence(exact[-1], changed[-1])
    assert error.loss_increase == pytest.approx(loss, rel=1e-2, abs=1e-7)
    seen: dict[str, list[np.ndarray]] = {path: [] for path in linears}
    watched = {
        path: lambda x, path=path: (seen[path].append(x), slow.blocks[block].linears[path](x))[1]
        for path in linears
    }
    slow.states(block, watched)
    made = [linears[path](seen[path][0]) for path in linears]
    plain = [slow.blocks[block].linears[path](seen[path][0]) for path in linears]
    own, right = np.concatenate(made, axis=-1), np.concatenate(plain, axis=-1)
    assert error.output_error == pytest.approx(relative(own, right), rel=1e-3)
    assert error.output_mse == pytest.approx(float(np.square(own - right).mean()), rel=1e-3)


@pytest.mark.parametrize("kind", [{"dtype": "float16"}, {"tied": True, "family": "qwen2"}])
def test_models_of_other_kinds(
    tiny_model: Callable[..., Path], calib_text: Path, kind: dict[str, Any]
) -> None:
    found = analyze(tiny_model(**kind), calib_text, ["W8A8"], **DATA)
    assert all(group.schemes["W8A8"].loss_increase > 0 for group in found.groups)


def test_a_model_that_predicts_no_tokens_is_refused(
    tiny_model: Callable[..., Path], calib_text: Path
) -> None:
    def headless(tensors: dict[str, np.ndarray]) -> None:
        del tensors["lm_head.weight"]

    model = tiny_model(change=headless, architectures=["Qwen3Model"])
    with pytest.raises(BadArgumentError, match="expected one that predicts tokens"):
        analyze(model, calib_text, ["W8A8"], **DATA)


def test_a_cache_of_int8_is_measured(
    tiny_model: Callable[..., Path], calib_text: Path, quantized: Callable
) -> None:
    model = tiny_model()
    found = analyze(model, calib_text, ["C8", "C8_DYNAMIC"], **DATA)
    slow = Slow(model, found, calib_text)
    checkpoint = quantized(model, "W8A16", kv_cache="C8", formats=["ascend"])
    exact = slow.states()
    assert [group.path for group in found.groups] == [
        f"model.layers.{index}.kv_cache" for index in range(2)
    ]
    for group in found.groups:
        for kind, scales in (("C8", checkpoint.cache_scales(group.block)), ("C8_DYNAMIC", None)):
            changed = slow.states(group.block, cache=Int8KeyValueCache(scales))
            loss = slow.divergence(exact[-1], changed[-1])
            error = group.schemes[kind]
            assert error.loss_increase == pytest.approx(loss, rel=1e-2, abs=1e-7)
            assert 0 < error.output_error < 0.01 and error.decode is None


def test_what_a_massive_first_token_does_to_others_is_seen(
    tiny_model: Callable[..., Path], calib_text: Path
) -> None:
    """One channel of down's input is massive: its group is named, and is the worst of static."""

    def massive(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][5] *= 500

    found = analyze(tiny_model(change=massive), calib_text, ["W8A8", "W8A16"], **DATA)
    worst = found.ranked("W8A8")[0]
    assert worst.path == "model.layers.0.down"
    assert worst.input is not None and worst.input.channels == (5,)
    static, plain = (worst.schemes[name].loss_increase for name in ("W8A8", "W8A16"))
    assert static > 10 * plain


KILLED = (
    KILLED_AT_RENAME
    + """
from ms_quant.analysis.run import analyze
analyze(model, calib, ["W8A8"], output=output, samples=6, seq_len=24)
"""
)


@pytest.mark.slow
def test_killed_at_renames_it_goes_on_to_the_same_file(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    package_environment: dict[str, str],
) -> None:
    """Each run gets four renames further: through job.json, hidden states, the probe and blocks."""
    model, output = tiny_model(layers=3), tmp_path / "a.json"
    whole = analyze(model, calib_text, ["W8A8"], **DATA)
    arguments = [sys.executable, "-c", KILLED, *map(str, (model, calib_text, output))]
    kills = 0
    while not output.exists():
        run = subprocess.run([*arguments, "4"], env=package_environment, capture_output=True)
        assert run.returncode in (0, -signal.SIGKILL), run.stderr.decode()
        kills += run.returncode != 0
        assert kills < 20
    assert kills >= 2
    found = Sensitivity.load(output)
    assert found.groups == whole.groups and found.request == whole.request
    assert not output.with_name("a.json.job").exists()


def test_a_finished_file_is_read_and_another_is_left(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    model, output = tiny_model(), tmp_path / "a.json"
    made = analyze(model, calib_text, ["W8A8"], output=output, **DATA)
    before = output.stat().st_mtime_ns
    assert analyze(model, calib_text, ["W8A8"], output=output, **DATA) == made
    with pytest.raises(JobConflictError, match=r"a\.json: holds another analysis: it was made"):
        analyze(model, calib_text, ["W8A16"], output=output, **DATA)
    output.write_text("{}")
    with pytest.raises(BadFileError, match="version is None"):
        analyze(model, calib_text, ["W8A8"], output=output, **DATA)
    assert before and sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "calib.txt", "model"]


@pytest.mark.parametrize(
    ("schemes", "options", "said"),
    [
        (["W9A9"], {}, "scheme 'W9A9' is unknown, expected one of W8A8, "),
        ([], {}, "no scheme is asked for, expected at least one"),
        ("W8A8", {}, "schemes is 'W8A8', expected a list of names"),
        (["W8A8", "W8A8"], {}, "W8A8, W8A8: expected each once"),
        (["W8A8_TIMESTEP"], {}, "is for networks and not for checkpoints"),
        (["W4A4_FLATQUANT_DYNAMIC"], {}, "trains each group"),
        (
            ["W8A8", "W4A16"],
            {},
            "scheme W4A16: no linear can take it, as model.layers.0.self_attn",
        ),  # of 16 and 24 inputs, in groups of 128
        (["W8A8"], {"scheme_options": {"group_size": 64}}, "no scheme of W8A8 takes group_size"),
        (["W8A8"], {"format": "none"}, "format 'none' is unknown"),
        (["W8A8"], {"dtype": "int8"}, "dtype 'int8' is not supported"),
        (["W8A8"], {"seq_len": 1}, "seq_len is 1, expected at least 2"),
    ],
)
def test_what_cannot_be_analysed_is_refused(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    schemes: Any,
    options: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(MsQuantError) as caught:
        analyze(tiny_model(), calib_text, schemes, **{**DATA, **options})
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_command_prints_tables_of_80_columns_and_makes_file_and_page(
    ms_quant_command: Callable, tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    output, page = tmp_path / "a.json", tmp_path / "a.html"
    arguments = ["analyze", tiny_model(), "-o", output, "--samples", 6, "--seq-len", 24]
    run = ms_quant_command(*arguments)
    assert run.returncode == 1 and "an analysis needs calibration data" in run.stderr
    arguments += ["--calib", calib_text, "--schemes", "W8A8,C8"]
    run = ms_quant_command(*arguments, "--plot", page, "--metric", "quantile")
    assert run.returncode == 0, run.stderr
    assert "analyzing" in run.stderr and "100%" in run.stderr
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and lines[0] == "W8A8, by group:"
    assert len(Sensitivity.load(output).groups) == 10
    content = page.read_text()
    assert "What hurts in" in content and content.count('class="sorts"') == 2
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=", content)
    run = ms_quant_command(*arguments, "--json")  # all was done before
    assert json.loads(run.stdout)["groups"][0]["name"] == "qkv"
    run = ms_quant_command(*arguments, "--metric", "loss")
    assert run.returncode == 1 and "error: metric 'loss' is unknown" in run.stderr


def test_a_file_needs_a_directory(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    model = tiny_model()
    for output in (tmp_path, tmp_path / "no" / "a.json", model / "a.json"):
        with pytest.raises(BadArgumentError, match=r"cannot be made|lies in the model directory"):
            analyze(model, calib_text, ["W8A8"], **DATA, output=output)


def test_a_page_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match="expected a file name in a directory there is"):
        check_page(tmp_path / "no" / "a.html")
