"""Sample scenes: drawn pictures with exact panoptic annotation, and dialogues about them.

    creatures, outdoors, indoors    draw things, registered by `thing`, with the shapes of `drawing`
    stuff                           draws grounds, skies, walls, trees, houses
    canvas                          holds a scene while it is made: layers from back to front, and the light
    places                          say which stuff lies where, and what may stand there
    compose                         puts things into a place, paints them, and annotates what is visible
    dialogues                       says what can be seen
    write                           writes data sets in COCO's panoptic and LLaVA's format

`draw_scene` makes one scene from a seed, `write_scenes` a data set. `python -m collavo.scenes` is the command.
"""

from collavo.scenes.compose import draw_scene
from collavo.scenes.scene import Scene, SceneSegment
from collavo.scenes.write import scene_seed, write_scenes

__all__ = ["Scene", "SceneSegment", "draw_scene", "scene_seed", "write_scenes"]
