"""Training: from the Parquet files of a data set to a run directory.

`row_index`      what is in the files: rows, instructions, dialogues, without their images
`batch_plan`     which samples make up which step, for any seed, resumable at any step
`batches`        rows read, decoded, gridded, rendered and padded, in the loader's workers
`adapters`       NF4 and the two adapters on the language model's linear layers
`stages`         which weights are active and which learn: CPT, Image-CIT, VL-CIT
`loop`           steps, evaluation, checkpoints
`run_directory`  what a run leaves behind, and how it is loaded again
"""
