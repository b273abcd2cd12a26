"""A worker process of a local run: Beam's own, kept off the terminal.

What fails in it is raised in the launcher, with its traceback. Standard error is a log of the launcher's: its last line
tells why a worker died before it could say so. The launcher ends its workers by a file, `STOP` in the folder that it
names on the command line.
"""

import logging
import os
import sys
import threading
import time
from pathlib import Path

STOP = "stop"


def _end_when_told(stop: Path) -> None:
    while not stop.exists():
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_when_told, args=[Path(sys.argv[1], STOP)], daemon=True).start()
    logging.getLogger().addHandler(logging.NullHandler())  # without a handler, the first warning would set one up
    from apache_beam.runners.worker.sdk_worker_main import main

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    main([])
