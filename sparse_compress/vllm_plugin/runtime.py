"""What is asked of vLLM, vllm-mindspore and the frameworks. Nothing is imported before it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparse_compress.serve.parameters import Kind


def rank_of_world() -> tuple[int, int]:
    """(this process's tensor-parallel rank, how many there are)."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def is_310p() -> bool:
    """Whether the device has the UNZIP unit.

    vllm-mindspore knows. It is not imported for that, as it changes vLLM when it is.
    """
    utils = sys.modules.get("vllm_mindspore.utils")
    return utils is not None and bool(utils.is_310p())


def model_parameters(model: Any) -> Mapping[str, Any]:
    """A model's parameters by the names that its checkpoint has for them."""
    if hasattr(model, "get_params_dict"):  # vllm-mindspore
        return model.get_params_dict()
    return dict(model.named_parameters())


def kind_of(parameter: Any) -> Kind:
    """Type and shape; frameworks call a type ``torch.float16`` or ``Float16``."""
    return str(parameter.dtype).rpartition(".")[2].lower(), tuple(parameter.shape)


def assign(parameter: Any, array: np.ndarray) -> None:
    """Sets a parameter's values; type and shape are the same.

    A parameter of vllm-mindspore may have no values yet, which is how it builds models.
    """
    array = np.ascontiguousarray(array)
    if hasattr(parameter, "set_data"):
        import mindspore

        parameter.set_data(mindspore.from_numpy(array))
        return
    import torch

    parameter.data.copy_(torch.from_numpy(array))
