"""A MindSpore network from a checkpoint."""

from __future__ import annotations

from mindspore import Tensor

from ms_quant.cells.decoder import CausalLM
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.tree import replace_cell
from ms_quant.formats.opening import ServedModel
from ms_quant.models.names import block_prefix


def decoder_from_checkpoint(model: ServedModel) -> CausalLM:
    """The whole decoder of a checkpoint as Cells, in float32, quantized linears as QuantLinear.

    ``ms-quant eval`` and ``generate`` do not use it: they compute the same without MindSpore.

    Args:
        model (ServedModel): what :func:`ms_quant.formats.opening.open_model` gives.

    Returns:
        CausalLM, which :func:`ms_quant.cells.decoder.forward` calls with token ids.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)
    """
    network, swapped = CausalLM(model.config), set()
    network.set_train(False)
    for index in range(model.config.num_layers):
        for member in model.config.block(index).linears:
            path = f"{block_prefix(index)}{member}"
            linear = model.linear(path)
            if linear is not None:
                replace_cell(network, path, QuantLinear(linear))
                swapped.add(path)
    for name, parameter in network.parameters_and_names():
        if name.rpartition(".")[0] not in swapped:
            parameter.set_data(Tensor.from_numpy(model.tensor(name)))
    return network
