"""The algorithms, by name. A new one is a file with ``solve`` and a row of ``table.py``."""

from ms_quant.algorithms.pipeline import PLAIN, AlgorithmPipeline, get_algorithms, has, is_known
from ms_quant.algorithms.table import ALGORITHMS, Algorithm, Stage

__all__ = [
    "ALGORITHMS",
    "PLAIN",
    "Algorithm",
    "AlgorithmPipeline",
    "Stage",
    "get_algorithms",
    "has",
    "is_known",
]
