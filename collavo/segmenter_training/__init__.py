"""How a segmentation network is taught the classes of crayon rows, and judged on them: `collavo train-segmenter`.

It stands above `collavo.segmenters` and `collavo.training`, of which it uses the checkpoints and the steps' learning
rate.
"""
