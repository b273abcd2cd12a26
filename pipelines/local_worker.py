"""A worker process of a local run: Beam's own, kept off the terminal.

What fails in it is raised in the launcher, with its traceback. Standard error is a log of the launcher's: its last line
tells why a worker died before it could say so.
"""

import logging
import os
import sys

if __name__ == "__main__":
    logging.getLogger().addHandler(logging.NullHandler())  # without a handler, the first warning would set one up
    from apache_beam.runners.worker.sdk_worker_main import main

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    main([])
