"""Evaluation: ask a model the questions of a split, and count how much of its answers is right.

`questions`  make questions with their true answers from rows
`asking`     ask a model all of them
`judge`      compare what an answer says with the truth
`scores`     accuracy per class, mean, top and bottom 20, F1, yes-ratio, IoU
`report`     the table, the plot, the JSON file
`harness`    the same model in lmms-eval, the benchmark harness that others use
"""
