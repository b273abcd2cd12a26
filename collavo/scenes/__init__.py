"""Sample scenes: drawn pictures with exact panoptic annotation, and dialogues about them.

    creatures, outdoors, indoors    drawings of things      }  registered by `thing`, made of what `drawing` offers
    stuff                           grounds, skies, walls   }
    settings                        which stuff lies where in a place, and what may stand there
    compose                         things put into a setting, painted, and annotated by what is visible
    dialogues                       what can be said about it
    write                           data sets in COCO's panoptic and LLaVA's format

`draw_scene` makes one scene from a seed, `write_scenes` a data set; `python -m collavo.scenes` is its command.
"""

from collavo.scenes.compose import draw_scene
from collavo.scenes.scene import Scene, Segment
from collavo.scenes.write import scene_seed, write_scenes

__all__ = ["Scene", "Segment", "draw_scene", "scene_seed", "write_scenes"]
