"""Panoptic and crayon maps as plain arrays.

`maps`         turn an id map into a `PanopticMap`: measured, ordered, numbered segments
`numbering`    order the segments, and number the instances of a class
`thresholds`   what a network's query needs to become a segment
`postprocess`  turn a network's logits into a panoptic map
`coco_png`     read COCO's masks
`index_png`    write and read the `panoptic_map` column
`grid`         reduce a map to the model's patch grid: the crayon map
`colors`       crayon colours, and the map over its image
"""
