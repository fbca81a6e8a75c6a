"""JSON with a digest of itself: a changed byte in it is seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError
from ms_quant.files.atomic import write_json
from ms_quant.files.own import require_own_file
from ms_quant.files.strict_json import MAX_CONFIG_BYTES, read_json


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a digest of itself."""
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes state that a job reads again.

    Raises:
        MsQuantError: the disk does not take it.
    """
    write_json(path, seal(content))


def read_sealed(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """State that was written so; None where there is none, or where it has changed since.

    Raises:
        MsQuantError: a link, or something that is no file, stands under its name.
    """
    require_own_file(path)
    if not path.exists():
        return None
    try:
        found = read_json(path, limit)
    except BadFileError:
        return None
    content = {key: value for key, value in found.items() if key != "sha256"}
    return content if seal(content) == found else None
