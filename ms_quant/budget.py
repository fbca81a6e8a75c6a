"""What bounds the memory of calibration and evaluation, in one place."""

BATCH_TOKENS = 2048  # of one forward of a block, but one window at least
SEARCH_TOKENS = 2048  # that a search looks at, but one window at least
SCORE_BYTES = 64 << 20  # of attention scores; longer sequences attend in slices of queries
LOGIT_BYTES = 64 << 20
