"""The files of a directory of msModelSlim, by their names."""

from __future__ import annotations

from pathlib import Path

from ms_quant.errors import BadFileError
from ms_quant.files.companion_files import companion_files, is_companion
from ms_quant.files.strict_json import read_json
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from sparse_compress.layouts import find_target
from sparse_compress.layouts.msmodelslim import TARGET

DESCRIPTIONS = "quant_model_description*.json"
VERSIONED = "quant_model_description.json"
COMPANIONS = (".jinja", ".json", ".model", ".py", ".txt", ".yaml")
OPTIONAL = "optional"


def is_msmodelslim(directory: Path) -> bool:
    """Whether a directory is msModelSlim's and not one that ``run`` made."""
    target, path = find_target(directory), directory / RECORD
    record = read_json(path, MAX_RECORD_BYTES).get("record") if path.exists() else None
    if target not in (None, TARGET) or (isinstance(record, dict) and "target" in record):
        return False
    return any(directory.glob(DESCRIPTIONS))


def companions(directory: Path) -> tuple[str, ...]:
    """Files that go with a checkpoint's tensors, as paths in it, less those that describe them."""
    own = {RECORD}
    for pattern in (DESCRIPTIONS, "*.index.json"):
        own |= {path.name for path in directory.glob(pattern)}
    found = [
        path.relative_to(directory).as_posix()
        for path in [*directory.iterdir(), *directory.glob(f"{OPTIONAL}/*")]
        if path.is_file()
        and not path.name.startswith(".")
        and (path.parent.name == OPTIONAL or path.suffix in COMPANIONS or is_companion(path.name))
    ]
    return tuple(sorted({*found, *companion_files(directory)} - own))


def file_names(versioned: bool, kind: str) -> tuple[str, str]:
    """(description, weights) of a directory that is not sharded.

    Args:
        versioned: whether the description has a version.
        kind: the type, such as ``"W8A8S"``.
    """
    weights = f"quant_model_weight_{kind.lower()}.safetensors"
    return VERSIONED if versioned else f"quant_model_description_{kind.lower()}.json", weights


def find_description(directory: Path) -> Path:
    if not directory.is_dir():
        raise BadFileError(f"{directory}: no such directory")
    found = sorted(directory.glob(DESCRIPTIONS))
    if not found:
        raise BadFileError(
            f"{directory}: is no directory of msModelSlim, expected one {DESCRIPTIONS} in it "
            "(sparse-compress run takes a float model)"
        )
    if len(found) != 1:
        names = [path.name for path in found]
        raise BadFileError(f"{directory}: has {names!r:.200}, expected one {DESCRIPTIONS}")
    return found[0]
