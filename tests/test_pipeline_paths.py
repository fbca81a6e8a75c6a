"""Where jobs read and write: directories apart, space, one process, and nothing of the user's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files import atomic
from ms_quant.job.directory import JobDirectory
from ms_quant.pipeline import request
from ms_quant.pipeline.request import needed_bytes
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job


@pytest.fixture
def wanted(tiny_model: Callable[..., Path], tmp_path: Path) -> QuantizeOptions:
    return QuantizeOptions(tiny_model(), tmp_path / "out", "W8A8_DYNAMIC")


def stop_after(blocks: int, wanted: QuantizeOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts a job when some blocks are finished."""
    finish = JobDirectory.finish_block

    def stop(job: JobDirectory, index: int, *rest: Any) -> None:
        finish(job, index, *rest)
        if index + 1 == blocks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JobDirectory, "finish_block", stop)
        with pytest.raises(KeyboardInterrupt):
            run_job(wanted)


@pytest.mark.parametrize(
    ("output", "job", "message"),
    [
        ("model", None, "model: the output directory is the model directory"),
        ("model/out", None, "out: the output directory lies in the model directory"),
        ("model/../model", None, "model: the output directory is the model directory"),
        ("link", None, "link: the output directory is the model directory"),
        ("home", None, "home: the output directory contains the model directory"),
        ("out", "out", "out: the job directory is the output directory"),
        ("out", "out/job", "job: the job directory lies in the output directory"),
        ("out", "out.partial", "out.partial: the job directory is the output in progress dir"),
        ("out", "out.partial/x", "x: the job directory lies in the output in progress dir"),
        ("work/out", "work", "work: the job directory contains the output directory"),
        ("out", "model", "model: the job directory is the model directory"),
        ("out", "model/job", "job: the job directory lies in the model directory"),
        ("mod", "home", "home: the job directory contains the model directory"),
    ],
)
def test_directories_that_overlap_are_refused(
    output: str, job: str | None, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model()
    (tmp_path / "link").symlink_to(model)
    if "home" in (output, job):
        (tmp_path / "home").mkdir()
        model = Path(shutil.move(model, tmp_path / "home" / "model"))
    before = sorted(tmp_path.rglob("*"))
    paths = {"output": tmp_path / output, "job": job and tmp_path / job}
    with pytest.raises(MsQuantError, match=message):
        run_job(QuantizeOptions(model, scheme="W8A8_DYNAMIC", **paths))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_model_may_not_be_the_output_in_progress(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("out.partial")
    with pytest.raises(MsQuantError, match="output in progress directory is the model directory"):
        run_job(QuantizeOptions(model, tmp_path / "out", "W8A8_DYNAMIC"))


@pytest.mark.parametrize("dangling", [True, False])
def test_an_output_that_is_a_link_is_refused_before_any_work(
    dangling: bool, wanted: QuantizeOptions, tmp_path: Path
) -> None:
    if not dangling:
        (tmp_path / "target").mkdir()
    wanted.output.symlink_to(tmp_path / "target")
    with pytest.raises(MsQuantError, match="out: is a symbolic link"):
        prepare(wanted)
    assert not wanted.job_directory.exists()


@pytest.mark.parametrize("name", ["out.job", "out.partial"])
def test_a_directory_of_the_user_is_refused_and_kept(name: str, wanted: QuantizeOptions) -> None:
    mine = wanted.output.with_name(name)
    (mine / ".git").mkdir(parents=True)
    (mine / ".env.tmp").write_text("secret")
    with pytest.raises(MsQuantError, match=f"{name}: exists "):
        run_job(wanted)
    assert sorted(path.name for path in mine.iterdir()) == [".env.tmp", ".git"]


def test_an_unwritable_place_is_found_before_the_blocks(
    wanted: QuantizeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(
        path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
    ) -> None:
        raise PermissionError(13, "Permission denied")

    wanted = replace(wanted, job=tmp_path / "job")
    checked = prepare(wanted)
    (tmp_path / "job").mkdir()
    make = Path.mkdir
    monkeypatch.setattr(
        Path, "mkdir", lambda path, **o: make(path, **o) if path.name == "job" else refuse(path)
    )
    with pytest.raises(MsQuantError, match=r"out\.partial: writing .* failed \(Permission denied"):
        run_job(wanted, lambda *_: pytest.fail("worked"), checked)


def test_space_that_a_resumed_job_has_taken_already_counts(
    wanted: QuantizeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = needed_bytes(prepare(wanted))

    def free(count: int) -> None:
        usage = SimpleNamespace(total=1 << 40, free=count)
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)

    free(needed - 1)
    with pytest.raises(MsQuantError, match=f"{needed - 1} bytes are free, expected at least"):
        prepare(wanted)
    free(needed)
    stop_after(1, wanted, monkeypatch)
    written = (wanted.job_directory / "block-00000.safetensors").stat().st_size
    free(needed - written // 2)
    prepare(wanted)
    free(100)
    with pytest.raises(MsQuantError, match="100 bytes are free"):
        prepare(wanted)


def test_the_disk_of_the_job_counts_too(
    wanted: QuantizeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(wanted, job=tmp_path / "other" / "job")
    seen: dict[Path, int] = {}
    monkeypatch.setattr("ms_quant.pipeline.paths.free_spaces_check", seen.update)
    checked = prepare(wanted)
    assert list(seen) == [tmp_path / "out.partial", tmp_path / "other" / "job"]
    assert sum(seen.values()) == needed_bytes(checked)


def test_a_second_run_of_the_same_job_is_refused(wanted: QuantizeOptions) -> None:
    said = []

    def again(index: int, part: float) -> None:
        if not said:
            with pytest.raises(MsQuantError, match="another process works on this job") as error:
                run_job(wanted)
            said.append(error)
            elsewhere = replace(wanted, job=wanted.output.with_name("elsewhere"))
            with pytest.raises(MsQuantError, match="another process works on this job"):
                run_job(elsewhere)

    assert run_job(wanted, again).finished_before is False
    assert said


def test_an_unrelated_job_directory_beside_a_finished_output_is_left_alone(
    wanted: QuantizeOptions,
) -> None:
    run_job(wanted)
    for name, text in (("notes.txt", "mine"), ("job.json", '{"scheme": "other"}')):
        shutil.rmtree(wanted.job_directory, ignore_errors=True)
        wanted.job_directory.mkdir()
        (wanted.job_directory / name).write_text(text)
        assert run_job(wanted).finished_before is True
        assert (wanted.job_directory / name).read_text() == text


def test_a_finished_output_without_its_shard_is_not_called_finished(
    wanted: QuantizeOptions,
) -> None:
    run_job(wanted)
    shard = next(wanted.output.glob("*.safetensors"))
    os.truncate(shard, 10)
    with pytest.raises(MsQuantError, match=r"safetensors: 10 bytes, expected \d+; delete .*out"):
        run_job(wanted)
    shard.unlink()
    with pytest.raises(MsQuantError, match=r"safetensors: no such file, expected as ms_quant"):
        run_job(wanted)


@pytest.mark.parametrize(
    ("name", "value"), [("model.norm.weight", 1e5), ("model.embed_tokens.weight", -7e4)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_float16_cannot_hold_is_refused_before_any_work(
    name: str, value: float, dtype: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[-1] = value

    model = tiny_model(change=enlarge, dtype=dtype)
    wanted = QuantizeOptions(model, tmp_path / "out", "W8A8_DYNAMIC", dtype="float16")
    with pytest.raises(MsQuantError, match=f"{name}' *: .*does not fit float16, expected at most"):
        prepare(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    prepare(replace(wanted, dtype="bfloat16"))


def test_a_corrected_model_is_quantized(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan

    wanted = QuantizeOptions(tiny_model(change=spoil), tmp_path / "out", "W8A8_DYNAMIC")
    with pytest.raises(MsQuantError, match="holds 1 NaN"):
        run_job(wanted)
    shutil.rmtree(wanted.model)
    tiny_model()
    assert not wanted.job_directory.exists()
    assert run_job(wanted).finished_before is False


UNUSED = [
    ({"calib": Path("/nonexistent")}, "with minmax uses no calibration data, expected no --calib"),
    ({"samples": 64}, "with minmax uses no calibration data, expected no --samples"),
    ({"seq_len": 256}, "with minmax uses no calibration data, expected no --seq-len"),
    ({"seed": 0}, "with minmax uses no calibration data, expected no --seed"),
    (
        {"algorithm_options": {"alpha": 0.9}},
        "minmax takes no option 'alpha'",
    ),
    (
        {"scheme": "W8A8", "algorithm": "osl", "algorithm_options": {"alpha": 0.5}},
        "algorithm osl takes no option 'alpha'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), UNUSED)
def test_options_that_would_change_nothing_are_refused(
    changes: dict, message: str, wanted: QuantizeOptions
) -> None:
    with pytest.raises(MsQuantError, match=message):
        prepare(replace(wanted, **changes))


def test_another_tool_version_is_a_matter_of_the_environment(
    wanted: QuantizeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(1, wanted, monkeypatch)
    monkeypatch.setattr(request, "__version__", "9.9.9")
    with pytest.raises(MsQuantError, match=r"now environment\.ms_quant is '9\.9\.9'; use --any-en"):
        run_job(wanted)
    assert not run_job(replace(wanted, any_environment=True)).finished_before
    monkeypatch.undo()
    with pytest.raises(MsQuantError, match=r"made with environment\.ms_quant = '9.*--any-environ"):
        run_job(wanted)
    assert run_job(replace(wanted, any_environment=True)).finished_before


@pytest.mark.parametrize("state", ["finished", "begun"])
def test_a_kept_job_is_written_again_in_other_shards(
    state: str,
    wanted: QuantizeOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
) -> None:
    job = tmp_path / "job"
    one = replace(wanted, keep_job=True, job=job, shard_bytes=6000)
    run_job(one)
    two = replace(one, output=tmp_path / "two", shard_bytes=1 << 30)
    if state == "begun":  # written in part under other shards, then killed
        shutil.copytree(one.output, tmp_path / "two.partial")
        record = json.loads((one.output / "ms_quant.json").read_text())["record"]
        (tmp_path / "two.partial" / "ms_quant.json").write_text(json.dumps({"record": record}))
    monkeypatch.setattr(JobDirectory, "finish_block", lambda *_: pytest.fail("quantized again"))
    run_job(two)
    assert (
        len(list(two.output.glob("*.safetensors")))
        == 1
        < len(list(one.output.glob("*.safetensors")))
    )
    expected, found = load_tensors(one.output), load_tensors(two.output)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(MsQuantError, match="made with shard_bytes = 6000, now shard_bytes is 7"):
        run_job(replace(one, shard_bytes=7))
