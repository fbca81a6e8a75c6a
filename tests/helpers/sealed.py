"""A checkpoint whose files were changed, with a record that agrees."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ms_quant.files.atomic import write_json
from ms_quant.files.sealed import seal
from ms_quant.job.output_directory import RECORD


def seal_again(directory: Path) -> None:
    """Makes the record agree with the files as they are now."""
    value = json.loads((directory / RECORD).read_text())
    value.pop("sha256", None)
    for name in value["files"]:
        data = (directory / name).read_bytes()
        value["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(directory / RECORD, seal(value))
