"""From weights and statistics to the quantized linears of a block."""
