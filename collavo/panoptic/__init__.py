"""Panoptic segmentation as plain arrays: from ids or logits to a map whose pixels point into a list of segments."""
