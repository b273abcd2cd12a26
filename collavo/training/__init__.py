"""Training: from the Parquet files of a data set to a run directory.

How a row becomes a loss, in this order:

`lengths`      what fits into a sequence
`row_index`    what the files hold: rows, instructions, dialogues, without their images
`batch_plan`   which samples make up which step; the same for a given seed, so that a run can resume at any step
`batches`      rows read, decoded, rendered, packed and padded, in the loader's worker processes
`stages`       which weights are active and which learn
`loop`         forward, backward, update

What surrounds it:

`arguments`    flags and presets
`phases`       Crayon Prompt Tuning, then instruction tuning: the batches and stages of each
`trainable`    the base, in NF4, with adapters, ready to learn
`checkpoint`   saved and loaded, for an exact resume
`display`      what is printed and logged
`record`       train_args.json
`run`          all of it together
"""
