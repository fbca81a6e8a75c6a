"""Whether a checkpoint holds the tensors of the model that its config describes."""

from __future__ import annotations

from ms_quant.errors import BadFileError
from ms_quant.files.reader import IGNORED, MODEL_CODES, Checkpoint, check_tensor
from ms_quant.files.strange_names import refuse_strange_names
from ms_quant.models.config import ModelConfig


def check_model(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Checks that a checkpoint is the float model its config describes, from the headers alone.

    Args:
        checkpoint (Checkpoint): the tensors.
        config (ModelConfig): what they should be.

    Raises:
        MsQuantError: a shard is malformed, a tensor is missing, has another shape or dtype, or is
            not a tensor of this model.
    """
    for path in checkpoint.files():
        checkpoint.shard(path.name)
    expected = config.parameter_shapes()
    found = checkpoint.names
    codes = {name: checkpoint.info(name).code for name in found}
    refuse_strange_names(str(checkpoint.directory), codes, list(expected), MODEL_CODES)
    missing = [name for name in expected if name not in codes]
    if missing:
        raise BadFileError(
            f"{checkpoint.directory}: {len(missing)} of {len(expected)} tensors are missing, "
            f"expected {missing[0]!r} of shape {list(expected[missing[0]])}"
        )
    if config.tied:
        # Some exports store the tied head a second time; transformers ignores it, and so do we
        # once it was compared.
        expected["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for name in found:
        if name in expected:
            check_tensor(checkpoint, name, expected[name])
        elif not name.endswith(IGNORED):
            raise BadFileError(
                f"{checkpoint.file_of(name).path}: {name!r} is not a tensor of a "
                f"{config.model_type} model of {config.num_blocks} layers"
            )
