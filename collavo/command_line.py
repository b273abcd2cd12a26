"""How the commands explain themselves, and how they refuse what they were asked: one line, and exit status 2."""

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Python's parser without abbreviations of flags, without the usage that it prints above each error, and with
    descriptions that keep their lines, which are to fit a terminal of 80 columns."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: error: {message}\n")


def whole_number(least: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `least` on."""

    def number(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 999999999")
        return int(text)

    return number
