"""The crayon map: which class and which ordinal every pixel, and every cell of the model's grid, belongs to."""
