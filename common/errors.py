"""The exceptions that end a command with one line."""


class InputError(Exception):
    """Bad input that the user can correct.

    The message is one line. It names the file or flag, the field and the remedy. The command line
    prints it without a traceback and ends with exit code 2.
    """


class SomeFailed(Exception):
    """Some of several inputs failed, and each is named in the log. All others are done.

    The command line prints the message, one line, and ends with exit code 1.
    """
