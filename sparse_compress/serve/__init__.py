"""What a runtime will do with a W8A8SC checkpoint: the proof that the loader and serve-check share.

Neither a runtime nor MindSpore is needed here.
"""
