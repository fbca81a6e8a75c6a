"""What ``ms-quant quantize`` is asked, before anything is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from ms_quant.errors import BadArgumentError
from ms_quant.job.output_directory import check_output_name
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.recipe import Recipe, load_recipe
from ms_quant.schemes.table import VALUES, as_value


class Windows(NamedTuple):
    """Which windows of the calibration data are used.

    Attributes:
        samples: how many, at most.
        seq_len: tokens of a window.
        seed: of the choice of windows.
    """

    samples: int
    seq_len: int
    seed: int


@dataclass(frozen=True)
class QuantizeOptions:
    """What a user asks of ``ms-quant quantize``. None is the default of what was not asked for.

    Attributes:
        model: directory of the float checkpoint.
        output: directory to make.
        scheme: name of the scheme, or ``"PART=NAME,..."``.
        algorithm: names of the algorithms, joined with ``+``, or ``"PART=NAMES,..."``.
        scheme_options: options of the scheme's weights, such as ``group_size``.
        algorithm_options: options of the algorithms, such as ``alpha`` or ``gptq.damping``.
        float_undivided: leave linears float whose inputs groups do not divide, instead of
            refusing.
        kv_cache: how keys and values are cached: ``"float"`` or one of ``KV_CACHES``.
        smoothing_target: where smoothing vectors go, by a name of ``SmoothingTarget``; "" is the
            format's first choice.
        calib: calibration file; needed by static schemes and most algorithms.
        samples: how many windows of it to use; None is as ``DEFAULTS`` or the recipe says, as are
            the next two.
        seq_len: tokens of a window.
        seed: of the choice of windows.
        exclude: glob patterns of linears that stay float, by whole fused groups.
        dtype: type of what stays float; None keeps the checkpoint's (bfloat16 for float32).
        shard_bytes: largest data size of an output file; None is as ``DEFAULTS`` or the recipe
            says.
        job: job directory; None is OUTPUT.job.
        keep_job: leave the job directory when all is done.
        any_environment: resume under other versions, CPU or thread count.
        recipe: what to do to which linear, in place of scheme, algorithm, exclude and most options.
        tp: tensor-parallel ranks that will serve the output, which must be divisible so; None is
            not known yet.
        formats: the checkpoint formats to make, each in a directory of its name inside
            ``output`` if there are several; () is one, the schemes' default.
        all_tokens: each routed expert is seen on all calibration tokens, not on its own alone.
    """

    model: Path
    output: Path
    scheme: str = DEFAULTS.scheme
    algorithm: str = DEFAULTS.algorithm
    scheme_options: Mapping[str, Any] = field(default_factory=dict)
    algorithm_options: Mapping[str, Any] = field(default_factory=dict)
    float_undivided: bool = False
    kv_cache: str = DEFAULTS.kv_cache
    smoothing_target: str = DEFAULTS.smoothing_target
    calib: Path | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    exclude: Sequence[str] = ()
    dtype: str | None = None
    shard_bytes: int | None = None
    job: Path | None = None
    keep_job: bool = False
    any_environment: bool = False
    recipe: Recipe | None = None
    formats: Sequence[str] = ()
    tp: int | None = None
    all_tokens: bool = False

    @property
    def job_directory(self) -> Path:
        check_output_name(self.output)
        return self.job or self.output.with_name(self.output.name + ".job")

    @property
    def windows(self) -> Windows:
        """The windows of the calibration data that are asked for."""
        return Windows(
            DEFAULTS.samples if self.samples is None else self.samples,
            DEFAULTS.seq_len if self.seq_len is None else self.seq_len,
            DEFAULTS.seed if self.seed is None else self.seed,
        )

    @property
    def most_shard_bytes(self) -> int:
        """The largest data size of an output file that is asked for."""
        return self.shard_bytes or DEFAULTS.shard_bytes


def split_options(named: Mapping[str, Any], settings: Sequence[str] = ()) -> dict[str, Any]:
    """Options of the scheme and the algorithms, each where :class:`QuantizeOptions` has it.

    Args:
        named: option to value; None is not asked for.
        settings: ``"NAME=VALUE"``.

    Raises:
        MsQuantError: a setting is malformed or given twice.
    """
    found = {name: value for name, value in named.items() if value is not None}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name or name in found:
            raise BadArgumentError(f"--set {setting!r}: expected NAME=VALUE, each name once")
        found[name] = value
    return {
        "scheme_options": {n: as_value(n, value) for n, value in found.items() if n in VALUES},
        "algorithm_options": {n: value for n, value in found.items() if n not in VALUES},
    }


CALIB_DIRECTORY = "lab_calib"  # where msModelSlim has its data sets, near its recipes
CALIB_LEVELS = 3


def read_recipe(path: Path) -> Recipe:
    """The recipe of a file. A calibration file that it names may be beside it.

    Or in ``lab_calib`` beside it, beside its directory, or beside that one's.
    """
    recipe = load_recipe(path)
    if recipe.calib is None or Path(recipe.calib).exists():
        return recipe
    above = [path.absolute().parent, *path.absolute().parent.parents][:CALIB_LEVELS]
    for directory in (path.parent, *(level / CALIB_DIRECTORY for level in above)):
        if (directory / recipe.calib).exists():
            return replace(recipe, calib=str(directory / recipe.calib))
    return recipe


def refuse_beside_recipe(recipe: str | PathLike[str], said: Mapping[str, Any]) -> None:
    """Refuses what a recipe decides.

    Args:
        recipe: what to call it.
        said: options by the names that they were given by; None was not given.

    Raises:
        MsQuantError: one of them was given.
    """
    for name, value in said.items():
        if value is not None:
            raise BadArgumentError(
                f"{name}: {recipe} says what each linear becomes, expected one of the two"
            )
