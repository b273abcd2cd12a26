"""A worker process of a local run: Beam's own, with its log kept off the terminal.

What fails in it is raised in the launcher, traceback and all.
"""

import logging
import os
import sys

if __name__ == "__main__":
    logging.getLogger().addHandler(logging.NullHandler())  # without a handler, the first warning would set up one
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # Beam prints each traceback to it as well
    from apache_beam.runners.worker.sdk_worker_main import main

    main([])
