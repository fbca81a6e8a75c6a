"""Pages of every kind, opened in a browser; not collected without playwright and chromium.

`make test-browser` installs the first, and Debian's chromium where it may.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from diffusion_models import save_pipeline
from report_pages import hostile_facts, large_facts

import ms_quant
from ms_quant.analysis.page import write_page as write_analysis
from ms_quant.analysis.run import analyze
from ms_quant.diffusers.quantize import quantize_directory
from ms_quant.diffusers.request import DiffusersOptions, check_request
from ms_quant.report.job import job_facts
from ms_quant.report.page import write_page
from ms_quant.report.report import open_against, open_facts, report_page
from ms_quant.report.results import Results
from sparse_compress.pipeline.info import info
from sparse_compress.pipeline.request import SparseOptions
from sparse_compress.pipeline.run import run

CHROMIUM = shutil.which("chromium")
HAS_BROWSER = CHROMIUM is not None and find_spec("playwright") is not None
collect_ignore_glob = [] if HAS_BROWSER else ["test_*.py"]
ROOT = Path(__file__).parents[2]
DENSE, ROUTED = (ROOT / "models" / name for name in ("stdlib-qwen3-6m", "stdlib-qwen3-moe"))
TEXT = ROOT / "models" / "text" / "calibration.txt"
CALIBRATION = {"samples": 4, "seq_len": 32}


def dense(base: Path) -> str:
    ms_quant.quantize_checkpoint(
        DENSE, base / "out", algorithm="osl", calibration=TEXT, **CALIBRATION
    )
    facts, results = open_facts(base / "out"), Results()
    results.add({"checkpoint": "out", "perplexity": 34.7, "perplexity_increase": 0.031,
                 "perplexity_increase_error": 0.002, "against_perplexity": 33.6, "tokens": 512,
                 "verdict": "worse"})  # fmt: skip
    subjects = {f"subject {k}": {"value": k / 40, "error": 0.1, "questions": 20} for k in range(40)}
    task = {"task": "ceval", "accuracy": 0.512, "against_accuracy": 0.533, "difference": -0.02}
    results.add({**task, "p_value": 0.01, "changed_answers": 0.07, "subjects": subjects})
    return report_page(facts, results, open_against(DENSE, facts))


def routed(base: Path) -> str:
    ms_quant.quantize_checkpoint(
        ROUTED,
        base / "out",
        "W8A8_DYNAMIC",
        algorithm="smoothquant",
        calibration=TEXT,
        **CALIBRATION,
    )
    return report_page(open_facts(base / "out"), Results())


def sparse(base: Path) -> str:
    run(SparseOptions(DENSE, base / "out", TEXT, tp=1, sparsity=0.4, **CALIBRATION))
    info(base / "out", base / "info.html")
    return (base / "info.html").read_text()


def analysis(base: Path) -> str:
    write_analysis(base / "a.html", analyze(DENSE, TEXT, ["W8A8", "C8"], **CALIBRATION))
    return (base / "a.html").read_text()


def diffusion(base: Path) -> str:
    source = save_pipeline(base / "float", transformer="wan", transformer_2="wan")
    quantize_directory(check_request(DiffusersOptions(source, base / "out", "W8A8_MXFP8")))
    facts = open_facts(base / "out")
    return report_page(facts, Results(), open_against(source, facts))


def job(base: Path) -> str:
    options = {"algorithm": "osl", "calibration": TEXT, "keep_job": True, **CALIBRATION}
    ms_quant.quantize_checkpoint(DENSE, base / "out", **options)
    return report_page(job_facts(base / "out.job", base / "out"), Results(), reload_seconds=5)


def large(base: Path) -> str:
    return report_page(large_facts(), Results())


def hostile(base: Path) -> str:
    facts, weights, found = hostile_facts()
    results = Results()
    results.add(found)
    return report_page(facts, results, weights)


PAGES: dict[str, Callable[[Path], str]] = {
    made.__name__: made
    for made in (dense, routed, sparse, analysis, diffusion, job, large, hostile)
}


@pytest.fixture(scope="session", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of each page."""
    base = tmp_path_factory.mktemp(request.param)
    path = base / f"{request.param}.html"
    write_page(path, PAGES[request.param](base))
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        # Everything here is our own file; in a container of CI there is no user namespace.
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()
