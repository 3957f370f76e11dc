"""The one exception for what a caller can mend."""


class InputError(ValueError):
    """Bad input: an argument, a file or a key that the caller can mend.

    The message is one line that names the thing and its value. The command line prints it and exits with status 2.
    """
