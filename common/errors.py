"""The one exception for input that a user can mend."""


class InputError(Exception):
    """Bad input: one line that names the file or flag, the field and the remedy.

    The command line prints it and ends with exit code 2; it never shows a traceback for it.
    """
