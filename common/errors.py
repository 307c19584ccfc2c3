"""The one exception for bad input."""


class InputError(Exception):
    """Bad input that the user can correct.

    The message is one line. It names the file or flag, the field and the remedy. The command line
    prints it without a traceback and ends with exit code 2.
    """
