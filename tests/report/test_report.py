"""Reports of real checkpoints, of jobs that run, and what cannot be reported."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ms_quant
from ms_quant.errors import MsQuantError
from ms_quant.pipeline.siblings import GroupWatch
from ms_quant.report.report import open_against, open_facts, report_page
from ms_quant.report.results import Results
from ms_quant.report.watch import watch

DATA = {"samples": 4, "seq_len": 16}


def words(page: str) -> str:
    bare = re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", "", page, flags=re.S)
    return html.unescape(bare)


@pytest.fixture
def made(tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path) -> tuple[Path, Path]:
    model, output = tiny_model(), tmp_path / "out"
    options = {"algorithm": "osl", "calibration": calib_text, "keep_job": True, **DATA}
    ms_quant.quantize_checkpoint(model, output, **options)
    return model, output


def test_what_the_job_measured_is_recorded_and_shown(made: tuple[Path, Path]) -> None:
    model, output = made
    facts = open_facts(output)
    record = json.loads((output / "ms_quant.json").read_text())
    measured = record["measured"]["block 0"]["groups"]
    assert {g.kind: g.error for g in facts.groups if g.block == 0} == {
        name: found["error"] for name, found in measured.items()
    }
    sizes = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert 0 < sizes - (facts.output_bytes or 0) < 20_000  # headers
    assert sum(g.bytes or 0 for g in facts.groups) + facts.float_bytes == facts.output_bytes
    said = words(report_page(facts, Results(), open_against(model, facts)))
    for group in facts.groups:
        assert group.path in said
    assert "float weights" not in said and "osl" in said  # the title of a chart that is drawn later
    assert "not recorded" not in said


def test_what_was_not_measured_is_said(
    tiny_model: Callable[..., Path], made: tuple[Path, Path], tmp_path: Path
) -> None:
    ms_quant.quantize_checkpoint(made[0], tmp_path / "dynamic", "W8A8_DYNAMIC")
    said = words(report_page(open_facts(tmp_path / "dynamic"), Results()))
    assert "not recorded: it was quantized from its weights alone" in said
    assert "Activations before" not in said
    (made[1] / "ms_quant.json").unlink()
    assert "others made this checkpoint" in words(report_page(open_facts(made[1]), Results()))
    assert "Nothing is quantized" in words(report_page(open_facts(made[0]), Results()))


def test_another_model_is_no_float_model_of_it(
    tiny_model: Callable[..., Path], made: tuple[Path, Path]
) -> None:
    facts = open_facts(made[1])
    other = tiny_model("other", layers=3)
    with pytest.raises(MsQuantError, match=r"is another model than .*num_layers is 3, expected"):
        open_against(other, facts)
    with pytest.raises(MsQuantError, match="expected the float model"):
        open_against(made[1], facts)
    again = tiny_model("again", seed=5)
    found = open_against(again, facts)
    assert found.same is False
    assert "other files" in words(report_page(facts, Results(), found))
    assert open_against(made[0], facts).same is True


def test_a_linear_that_is_not_there(made: tuple[Path, Path]) -> None:
    facts = open_facts(made[1])
    with pytest.raises(MsQuantError, match=r"names no quantized linear, expected such as model\."):
        report_page(facts, Results(), linears=["nothing*"])
    page = report_page(facts, Results(), linears=["*.down_proj"])
    assert re.findall(r"<option>(.*?)</option>", page) == [
        f"model.layers.{k}.mlp.down_proj" for k in range(facts.blocks or 0)
    ]


def test_the_page_of_a_running_job_follows_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, output = made
    job, page, finished = output.with_name("out.job"), tmp_path / "r.html", tmp_path / "finished"
    output.rename(finished)
    last = sorted(job.glob("block-*.safetensors"))[-1]
    aside = Path(shutil.move(last, tmp_path / "aside"))
    told: list[str] = []
    seen: list[str] = []

    def sleep(seconds: float) -> None:
        seen.append(page.read_text())
        if aside.exists():
            shutil.move(aside, last)
        else:
            finished.rename(output)

    watch(output, page, None, told.append, sleep)
    blocks = len(list(job.glob("block-*.safetensors")))
    assert told == [f"{page}: {k} of {blocks} blocks" for k in (blocks - 1, blocks)]
    assert f"The job runs: {blocks - 1} of {blocks} blocks are finished." in words(seen[0])
    assert 'data-reload="5"' in seen[0] and f"{blocks} of {blocks}" in words(seen[1])


def test_a_job_that_is_not_there_or_goes(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match="start ms-quant quantize MODEL -o"):
        watch(tmp_path / "none", tmp_path / "r.html", None, print)
    _, output = made
    output.rename(tmp_path / "finished")
    job = output.with_name("out.job")
    with pytest.raises(MsQuantError, match="the job is gone and"):
        watch(output, tmp_path / "r.html", None, print, lambda _: shutil.rmtree(job, True))


@pytest.mark.slow
def test_the_command(
    ms_quant_command: Callable, made: tuple[Path, Path], tmp_path: Path, calib_text: Path
) -> None:
    """Four processes."""
    model, output = made
    page = tmp_path / "r.html"
    data = ["--text", calib_text, "--windows", 2, "--seq-len", 16]
    run = ms_quant_command("report", output, "--against", model, "-o", page, *data, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {
        "page": str(page), "bytes": page.stat().st_size, "about": str(output)
    }  # fmt: skip
    assert "against the float model" in words(page.read_text())
    run = ms_quant_command("report", output, "-o", tmp_path)
    assert run.returncode == 1 and "is a directory, expected the name of an HTML file" in run.stderr
    output.rename(tmp_path / "aside")
    run = ms_quant_command("report", output, "-o", page)
    assert run.returncode == 0 and "The job runs" in words(page.read_text())
    for path in output.with_name("out.job").glob("block-*"):
        path.unlink()
    run = ms_quant_command("report", output, "-o", page)
    assert run.returncode == 1 and "no block of the job is finished" in run.stderr


def test_a_group_far_worse_than_its_siblings_is_told_at_once() -> None:
    group_watch = GroupWatch(lambda index, name: f"model.layers.{index}.{name}_proj")
    for index in range(3):
        errors = {"down": 0.004, "experts.0.up": 0.001, "experts.1.up": 0.002}
        worst = group_watch.add(index, errors)
        assert str(worst) == f"block {index}: down 0.4 %"
        assert not list(group_watch.warnings(index, errors))
    errors = {"down": 0.01, "experts.0.up": 0.001, "experts.1.up": 0.3}
    group_watch.add(3, errors)
    (said,) = group_watch.warnings(3, errors)
    assert said == (
        "block 3: the outputs of experts.1.up are off by 30 %, 150 times the median 0.2 % of this "
        "kind in 3 other blocks; the job goes on, and --exclude model.layers.3.experts.1.up_proj "
        "would leave it float"
    )


@pytest.mark.slow
def test_without_a_terminal_each_block_has_a_line(
    ms_quant_command: Callable, tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    """A process."""
    options = ["--calib", calib_text, "--samples", 2, "--seq-len", 8]
    run = ms_quant_command("quantize", tiny_model(), "-o", tmp_path / "out", *options)
    assert run.returncode == 0, run.stderr
    found = re.findall(
        r"quantizing: block (\d+) finished, (\d+) of 2, \d+ s so far, about \d+ s left; "
        r"worst group \w+, error [\d.e-]+ %",
        run.stderr,
    )
    assert found == [("0", "1"), ("1", "2")]
