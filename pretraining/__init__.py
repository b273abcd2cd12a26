"""The code that made the two embedded models, for use from a checkout; it is not in the installed package.

    python -m pretraining.segmenter --output DIR     the segmenter, collavo/assets/segmenter
    python -m pretraining.base --output DIR          the base, collavo/assets/tiny_base

Both models learn from scenes that these commands draw themselves. `benchmarks/LOG.md` records what was tried.

    loop                      the training loop of both
    word_lists, word_grids    what the base reads beside scenes: lists of words, and words laid over pictures
    box_loss, positions       two aids with which it learns what part of a picture a box means
"""
