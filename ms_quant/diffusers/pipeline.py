"""The function that quantizes a directory of diffusers, as the command does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ms_quant.diffusers.methods import DEFAULT_SCHEME
from ms_quant.diffusers.quantize import quantize_directory
from ms_quant.diffusers.request import SHARD_BYTES, DiffusersOptions, check_request
from ms_quant.progress import PartProgress, silent


def quantize_pipeline(
    model: str | PathLike[str],
    output: str | PathLike[str],
    scheme: str = DEFAULT_SCHEME,
    *,
    scheme_options: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    float_undivided: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    any_environment: bool = False,
    progress: PartProgress = silent,
) -> dict[str, Any]:
    """Makes a directory for vllm-omni of a float directory of diffusers.

    The linears of the blocks of its transformers are rounded to nearest, some rows in memory at a
    time: no network is built, and no calibration data is needed. Everything else is copied. Called
    again with the same arguments after a kill, it goes on where it stopped.

    Args:
        model (str, PathLike): directory of a pipeline, or of a transformer alone: Wan, Flux,
            QwenImage, HunyuanVideo or CogVideoX.
        output (str, PathLike): directory to make.
        scheme (str): ``"W8A8_MXFP8"``, ``"W4A4_MXFP4"``, ``"W4A4_MXFP4_DUALSCALE"``, or a scheme
            of vllm-ascend's that needs no calibration. Default: ``"W8A8_MXFP8"``.
        scheme_options (Mapping[str, Any], optional): options of the scheme's weights, such as
            ``{"rule": "mxfp8_cann0"}``. Default: ``None``.
        exclude (Sequence[str]): glob patterns of linears that stay float; whole fused groups do.
            Default: ``()``.
        float_undivided (bool): leave linears float that the runtime cannot compute, instead of
            refusing. Default: ``False``.
        dtype (str, optional): type of what stays float, ``"bfloat16"`` or ``"float16"``. Default:
            ``None``, as it is stored.
        shard_bytes (int): largest data size of an output file. Default: 4 GiB.
        any_environment (bool): take a finished output of another version of this package. Default:
            ``False``.
        progress (Callable): told how much is done, 0 to 1. Default: tells nobody.

    Returns:
        dict, JSON as of ``ms-quant quantize --json``: ``method``, ``transformers``,
        ``quantized_linears``, ``float_linears`` with their reasons, ``output_bytes`` and others.

    Raises:
        MsQuantError: something that is asked for cannot be done, which is found before the work
            begins; or a value of the model is not finite. No output is left behind.

    Supported Platforms:
        ``CPU``; MindSpore is not used.

    Examples:
        >>> import ms_quant
        >>> made = ms_quant.quantize_pipeline("Wan2.2-T2V-A14B-Diffusers", "Wan2.2-MXFP8")
        >>> made["method"], made["was_finished"]
        ('mxfp8', False)
    """
    options = DiffusersOptions(
        Path(model),
        Path(output),
        scheme,
        scheme_options or {},
        tuple(exclude),
        float_undivided,
        dtype,
        shard_bytes,
        any_environment,
    )
    return quantize_directory(check_request(options), progress)
