"""The step of a diffusion model's denoising loop, and what each step is quantized with.

The names and signatures of MindIE-SD, so that a script works after changing its import::

    policy = TimestepPolicyConfig()
    policy.register(range(10), "dynamic", "w8a8_static_linear")
    for index, timestep in enumerate(timesteps):
        TimestepManager.set_timestep_idx(index)
        ...
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeGuard

from ms_quant.errors import BadArgumentError

STRATEGIES = {  # target: its strategies
    "w8a8_static_linear": ("dynamic", "static"),
    "w4a4_linear": ("W4A4", "W4A8"),
    "fa": ("MXFP4", "FP8", "FLOAT"),
}
LEGACY_TARGET = "linear"
_LINEAR_TARGETS = ("w8a8_static_linear", "w4a4_linear")

_index: ContextVar[int | None] = ContextVar("ms_quant_timestep_idx", default=None)


class TimestepManager:
    """The index of the current step, 0..T-1 of T steps; nothing is instantiated.

    The index belongs to the context: threads and async tasks do not see what others set. A task
    begins with the index that was set where it was created, a thread with none (or with its
    starter's, where Python is told that threads inherit contexts).

    T belongs to the process, as the layers that it counts rows of do: a thread that begins after
    a model was loaded is checked, too. It is the last one set; models of several T cannot run at
    the same time.
    """

    _count: int | None = None

    @classmethod
    def set_timestep_idx(cls, timestep_idx: int | None) -> None:
        """Sets the index of this context's current step.

        Args:
            timestep_idx: 0..T-1, any integer from 0 while T is not set; None when no step runs.
                MindIE-SD lets T itself pass, for which there is no row; here it is refused.

        Raises:
            MsQuantError: it is no int (bool is none), or not within 0..T-1.
        """
        if timestep_idx is not None:
            _check_index("timestep_idx", timestep_idx)
            cls._check_below_count("timestep_idx", timestep_idx)
        _index.set(timestep_idx)

    @classmethod
    def get_timestep_idx(cls) -> int | None:
        """The index of this context's current step, None when it is unset.

        Raises:
            MsQuantError: it was set before T was, and is not within 0..T-1: a loop over more
                steps, for example, ended without setting None.
        """
        index = _index.get()
        if index is not None:
            cls._check_below_count("timestep_idx that was set earlier", index)
        return index

    @classmethod
    @contextmanager
    def at(cls, timestep_idx: int | None) -> Iterator[None]:
        """Sets the index for a while, and puts the one before back; MindIE-SD does not have this.

        Raises:
            MsQuantError: as :meth:`set_timestep_idx`.
        """
        before = _index.get()
        cls.set_timestep_idx(timestep_idx)
        try:
            yield
        finally:
            _index.set(before)

    @classmethod
    def set_timestep_idx_max(cls, timestep_idx_max: int | None) -> None:
        """Sets T, the number of steps, one above the largest index.

        Args:
            timestep_idx_max: at least 1, the rows of a layer's ``input_scale``; None, which
                MindIE-SD does not have, removes the limit.

        Raises:
            MsQuantError: it is no int (bool is none), or below 1.
        """
        if timestep_idx_max is not None and (not _is_int(timestep_idx_max) or timestep_idx_max < 1):
            raise BadArgumentError(
                f"timestep_idx_max: {_found(timestep_idx_max)}, expected an int of at least 1"
            )
        cls._count = timestep_idx_max

    @classmethod
    def get_timestep_idx_max(cls) -> int | None:
        """T, the number of steps; None while it is not set."""
        return cls._count

    @classmethod
    def _check_below_count(cls, name: str, index: int) -> None:
        if cls._count is not None and index >= cls._count:
            raise BadArgumentError(
                f"{name}: {index}, expected 0..{cls._count - 1} as there are {cls._count} timesteps"
            )


@contextmanager
def kept_timesteps() -> Iterator[None]:
    """Puts this context's index and T back at the end, whatever was set in between."""
    index, count = _index.get(), TimestepManager._count
    try:
        yield
    finally:
        _index.set(index)
        TimestepManager._count = count


class _NotGiven(str):
    """A default that nobody gave."""


class TimestepPolicyConfig:
    """Which strategy quantizes which step.

    ======================  =====================  ==========================
    target                  strategies             default, an attribute
    ======================  =====================  ==========================
    ``w8a8_static_linear``  dynamic, static        ``default_strategy``
    ``w4a4_linear``         W4A4, W4A8             ``w4a4_default_strategy``
    ``fa`` (attention)      MXFP4, FP8, FLOAT      ``fa_default_strategy``
    ======================  =====================  ==========================

    Names are case-sensitive. Targets do not affect each other.

    Raises:
        TypeError: a default is no str.
        ValueError: a default is no strategy of its target.
    """

    def __init__(
        self,
        default_strategy: str = "dynamic",
        w4a4_default_strategy: str = "W4A4",
        fa_default_strategy: str = _NotGiven("MXFP4"),
    ) -> None:
        _check_name("default_strategy", default_strategy, STRATEGIES["w8a8_static_linear"])
        _check_name("w4a4_default_strategy", w4a4_default_strategy, STRATEGIES["w4a4_linear"])
        _check_name("fa_default_strategy", fa_default_strategy, STRATEGIES["fa"])
        self.default_strategy = default_strategy
        self.w4a4_default_strategy = w4a4_default_strategy
        self.fa_default_strategy = fa_default_strategy
        self._rules: dict[str, list[tuple[Container[int], str]]] = {t: [] for t in STRATEGIES}

    def register(
        self, step_range: int | list[int] | range, strategy: str, target: str = LEGACY_TARGET
    ) -> None:
        """Gives some steps a strategy. Of calls that name the same step, the last one counts.

        Args:
            step_range: a step, a list of steps or a range of them, from 0; an empty one registers
                nothing. Steps beyond a loop's last are no error: the policy does not know T.
            strategy: one of the target's.
            target: of the table above, or "linear", which is the linear target that has this
                strategy. MindIE-SD's default is ``w4a4_linear`` and its older ``register`` knew
                only static and dynamic; with "linear" as the default both kinds of call work.

        Raises:
            TypeError: ``strategy`` or ``target`` is no str, ``step_range`` or an item of a list is
                none of the types (bool is no int).
            ValueError: the target does not exist or has no such strategy, or a step is negative.
                Nothing is registered then.
        """
        steps = _steps(step_range)
        _check_name("target", target, [*STRATEGIES, LEGACY_TARGET])
        targets = _LINEAR_TARGETS if target == LEGACY_TARGET else (target,)
        allowed = [name for one in targets for name in STRATEGIES[one]]
        _check_name(f"strategy of target {target!r}", strategy, allowed)
        found = next(one for one in targets if strategy in STRATEGIES[one])
        self._rules[found].append((steps, strategy))

    def get_strategy(self, step: int, target: str = "w8a8_static_linear") -> str:
        """The strategy of a step.

        Args:
            step: from 0.
            target: of the table above; the default is what a call with one argument meant in the
                versions that had no targets. "linear" is refused, as two targets have it.

        Returns:
            What was registered last for this step, else the target's default.

        Raises:
            MsQuantError: ``step`` is no int (bool and None are none), or negative.
            TypeError: ``target`` is no str.
            ValueError: the target does not exist.
        """
        _check_index("step", step)
        _check_name("target", target, STRATEGIES)
        for steps, strategy in reversed(self._rules[target]):
            if step in steps:
                return strategy
        return self._default(target)

    def chooses(self, strategy: str, target: str) -> bool:
        """Whether some step may have a strategy of a target; MindIE-SD does not have this."""
        registered = any(name == strategy for _, name in self._rules[target])
        return registered or self._default(target) == strategy

    def chosen(self, step: int, target: str) -> str | None:
        """The strategy of a step, where it was registered or the target's default was given.

        A policy that says nothing of attention leaves attention what it is: the default of the
        target ``fa`` counts only if it was given. MindIE-SD does not have this.

        Raises:
            MsQuantError: as :meth:`get_strategy`.
        """
        found = self.get_strategy(step, target)
        return None if isinstance(found, _NotGiven) else found

    def says(self, target: str) -> bool:
        """Whether :meth:`chosen` is not None for some step."""
        default = self._default(target)
        return bool(self._rules[target]) or not isinstance(default, _NotGiven)

    def _default(self, target: str) -> str:
        if target == "fa":
            return self.fa_default_strategy
        return self.w4a4_default_strategy if target == "w4a4_linear" else self.default_strategy


def _steps(step_range: int | list[int] | range) -> Container[int]:
    """The steps of ``register`` as a container that later changes of a list do not reach."""
    if isinstance(step_range, range):
        smallest = min(step_range[0], step_range[-1]) if step_range else 0
        _refuse_negative("step_range", smallest)
        return step_range
    if not isinstance(step_range, list) and not _is_int(step_range):
        raise TypeError(f"step_range: {_found(step_range)}, expected an int, a list or a range")
    items = step_range if isinstance(step_range, list) else [step_range]
    for item in items:
        if not _is_int(item):
            raise TypeError(f"step_range: an item is {_found(item)}, expected an int")
        _refuse_negative("step_range", item)
    return frozenset(items)


def _refuse_negative(name: str, step: int) -> None:
    if step < 0:
        raise ValueError(f"{name}: step {step}, expected steps from 0")


def _check_index(name: str, index: object) -> None:
    if not _is_int(index) or index < 0:
        raise BadArgumentError(f"{name}: {_found(index)}, expected an int of at least 0")


def _check_name(argument: str, name: object, allowed: Collection[str]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: {_found(name)}, expected a str")
    if name not in allowed:
        raise ValueError(f"{argument}: {name!r}, expected one of {', '.join(allowed)}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _found(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"
