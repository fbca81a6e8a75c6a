"""What stops a job: bad models, bad data, full disks; one sentence each, and no output."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files import atomic
from ms_quant.files.atomic import Sink, disk_errors
from ms_quant.job.directory import JobDirectory
from ms_quant.job.states import HiddenStates
from ms_quant.pipeline import request
from ms_quant.pipeline.request import needed_bytes
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job

pytestmark = pytest.mark.usefixtures("blocking_mindspore")

Tensors = dict[str, np.ndarray]
UP = "model.layers.1.mlp.up_proj.weight"
SOURCE_CHANGED = (
    r"out\.job: the source model changed since it was begun \(model\.safetensors differs\); "
    "delete the directory to start again"
)


@pytest.fixture
def options(tmp_path: Path, calib_text: Path) -> Callable[..., QuantizeOptions]:
    def make(model: Path, **changes: Any) -> QuantizeOptions:
        wanted = {"calib": calib_text, "samples": 2, "seq_len": 8}
        if changes.get("scheme") == "W8A8_DYNAMIC":
            wanted = {}
        choices = {**wanted, "shard_bytes": 9000, **changes}
        return QuantizeOptions(model, tmp_path / "out", **choices)

    return make


def put(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[-1] = value

    return change


@pytest.mark.parametrize(
    "name",
    [
        UP,
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_and_infinite_weights_are_refused_by_name(
    name: str,
    scheme: str,
    value: float,
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
) -> None:
    wanted = options(tiny_model(family="qwen2", change=put(name, value)), scheme=scheme)
    with pytest.raises(MsQuantError, match=f"{name}' holds 1 NaN or infinite values of"):
        run_job(wanted)
    assert not wanted.output.exists()


def test_nan_in_a_row_that_calibration_reads(
    tiny_model: Callable[..., Path], options: Callable[..., QuantizeOptions]
) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][:] = np.nan

    wanted = options(tiny_model(change=change))
    with pytest.raises(MsQuantError, match=r"'model\.embed_tokens\.weight' holds "):
        run_job(wanted)


def test_a_model_that_overflows_is_refused_by_the_linears_name(
    tiny_model: Callable[..., Path], options: Callable[..., QuantizeOptions]
) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][:] = 1e38

    wanted = options(tiny_model(dtype="float32", change=change), algorithm="smoothquant")
    with pytest.raises(MsQuantError, match=r"layers\.0: mlp\.up_proj output holds NaN or inf"):
        run_job(wanted)


def damage_missing_shard(model: Path) -> str:
    (model / "model-00002-of-00002.safetensors").unlink()
    return r"model-00002-of-00002\.safetensors: no such file, expected as .*index\.json names it"


def damage_truncated(model: Path) -> str:
    path = model / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return r"model-00001-of-00002\.safetensors: "


def damage_type(model: Path) -> str:
    edit_config(model, model_type="mamba")
    known = "deepseek_v3, glm4, internlm3, kimi_k2"
    return rf"config\.json: model_type 'mamba' is not supported, expected one of {known}"


def damage_shape(model: Path) -> str:
    edit_config(model, intermediate_size=32)
    return r"mlp\.down_proj\.weight' has shape \[16, 24\], expected \[16, 32\]"


def damage_layers(model: Path) -> str:
    edit_config(model, num_hidden_layers=3)
    return r"tensors are missing, expected 'model\.layers\.2\.input_layernorm\.weight' of shape"


def damage_no_config(model: Path) -> str:
    (model / "config.json").unlink()
    return r"config\.json: no such file"


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing_shard,
        damage_truncated,
        damage_type,
        damage_shape,
        damage_layers,
        damage_no_config,
    ],
)
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_a_damaged_model_is_refused_before_any_work(
    damage: Callable[[Path], str],
    scheme: str,
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    tmp_path: Path,
) -> None:
    model = tiny_model(shards=2)
    message = damage(model)
    with pytest.raises(MsQuantError, match=message):
        run_job(options(model, scheme=scheme))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calib": None}, "scheme W8A8 needs calibration data, expected --calib FILE"),
        ({"seq_len": 100_000}, r"calib\.txt: \d+ tokens, expected at least 100000"),
        ({"samples": 0}, "samples is 0, expected a positive number"),
        ({"scheme": "W2A2"}, "scheme 'W2A2' is unknown, expected one of W8A8, W8A8_DYNAMIC"),
        ({"algorithm": "magic"}, "algorithm 'magic' is unknown, expected one of minmax"),
        ({"algorithm": "osl", "scheme": "W8A16"}, "'osl' does not work with scheme"),
        (
            {"algorithm": "smoothquant", "algorithm_options": {"alpha": 1.5}},
            r"smoothquant\.alpha is 1\.5: Input should be",
        ),
        ({"dtype": "float64"}, "dtype 'float64' is not supported"),
        ({"exclude": ("*.experts.*",)}, r"pattern '\*\.experts\.\*' matches no linear"),
        ({"exclude": ("*",)}, "every linear stays float, nothing is left"),
        ({"output": Path()}, "the output has no name"),
        ({"output": Path("/")}, "the output has no name"),
    ],
)
def test_requests_that_cannot_be_served(
    changes: dict,
    message: str,
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    tmp_path: Path,
) -> None:
    model = tiny_model(layers=1)
    wanted = QuantizeOptions(**{**vars(options(model)), **changes})
    with pytest.raises(MsQuantError, match=message):
        run_job(wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "model"]


def test_empty_calibration_file(
    tiny_model: Callable[..., Path], options: Callable[..., QuantizeOptions], calib_text: Path
) -> None:
    calib_text.write_text("")
    wanted = options(tiny_model())
    with pytest.raises(MsQuantError, match=r"calib\.txt: 0 bytes, expected between 1 and"):
        run_job(wanted)
    assert not wanted.output.exists() and not wanted.job_directory.exists()


def test_what_float16_cannot_hold_is_refused(
    tiny_model: Callable[..., Path], options: Callable[..., QuantizeOptions]
) -> None:
    model = tiny_model(dtype="float32", change=put("model.norm.weight", 1e6))
    wanted = options(model, dtype="float16", scheme="W8A8_DYNAMIC")
    with pytest.raises(MsQuantError, match=r"model\.norm\.weight': 1e\+06 does not fit float16"):
        run_job(wanted)
    assert not wanted.output.exists()


def test_output_that_exists_with_other_content(
    tiny_model: Callable[..., Path], options: Callable[..., QuantizeOptions]
) -> None:
    model = tiny_model(layers=1)
    taken = model.with_name("taken")
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    for output in (taken, taken / "thesis.tex"):
        wanted = QuantizeOptions(**{**vars(options(model)), "output": output})
        with pytest.raises(MsQuantError, match=f"{output.name}: exists "):
            prepare(wanted)
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]


def interrupt(wanted: QuantizeOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a job when its first block is finished."""
    finish = JobDirectory.finish_block

    def stop(*arguments: Any) -> None:
        finish(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JobDirectory, "finish_block", stop)
        with pytest.raises(KeyboardInterrupt):
            run_job(wanted)


