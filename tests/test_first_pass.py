"""Jobs and the pass over their source: NaN is found first, two sources are never mixed."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.cli.console import naming_leftovers, run
from ms_quant.cli.main import app
from ms_quant.errors import MsQuantError
from ms_quant.files import first_pass, reader
from ms_quant.files.reader import Checkpoint, fingerprint
from ms_quant.pipeline import run as pipeline
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job

LAST = "model.layers.2.mlp.down_proj.weight"
LARGE = {"layers": 3, "hidden_size": 256, "intermediate_size": 512}  # more than the samples cover


@pytest.fixture
def options(tmp_path: Path, calib_text: Path) -> Callable[..., QuantizeOptions]:
    def make(model: Path, scheme: str = "W8A8_DYNAMIC", **changes: Any) -> QuantizeOptions:
        data = {"calib": calib_text, "samples": 2, "seq_len": 8} if scheme == "W8A8" else {}
        return QuantizeOptions(model, tmp_path / "out", scheme, **{**data, **changes})

    return make


def put(model: Path, name: str, value: float) -> None:
    """One value in the middle of a tensor; the file's time is set back."""
    file = Checkpoint(model).file_of(name)
    status = file.path.stat()
    array = file.read(name)
    array.reshape(-1)[array.size // 2 + 5] = value
    with file.path.open("r+b") as opened:
        opened.seek(file.info(name).start)
        opened.write(array.tobytes())
    os.utime(file.path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("W8A8_DYNAMIC", {}),
        ("W8A8", {}),
        ("W8A8", {"formats": ("golden-stick", "ascend")}),
        ("W8A8_DYNAMIC", {"algorithm": "quarot"}),
    ],
)
def test_nan_in_the_last_block_is_found_before_any_block(
    scheme: str,
    changes: dict[str, Any],
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(layers=3, head_dim=8)
    good = Checkpoint(model).read(LAST)
    put(model, LAST, np.nan)
    worked = []
    wanted = options(model, scheme, **changes)
    with pytest.raises(MsQuantError, match=f"'{LAST}' holds 1 NaN or infinite values"):
        run_job(wanted, lambda index, part: worked.append(index))
    assert worked == [] and not wanted.output.exists() and not wanted.job_directory.exists()
    assert not list(wanted.output.parent.glob("*.partial"))
    put(model, LAST, float(good.reshape(-1)[good.size // 2 + 5]))  # repaired
    run_job(wanted)
    assert wanted.output.exists()


class StopError(Exception):
    pass


def stop(index: int, part: float) -> None:
    if index == 1 and part:
        raise StopError


@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "W8A8"])
def test_a_value_changed_between_two_samples_is_not_mixed_in(
    scheme: str, tiny_model: Callable[..., Path], options: Callable[..., QuantizeOptions]
) -> None:
    model = tiny_model(**LARGE)
    wanted = options(model, scheme)
    with pytest.raises(StopError):
        run_job(wanted, stop)
    before = fingerprint(Checkpoint(model))
    put(model, LAST, 0.125)
    assert fingerprint(Checkpoint(model)) == before
    with pytest.raises(MsQuantError, match=f"'{LAST}' changed since the job was begun"):
        run_job(wanted)
    assert wanted.job_directory.exists() and not wanted.output.exists()


def test_a_change_that_no_clock_shows_is_refused_where_it_is_read(
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(first_pass, "file_stamp", lambda path: [0])
    monkeypatch.setattr(reader, "file_stamp", lambda path: [0])
    model = tiny_model(**LARGE)
    wanted = options(model)
    with pytest.raises(StopError):
        run_job(wanted, stop)
    put(model, LAST, 0.125)
    with pytest.raises(MsQuantError, match=f"'{LAST}' changed since the job was begun"):
        run_job(wanted)
    assert not wanted.output.exists()


def test_a_resumed_job_does_not_read_its_source_twice(
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = options(tiny_model(layers=3))
    with pytest.raises(StopError):
        run_job(wanted, stop)
    read = first_pass.tensor_digest
    monkeypatch.setattr(first_pass, "tensor_digest", lambda *one: pytest.fail("read again"))
    run_job(wanted)
    monkeypatch.setattr(first_pass, "tensor_digest", read)
    whole = dataclasses.replace(wanted, output=wanted.output.with_name("whole"))
    run_job(whole)
    for path in whole.output.iterdir():
        assert path.read_bytes() == (wanted.output / path.name).read_bytes()


def test_a_dry_run_reads_headers_alone(
    tiny_model: Callable[..., Path],
    options: Callable[..., QuantizeOptions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(layers=3)
    put(model, LAST, np.nan)
    monkeypatch.setattr(pipeline, "read_source", lambda *one: pytest.fail("read"))
    wanted = options(model)
    assert not prepare(wanted).checkpoint.digests and not wanted.job_directory.exists()


def test_what_stays_after_a_refusal_is_named(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model(layers=3)
    out = tmp_path / "out"
    arguments = ["quantize", model, "-o", out, "--scheme", "W8A8_DYNAMIC"]
    (tmp_path / "out.job").mkdir()
    (tmp_path / "out.job" / "mine.txt").write_text("")
    (tmp_path / "out.partial").mkdir()
    monkeypatch.setattr(sys, "argv", ["ms-quant", *map(str, arguments)])
    with pytest.raises(SystemExit, match="1"):
        run(app)
    errors = capsys.readouterr().err
    assert "exists but holds no job" in errors
    assert (
        f"note: {out}.job and {out}.partial stay: the command that began them goes on where it "
        "stopped; delete them to start again"
    ) in errors


def test_nothing_is_named_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MsQuantError), naming_leftovers(tmp_path / "out"):
        raise MsQuantError("x")
    assert capsys.readouterr().err == ""
    for name in ("out.job", "out.job.measure", "out/a.partial"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), naming_leftovers(tmp_path / "out", None, ["a", "b"]):
        raise KeyboardInterrupt
    told = capsys.readouterr().err
    assert all(
        str(tmp_path / name) in told for name in ("out.job ", "out.job.measure", "out/a.partial")
    )
