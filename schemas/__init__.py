"""The data contract: what a category is, and what a row of crayon instruction data holds.

`schemas.categories`   the 133 classes of COCO panoptic, their indices and their English forms
`schemas.crayon_row`   the Parquet schema, the row as Python objects, and the metadata of a file

Nothing here imports `collavo`, `pipelines`, torch or Beam, so that a reader of the data needs none of them.
"""
