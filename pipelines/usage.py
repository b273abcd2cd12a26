"""What the build refuses: raised where it is found, told in one line, with exit status 2."""


class UsageError(ValueError):
    """A command line that cannot work; the message names the flag, what was found and what would work."""
