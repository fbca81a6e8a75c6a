"""Rate-distortion-optimized W8A8S: int8 weights chosen for what their codes cost.

docs/rate_distortion.md derives it. ``dictionary`` knows prices, ``levels`` finds the values that a
weight uses, ``rounding`` chooses among them, ``share`` divides a budget among the linears.
"""
