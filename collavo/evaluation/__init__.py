"""Evaluation: what a model answers to the questions of a split, and how much of it is right.

`questions`  rows in, questions with their true answers out
`pictures`   images with their panoptic maps: what questions are about, from rows or segmented here
`answering`  models loaded, and all questions of an image answered from one pass over its tokens
`judge`      what an answer says, compared with the truth
`scores`     accuracy per class, mean, top and bottom 20, F1, yes-ratio, IoU
`report`     the table, the plot, the JSON file
`harness`    the same models in lmms-eval, the field's own harness
"""
