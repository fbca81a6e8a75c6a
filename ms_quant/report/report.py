"""The page about a checkpoint or a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ms_quant.diffusers.directory import is_diffusers
from ms_quant.report.activations import activation_section, expert_section
from ms_quant.report.attention import attention_section
from ms_quant.report.charts import chosen_histogram
from ms_quant.report.checkpoint import checkpoint_facts, float_weights
from ms_quant.report.diffusion import diffusion_facts, diffusion_weights
from ms_quant.report.page import render
from ms_quant.report.parts import cards, joined, paragraph, section, sentences
from ms_quant.report.records import Facts, FloatWeights
from ms_quant.report.results import Results, result_sections
from ms_quant.report.sections import (
    error_section,
    groups_section,
    kinds_section,
    overview,
    record_section,
)
from ms_quant.report.summary import summary
from ms_quant.report.weights import histograms


def open_facts(directory: Path) -> Facts:
    """What a finished checkpoint or pipeline says of itself.

    Raises:
        MsQuantError: it is neither, or malformed.
    """
    return diffusion_facts(directory) if is_diffusers(directory) else checkpoint_facts(directory)


def open_against(directory: Path, facts: Facts) -> FloatWeights:
    """The float model that a checkpoint is compared with.

    Raises:
        MsQuantError: it is not float, or another model.
    """
    of_diffusers = is_diffusers(facts.place)
    return (diffusion_weights if of_diffusers else float_weights)(directory, facts)


def report_page(
    facts: Facts,
    results: Results,
    against: FloatWeights | None = None,
    linears: Sequence[str] = (),
    reload_seconds: int = 0,
) -> str:
    """The page.

    Args:
        facts: the checkpoint or the job.
        results: what other commands measured.
        against: the float model.
        linears: globs of the linears that have histograms; none chooses some.
        reload_seconds: after how many seconds the page reads itself again; 0 is never.

    Raises:
        MsQuantError: no linear is named so, or a weight cannot be read.
    """
    kind = facts.format if facts.finished is None else "quantization in progress"
    parts = [
        paragraph(", ".join(filter(None, (kind, facts.model))), dim=True),
        sentences(summary(facts, results, against)),
        cards(overview(facts, results, against)),
        result_sections(results),
        kinds_section(facts, against),
        joined(facts.further.parts) if facts.further is not None else Markup(""),
        error_section(facts),
        groups_section(facts) if facts.groups else Markup(""),
        activation_section(facts),
        _weights(facts, against, linears),
        expert_section(facts),
        attention_section(results.attention, results.maps, facts.cache),
        record_section(facts),
    ]
    return render(facts.name, parts, reload_seconds)


def _weights(facts: Facts, against: FloatWeights | None, linears: Sequence[str]) -> Markup:
    if facts.further is not None and against is None and not linears:
        return Markup("")  # it shows the codes of every linear itself
    found = histograms(facts, linears, against)
    if not found:
        return Markup("")
    hint = "" if against else " With `--against FLOAT` the float weights stand beside them."
    return section(
        "Weights",
        paragraph(
            f"{len(found)} linears, some of each kind and the worst first; `--linear PATTERN` "
            f"chooses others.{hint}" if not linears else f"{len(found)} linears.{hint}"
        ),
        chosen_histogram("weights", "Linear", found),
    )  # fmt: skip
