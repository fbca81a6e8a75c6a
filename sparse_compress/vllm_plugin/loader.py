"""The loader of ``--load-format sparse_quant``: a W8A8SC directory, proven before it is used."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError
from sparse_compress.codec import CORES
from sparse_compress.layouts import HEAD, Layout
from sparse_compress.layouts.vllm_mindspore import TARGET
from sparse_compress.serve.parameters import flat_description, kind_problems, rank_parameters
from sparse_compress.serve.rank import prove_layout, prove_rank, refusal
from sparse_compress.vllm_plugin import runtime

QUANTIZATION = "golden-stick"


def loader_class() -> type[Any]:
    """The loader. It is made here, as its base class is vLLM's."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class SparseQuantLoader(BaseModelLoader):
        """Loads exactly the rank that it runs as, or says why it cannot."""

        def __init__(self, load_config: Any):
            super().__init__(load_config)
            extra = load_config.model_loader_extra_config
            if extra:
                raise BadFileError(f"model_loader_extra_config is {extra!r:.80}, expected none")

        def download_model(self, model_config: Any) -> None:
            _directory(model_config)

        def load_weights(self, model: Any, model_config: Any) -> None:
            load_rank(model, _directory(model_config), *runtime.rank_of_world())

        def load_model(self, vllm_config: Any, model_config: Any, **more: Any) -> Any:
            return super().load_model(
                vllm_config=servable(vllm_config, model_config), model_config=model_config, **more
            )

    return SparseQuantLoader


def load_rank(model: Any, directory: Path, number: int, tp: int) -> None:
    """Copies the tensors of a rank into a model's parameters, one at a time.

    Args:
        model: of vllm-mindspore or vLLM. Where it has parameters for coded weights it gets them as
            they are stored, else decoded.
        directory: the checkpoint.
        number: the rank.
        tp: how many ranks there are.

    Raises:
        MsQuantError: the rank is not right, or its tensors are not the model's parameters; nothing
            was copied.
    """
    workers = max(1, CORES // tp)  # the ranks of one machine load at the same time
    rank = prove_rank(directory, TARGET, number, tp, workers)
    parameters = runtime.model_parameters(model)
    decoded = not any(name.endswith(".index") for name in parameters)
    tensors = rank_parameters(rank, decoded, HEAD in parameters, workers)
    parameters = _once(parameters, tensors)
    kinds = {name: runtime.kind_of(parameter) for name, parameter in parameters.items()}
    problems = list(kind_problems(rank, tensors, kinds))
    if problems:
        raise refusal(TARGET, tp, problems)
    for name, parameter in parameters.items():
        runtime.assign(parameter, tensors[name].make())
    logging.getLogger(__name__).info(
        "%s: %d tensors, %d linears %s",
        *(rank.tensors.place, len(parameters), len(rank.layout.compressed)),
        "decoded to W8A8" if decoded else "left coded",
    )


def _once(parameters: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters less other names of those that have a tensor: a tied head is the embedding."""
    known = {id(parameters[name]) for name in parameters.keys() & tensors.keys()}
    return {name: p for name, p in parameters.items() if name in tensors or id(p) not in known}


def servable(vllm_config: Any, model_config: Any) -> Any:
    """The configuration that a model is built with.

    Without the UNZIP unit golden-stick refuses the description of compressed weights while layers
    are built. So they are built by that of the decoded checkpoint.

    Args:
        vllm_config: vLLM's configuration; it is not changed.
        model_config: the model's part of it.

    Raises:
        MsQuantError: the checkpoint or an option is not one that can be served.
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages != 1:
        raise BadFileError(f"pipeline-parallel-size is {stages}, expected 1: ranks hold all layers")
    number, tp = runtime.rank_of_world()
    layout = prove_layout(_directory(model_config), TARGET, number, tp)
    if runtime.is_310p():
        return vllm_config
    changed = copy.copy(vllm_config)
    changed.quant_config = _plain_config(vllm_config.quant_config, layout)
    return changed


def _plain_config(config: Any, layout: Layout) -> Any:
    """The same method's configuration for the decoded checkpoint."""
    name = config.get_name() if config is not None else "none"
    if name.replace("_", "-") != QUANTIZATION or getattr(config, "is_modelslim", False):
        raise BadFileError(
            f"--load-format sparse_quant was given with quantization {name}, expected "
            f"--quantization {QUANTIZATION}"
        )
    return type(config).from_config(flat_description(layout))


def _directory(model_config: Any) -> Path:
    directory = Path(model_config.model)
    if not directory.is_dir():
        raise BadFileError(f"{directory}: no such directory, expected a local W8A8SC checkpoint")
    return directory
