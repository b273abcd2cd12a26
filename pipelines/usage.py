"""How a command refuses what it was asked: one line, and exit status 2."""

import argparse
from typing import NoReturn


class UsageError(ValueError):
    """A command line that cannot work; the message names the flag, what was found and what would work."""


class Parser(argparse.ArgumentParser):
    """Python's parser, but for the usage that it prints above each error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")
