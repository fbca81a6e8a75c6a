"""MindIE-LLM, which is refused: of no family are its packed names documented well enough.

It packs and names a block's linears in its own way for each family. docs/w8a8sc.md says what is
known of its layout and what a family would need.
"""

from __future__ import annotations

NAME = "mindie"


def refusal(family: str) -> str:
    """Why a family cannot be written.

    Args:
        family: ``model_type`` of the model.
    """
    return (
        f"target {NAME} cannot hold family {family}: the names of its packed tensors and the "
        "order of the linears in them are not documented"
    )
