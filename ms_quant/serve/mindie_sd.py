"""The rules of MindIE-SD for the files of a network, which save_quantized writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.formats.mindie_sd.description import (
    Description,
    OneFile,
    made_for,
    open_weights,
    rank_of,
    read_description,
)
from ms_quant.formats.mindie_sd.held import run_dtype
from ms_quant.formats.mindie_sd.types import FLOAT, NAME, SERVED_ATTENTION
from ms_quant.numerics.storage import DTYPES
from ms_quant.serve.attention import FloatParts
from ms_quant.serve.mindie import MAX_DESCRIPTION, MAX_WEIGHTS, access_problems
from ms_quant.serve.records import Loaded, Served, ServeRequest, kind_of, merged, weight_text

DESCRIPTIONS = "quant_model_description_*.json"
NOTE = "MindIE-SD is called from Python on a network of its own that is already built"


def check(request: ServeRequest) -> Served:
    """What the runtime will do with the files of a network."""
    served = Served(NAME, request.device)
    parts = None if request.attention is None else FloatParts.load(request.attention)
    try:
        path = _description(request.checkpoint)
        description = read_description(path, attention=True)
        weights = open_weights(description, rank_of(path))
        served.command = ["\n".join(_lines(description, weights, parts))]
        if parts is not None and parts.wish.get("sparse"):
            served.attention = parts.mindie_sd_config()
            served.notes += [_flags(served.attention), *parts.mindie_sd_notes()]
    except MsQuantError as error:
        served.problems.append(str(error))
        return served
    served.problems += access_problems(path, MAX_DESCRIPTION)
    for file in weights.files():
        served.problems += access_problems(file, MAX_WEIGHTS)
    for layer, kind in description.attention.items():
        if kind not in SERVED_ATTENTION:
            served.problems.append(
                f"{layer}: attention in {kind}, expected {', '.join(SERVED_ATTENTION)}"
            )
    served.loaded = merged(_rows(description, weights))
    served.notes.append(NOTE)
    return served


def _description(directory: Path) -> Path:
    """The description of a directory; of several ranks that of the first.

    Raises:
        MsQuantError: there is none, or one of another network.
    """
    found = sorted(directory.glob(DESCRIPTIONS)) if directory.is_dir() else []
    bases = {path.stem.removesuffix(f"_{rank_of(path)}") for path in found}
    if len(bases) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise BadFileError(
            f"{directory}: holds {listed}, expected the files of one network, {DESCRIPTIONS} and "
            "the weights beside it, as ms_quant.save_quantized writes them"
        )
    return found[0]


def _lines(description: Description, weights: OneFile, parts: FloatParts | None) -> Iterator[str]:
    """Python that serves it.

    Raises:
        MsQuantError: the runtime cannot be told which attention is float when.
    """
    policy = _policy(description, parts)
    yield from policy
    dtype = run_dtype(made_for(weights) or DTYPES["bfloat16"])
    given = ", timestep_config=policy" if policy else ""
    yield f"quantize(model, {str(description.path)!r}, dtype=torch.{dtype.name}{given})"


def _policy(description: Description, parts: FloatParts | None) -> list[str]:
    attention, stored = description.attention, description.float_steps
    steps = {stored.get(path, ()) for path in attention}
    if parts is not None and parts.wish.get("kind", FLOAT) != FLOAT:
        missing = [path for path in parts.measured if path not in {*attention, *parts.layers}]
        wrong = missing or [path for path in parts.layers if path in attention]
        if wrong:
            raise BadFileError(
                f"{description.path}: {wrong[0]} is {attention.get(wrong[0], FLOAT)}, which the "
                "plan of attention does not say, expected a network quantized by the plan"
            )
        steps = {*steps, parts.steps} if any(steps) else {parts.steps}
    if len(steps) > 1 or (len(set(attention.values())) > 1 and any(steps)):
        raise BadFileError(
            f"{description.path}: attentions have other steps in float, or other types, than each "
            "other or the plan, expected one for all: MindIE-SD's policy does not tell layers apart"
        )
    kinds = set(attention.values())
    if not kinds or not any(steps):
        return []
    wish = {"kind": kinds.pop()}
    return FloatParts("", (), steps.pop(), wish, tuple(attention)).mindie_sd_policy()


def _flags(config: dict) -> str:
    return (
        "the launchers of MindIE-SD's models take the JSON as --use_rainfusion --sparsity "
        f"{config['sparsity']:g} --sparse_start_step {config['skip_timesteps']} "
        f"--rainfusion_type {config['type']}"
    )


def _rows(description: Description, weights: OneFile) -> Iterator[Loaded]:
    """Linears by their kind, and attention."""
    sizes = {name: weights.info(name) for name in weights.names}
    for key, kind in description.entries.items():
        if not key.endswith(".weight") or key not in sizes:
            continue
        path = key.removesuffix(".weight")
        own = [info for name, info in sizes.items() if name.rpartition(".")[0] == path]
        size = sum(info.stop - info.start for info in own)
        layer = path.removesuffix(".linear")
        shape = weight_text(sizes[key].shape, sizes[key].code)
        yield Loaded(kind_of(layer), "0", kind.lower() if kind == FLOAT else kind, shape, 1, size)
    for path, kind in description.attention.items():
        own = [sizes[f"{path}.{name}"] for name in ("q_rot", "k_rot") if f"{path}.{name}" in sizes]
        size = sum(info.stop - info.start for info in own)
        yield Loaded(kind_of(path), "0", f"attention {kind}", "", 1, size)
