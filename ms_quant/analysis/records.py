"""What an analysis has found, as a file that is read back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ms_quant.errors import BadArgumentError, BadFileError, JobConflictError
from ms_quant.files.atomic import write_json
from ms_quant.files.reader import Checkpoint, fingerprint
from ms_quant.files.strict_json import read_json
from ms_quant.job.directory import explain_difference
from ms_quant.models.names import GroupId

VERSION = 1
MAX_BYTES = 256 << 20
ERRORS = ("loss_increase", "block_error", "block_mse", "output_error", "output_mse")
INPUTS = ("std", "quantile", "kurtosis")
METRICS = (*ERRORS, *INPUTS)
LARGEST = 700.0  # a loss whose exponential is finite

Size = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class SchemeError:
    """What quantizing one group alone changes.

    A relative error is the squared error of a token over its squared length, in the mean over
    tokens: in a plain mean of squares a few tokens with massive activations would count alone.

    Attributes:
        output_error: relative error of what the group computes.
        output_mse: mean squared error of the same.
        block_error: relative error of the block's output.
        block_mse: mean squared error of the same.
        loss_increase: estimated increase of the mean loss of a token: the divergence of what the
            model then predicts from what it predicts in float.
        decode: the same in decode, of a scheme that tells the phases apart.
    """

    __pydantic_config__ = _STRICT

    output_error: Size
    output_mse: Size
    block_error: Size
    block_mse: Size
    loss_increase: Size
    decode: SchemeError | None = None

    def worst(self, metric: str) -> float:
        """A measure by its name, of the phase where it is larger."""
        own = float(getattr(self, metric))
        return own if self.decode is None else max(own, self.decode.worst(metric))


@dataclass(frozen=True)
class InputFacts:
    """How the input of a group is spread.

    Attributes:
        absmax: the largest magnitude.
        channel_median: median over channels of their largest magnitudes.
        token_median: median over tokens of theirs.
        channels: the channels that are massive, the largest first; at most eight.
        positions: where in their windows massive tokens stand; at most eight.
        massive_tokens: how many tokens are massive.
        tokens: how many tokens were seen.
        std: absmax over the standard deviation.
        quantile: the step of int8 over the range between the quartiles.
        kurtosis: the excess kurtosis.
    """

    __pydantic_config__ = _STRICT

    absmax: Size
    channel_median: Size
    token_median: Size
    channels: tuple[Count, ...]
    positions: tuple[Count, ...]
    massive_tokens: Count
    tokens: Count
    std: Size
    quantile: Size
    kurtosis: float

    @property
    def massive(self) -> bool:
        """Whether a few channels or tokens decide the range of all."""
        return bool(self.channels or self.massive_tokens)


@dataclass(frozen=True)
class GroupSensitivity:
    """How sensitive the model is to one group.

    Attributes:
        block: the block that it is in.
        name: its name there: ``"qkv"``, or ``"kv_cache"``.
        kind: what recipes call it.
        linears: full paths of its linears; of a cache, of those whose outputs are cached.
        weights: how many weights it has; none of a cache.
        input: how its input is spread; None of a cache.
        schemes: name of each scheme to what it changes; those that the group cannot take lack.
    """

    __pydantic_config__ = _STRICT

    block: Count
    name: str
    kind: str
    linears: tuple[str, ...]
    weights: Count
    input: InputFacts | None
    schemes: Mapping[str, SchemeError]

    @property
    def path(self) -> str:
        """Its full path: ``"model.layers.0.qkv"``."""
        return str(GroupId(self.block, self.name))

    def score(self, scheme: str, metric: str) -> float:
        """A measure by its name."""
        if metric in INPUTS:
            return 0.0 if self.input is None else float(getattr(self.input, metric))
        return self.schemes[scheme].worst(metric)


@dataclass(frozen=True)
class Sensitivity:
    """How sensitive a model is to each scheme, group by group.

    Attributes:
        version: of the file.
        model: the directory that was analysed.
        request: what was asked for, and the fingerprint of the model's files.
        schemes: names, in the order that they were asked for.
        groups: every group that can take one of them, in model order.
        seconds: what the analysis took.
    """

    __pydantic_config__ = _STRICT

    version: int
    model: str
    request: Mapping[str, Any] = field(repr=False)
    schemes: tuple[str, ...]
    groups: tuple[GroupSensitivity, ...] = field(repr=False)
    seconds: Size = 0.0

    def of(self, scheme: str) -> Iterator[GroupSensitivity]:
        """The groups that can take a scheme, in model order.

        Raises:
            MsQuantError: it was not analysed.
        """
        if scheme not in self.schemes:
            raise BadArgumentError(
                f"scheme {scheme!r} was not analysed, expected one of {', '.join(self.schemes)}"
            )
        return (group for group in self.groups if scheme in group.schemes)

    def ranked(self, scheme: str, metric: str = ERRORS[0]) -> list[GroupSensitivity]:
        """The groups that can take a scheme, those first where it hurts most.

        Raises:
            MsQuantError: the scheme was not analysed, or there is no such measure.
        """
        check_metric(metric)
        return sorted(self.of(scheme), key=lambda group: -group.score(scheme, metric))

    def loss_increase(self, scheme: str, groups: Sequence[GroupSensitivity] | None = None) -> float:
        """The estimates of some groups, or of all, together."""
        chosen = self.of(scheme) if groups is None else groups
        return math.fsum(group.score(scheme, "loss_increase") for group in chosen)

    def require_model(self, checkpoint: Checkpoint) -> None:
        """Refuses an analysis of another model.

        Raises:
            MsQuantError: names the file that differs.
        """
        new = {"source": fingerprint(checkpoint)}
        found = explain_difference({"source": self.request.get("source")}, new, "analysed", True)
        if found:
            raise JobConflictError(
                f"{checkpoint.directory}: the analysis is of another model, {self.model}, or "
                f"{found[1]}; expected an analysis of this one"
            )

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        return asdict(self)

    def save(self, path: Path | str) -> None:
        """Writes a JSON file, which appears when it is whole.

        Raises:
            MsQuantError: it cannot be written.
        """
        write_json(path, self.as_json())

    @classmethod
    def load(cls, path: Path | str) -> Sensitivity:
        """Reads such a file.

        Raises:
            MsQuantError: it is none, or malformed; names the place.
        """
        found = read_json(Path(path), MAX_BYTES)
        version = found.get("version")
        if version != VERSION:
            raise BadFileError(
                f"{path}: version is {version!r:.40}, expected {VERSION}, that of a file of "
                "ms-quant analyze"
            )
        try:
            made = _FILE.validate_json(json.dumps(found))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BadFileError(
                f"{path}: {where:.200} is {first['input']!r:.80}: {first['msg']}"
            ) from None
        _check(made, str(path))
        return made


_FILE = TypeAdapter(Sensitivity)


def _check(made: Sensitivity, path: str) -> None:
    """Refuses what no analysis writes."""
    seen = set()
    for group in made.groups:
        if group.path in seen:
            raise BadFileError(f"{path}: {group.path:.200} is there twice, expected once")
        seen.add(group.path)
        unknown = sorted(set(group.schemes) - set(made.schemes))
        if unknown:
            raise BadFileError(
                f"{path}: {group.path:.200} has scheme {unknown[0]!r:.80}, expected one of "
                f"{', '.join(made.schemes):.200}"
            )


def check_metric(metric: str) -> None:
    """Refuses a measure that there is not.

    Raises:
        MsQuantError: names those that there are.
    """
    if metric not in METRICS:
        raise BadArgumentError(
            f"metric {metric!r} is unknown, expected one of {', '.join(METRICS)}"
        )


def percent(loss: float) -> float:
    """A loss difference as that of perplexity, in percent."""
    return 100 * math.expm1(min(loss, LARGEST))
