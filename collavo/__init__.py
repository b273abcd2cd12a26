"""CoLLaVO: panoptic maps, crayon maps, instructions, the model, its training and its evaluation.

The paper is arXiv 2402.11248. Importing this package loads nothing heavy; the modules that need torch are those under
`segmenters/`, `model/`, `training/` and `evaluation/`, and `panoptic/postprocess.py`.
"""

import logging

# On some CPUs bitsandbytes advises, whenever it is imported, to install kernels that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
