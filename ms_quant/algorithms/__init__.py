"""The algorithms, by name. A new one is a file with ``solve`` and a row of ``table.py``."""

from ms_quant.algorithms.chain import PLAIN, Chain, get_chain, has, is_known
from ms_quant.algorithms.table import ALGORITHMS, Algorithm, Stage

__all__ = ["ALGORITHMS", "PLAIN", "Algorithm", "Chain", "Stage", "get_chain", "has", "is_known"]
