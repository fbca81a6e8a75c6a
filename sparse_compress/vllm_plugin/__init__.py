"""The plugin that gives vLLM ``--load-format sparse_quant``, under ``vllm.general_plugins``."""

from __future__ import annotations

import logging
from functools import cache

LOAD_FORMAT = "sparse_quant"


def register() -> None:
    """Registers the loader. vLLM calls this in each of its processes.

    It never raises, as that would stop vLLM whatever it is asked to serve.
    """
    try:
        from vllm.model_executor.model_loader import register_model_loader

        from sparse_compress.vllm_plugin.loader import loader_class

        register_model_loader(LOAD_FORMAT)(loader_class())
    except Exception as error:
        _warn(f"{type(error).__name__}: {error}")


@cache  # once for each reason
def _warn(reason: str) -> None:
    logging.getLogger(__name__).warning(
        "--load-format %s of ms-quant is not available here (%s)", LOAD_FORMAT, reason
    )