def test_another_calibration_text_of_equal_size_is_refused_on_resume(
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    calib_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = options(tiny_model())
    interrupt(wanted, monkeypatch)
    text = calib_text.read_text()
    calib_text.write_text(text.swapcase())
    with pytest.raises(MsQuantError, match=r"calibration tokens changed since it was begun; fin"):
        run_job(wanted)
    calib_text.write_text(text)
    assert not run_job(wanted).finished_before


def test_another_model_is_refused_on_resume(
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    monkeypatch: pytest.MonkeyPatch,
    save_tensors: Callable[[Path, Tensors], None],
    load_tensors: Callable[[Path], Tensors],
) -> None:
    model = tiny_model()
    wanted = options(model, scheme="W8A8_DYNAMIC")
    interrupt(wanted, monkeypatch)
    tensors = load_tensors(model)
    tensors[UP] *= 2
    save_tensors(model / "model.safetensors", tensors)
    with pytest.raises(MsQuantError, match=SOURCE_CHANGED):
        run_job(wanted)


def test_other_versions_are_refused_unless_the_user_says_so(
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = options(tiny_model())
    interrupt(wanted, monkeypatch)
    monkeypatch.setattr(request, "environment", lambda *_: {"threads": 4096})
    with pytest.raises(MsQuantError, match=r"environment\..* --any-environment"):
        run_job(wanted)
    wanted = QuantizeOptions(**{**vars(wanted), "any_environment": True})
    assert not run_job(wanted).finished_before
    monkeypatch.undo()
    assert run_job(wanted).finished_before


def test_too_little_space_is_said_before_any_work(
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    wanted = options(tiny_model())
    needed = needed_bytes(prepare(wanted))
    usage = namedtuple("usage", "total free")(1000, 100)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MsQuantError, match=f"100 bytes are free, expected at least {needed}"):
        run_job(wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "model"]


class Disk:
    """Counts what goes to disk, and is full at the n-th time."""

    def __init__(self, full_at: int | None):
        self.full_at, self.calls = full_at, 0

    def use(self) -> None:
        self.calls += 1
        if self.calls == self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def disk(monkeypatch: pytest.MonkeyPatch, full_at: int | None = None) -> Iterator[Disk]:
    counter, write, append, fsync = Disk(full_at), Sink.write, HiddenStates.append, os.fsync

    def limited_write(sink: Sink, data: bytes, what: str = "the file") -> None:
        with disk_errors(sink.path, what):
            counter.use()
        write(sink, data, what)

    def limited_append(hidden: HiddenStates, rows: np.ndarray) -> None:
        with disk_errors(hidden.path, "hidden states"):
            counter.use()
        append(hidden, rows)

    def limited_fsync(descriptor: int) -> None:
        counter.use()
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(Sink, "write", limited_write)
        patch.setattr(HiddenStates, "append", limited_append)
        patch.setattr(os, "fsync", limited_fsync)
        yield counter


@pytest.mark.parametrize(("scheme", "step"), [("W8A8", 5), ("W8A8_DYNAMIC", 3)])
def test_a_disk_that_fills_up_leaves_no_output_and_the_job_resumes(
    scheme: str,
    step: int,
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    monkeypatch: pytest.MonkeyPatch,
    file_contents: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    wanted = options(tiny_model(), scheme=scheme)
    with disk(monkeypatch) as counter:
        run_job(wanted)
    expected, total = file_contents(wanted.output), counter.calls
    assert total > 100
    # The last one, after the final rename, is the only one with an output.
    for full_at in [*range(1, total - 1, step), total - 1, total]:
        shutil.rmtree(wanted.output)
        with disk(monkeypatch, full_at), pytest.raises(MsQuantError, match="no space left on dev"):
            run_job(wanted)
        assert wanted.output.exists() == (full_at == total)
        run_job(wanted)
        assert file_contents(wanted.output) == expected, full_at
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["calib.txt", "model", "out"], full_at
