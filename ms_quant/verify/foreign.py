"""A checkpoint that others made against a float model: how near its linears are to it.

Nothing says what was done to the weights, so nothing is made again. What smoothing divided out of
a norm is read from that norm; a rotation, or smoothing in the rows of a linear, cannot be read, and
a linear that is far from its source then is called unknown, not wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ms_quant.files.reader import FloatTensors
from ms_quant.formats.checks import format_of
from ms_quant.formats.opening import QuantizedModel
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import load_config
from ms_quant.models.names import block_prefix
from ms_quant.plan.plan import Plan
from ms_quant.verify.folding import Folding
from ms_quant.verify.requantize import OutputError
from ms_quant.verify.requantize_grid import some_rows
from ms_quant.verify.result import ComparedLinear, SourceFindings
from ms_quant.verify.source import max_output_error, same_rounded


@dataclass
class ForeignProof:
    """The comparison.

    Args:
        model: the checkpoint's reader.
        source: the float model.
        comparison: gets what is compared.
        rotated: whether the checkpoint says that its weights are rotated.

    Attributes:
        unproved: what could not be explained, one clause each.
    """

    model: QuantizedModel
    source: FloatTensors
    comparison: SourceFindings
    rotated: bool
    unproved: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.model.plan

    def problems(self) -> Iterator[str]:
        """Compares everything; one sentence for each difference that nothing can explain."""
        config, ours = load_config(self.source.directory), self.model.checkpoint
        if [block.tensors for block in config.stored_blocks] != [
            block.tensors for block in self.plan.config.stored_blocks
        ]:
            yield f"{self.source.directory}: another model than {ours.directory}"
            return
        changed = list(self._changed_floats())
        if changed:
            self.unproved.append(
                f"why {len(changed)} float tensors differ from {self.source.directory}, "
                f"{changed[0]} first"
            )
        norms = {
            f"{block_prefix(index)}{group.name}"
            for index in range(self.plan.config.num_blocks)
            for group in self.plan.groups(index)
            if (edge := self.plan.config.block(index).producer_of(group))
            and f"{block_prefix(index)}{edge.producer}.weight" in changed
        }
        self.folding = Folding(self.plan, ours, self.source, norms, self.model.stored_name)
        for index in range(self.plan.config.num_blocks):
            for group in self.plan.groups(index):
                self._measure(index, group)
        unknown = self.comparison.unknown
        if unknown and not self.comparison.layers and not self.rotated:
            yield (
                f"{ours.directory}: no linear gives what those of {self.source.directory} do, "
                "expected the model that it was made from"
            )
        elif unknown:
            self.unproved.append(
                f"that {len(unknown)} linears are those of {self.source.directory}: "
                "rotated or smoothed in a way that no tensor tells"
            )

    def _changed_floats(self) -> Iterator[str]:
        quantized = set(self.plan.quantized())
        types = {t.source or t.name: t.dtype for t in format_of(self.plan).tensor_plans(self.plan)}
        source = set(self.source.names)
        for name in self.plan.config.parameter_shapes():
            path, _, suffix = name.rpartition(".")
            if path in quantized and suffix == "weight":
                continue
            stored = self.model.stored_name(name)
            if name not in source or not same_rounded(
                self.model.checkpoint, stored, self.source, name, types
            ):
                yield name

    def _measure(self, index: int, group: LinearGroup) -> None:
        """The error of each linear of a group, or that it is not known."""
        smooth = self.folding.smooth(index, group)
        for member in group.members:
            path = f"{block_prefix(index)}{member}"
            linear = self.model.linear(path)
            assert linear is not None
            scheme = self.plan.layer(index, group).scheme
            format = scheme.weight
            error = OutputError(linear.activation, linear.weight.shape[1])
            for start, weight in self.source.float32_chunks(f"{path}.weight"):
                part = some_rows(linear, format, slice(start, start + len(weight)))
                error.add(part, weight if smooth is None else weight * smooth)
            if error.value <= max_output_error(scheme):
                found = ComparedLinear(path, error.value, made_again=False)
                self.comparison.layers.append(found)
            else:
                self.comparison.unknown.append(path)
