"""Quantizing a directory of diffusers: which of the command's options go with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ms_quant.cli.console import emit, naming_leftovers, note, show_fields, step_progress
from ms_quant.diffusers.methods import DEFAULT_SCHEME, FORMAT
from ms_quant.diffusers.request import DiffusersOptions, check_request
from ms_quant.errors import BadArgumentError
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import QuantizeOptions


def quantize_diffusers(
    options: QuantizeOptions,
    scheme: str | None,
    further: Mapping[str, Any],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Quantizes the transformers of a directory of diffusers.

    Args:
        options: what was asked of the command.
        scheme: the scheme, if one was named.
        further: option to value of those that choose schemes; None was not given.
        dry_run: whether only the plan is printed.
        as_json: whether the result is JSON.

    Raises:
        MsQuantError: an option does not go with such a model, or anything is wrong with it.
    """
    _refuse_options(options, further)
    with naming_leftovers(options.output):
        checked = check_request(
            DiffusersOptions(
                model=options.model,
                output=options.output,
                scheme=scheme or DEFAULT_SCHEME,
                scheme_options=options.scheme_options,
                exclude=tuple(options.exclude),
                float_undivided=options.float_undivided,
                dtype=options.dtype,
                shard_bytes=options.most_shard_bytes,
                any_environment=options.any_environment,
            )
        )
        for line in checked.notes:
            note(f"note: {line}")
        if dry_run:
            emit(checked.as_json(), as_json, show_fields)
            return
        from ms_quant.diffusers.quantize import quantize_directory

        with step_progress() as step:
            result = quantize_directory(checked, lambda part: step("quantizing", part))
    emit(result, as_json, show_fields)


def _refuse_options(options: QuantizeOptions, further: Mapping[str, Any]) -> None:
    for name in options.formats:
        if name != FORMAT:
            raise BadArgumentError(
                f"--format is {name!r}, expected {FORMAT} of a directory of diffusers; networks in "
                "MindSpore are saved for MindIE-SD with ms_quant.save_quantized"
            )
    given = {
        "algorithm": None if options.algorithm == DEFAULTS.algorithm else options.algorithm,
        "set": next(iter(options.algorithm_options), None),
        "kv-cache": None if options.kv_cache == DEFAULTS.kv_cache else options.kv_cache,
        "fold": options.smoothing_target or None,
        "calib": options.calib,
        "samples": options.samples,
        "seq-len": options.seq_len,
        "seed": options.seed,
        "all-tokens": options.all_tokens or None,
        "tp": options.tp,
        "job": options.job,
        "keep-job": options.keep_job or None,
        **further,
    }
    for name, value in given.items():
        if value is not None:
            raise BadArgumentError(
                f"--{name} {value}: a directory of diffusers is quantized from its weights alone, "
                "without calibration or a job, expected no such option"
            )
