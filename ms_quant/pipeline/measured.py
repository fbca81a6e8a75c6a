"""What a job has found out of each group, as the record of its output states it.

``ms_quant.json`` holds under ``measured``, for each block of a calibrated job::

    "block 0": {"groups": {"qkv": {"error": 0.0012, "input": {...}}}, "expert_tokens": [...]}

``error`` is the squared error over the squared output of a token, in the mean over calibration
tokens; ``input`` is what :func:`~ms_quant.quantization.input_facts.input_facts` says.
"""

from __future__ import annotations

from typing import Any

from ms_quant.job.block_files import BlockFiles

KEY = "measured"


def measured_facts(job: BlockFiles) -> dict[str, Any]:
    """The entry ``measured`` of the record; {} where nothing was calibrated."""
    found = {f"block {index}": facts for index, facts in job.findings()}
    return {KEY: found} if found else {}
