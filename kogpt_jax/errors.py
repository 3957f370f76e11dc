"""The one exception for what a caller can mend, and what its message takes over from others."""


class InputError(ValueError):
    """Bad input: an argument, a file or a key that the caller can mend.

    The message is one line that names the thing and its value. The command line prints it and exits with status 2.
    """


def one_line(error: BaseException) -> str:
    """An error's first line, for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
