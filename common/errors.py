"""The exceptions that end a command with one line."""

import sys

LONGEST = 1000  # letters of a line
CONTROLS = (*range(32), *range(127, 160), 0x2028, 0x2029)  # they break lines, or move the cursor
HANDED_ON = "common.errors.InputError: "
ESCAPES = {code: ascii(chr(code))[1:-1] for code in CONTROLS}


def one_line(message: str) -> str:
    """Returns a message with control characters as escapes, and without the middle if it is long.

    What a message quotes comes from files, and can be anything.
    """
    line = message.translate(ESCAPES)
    if len(line) <= LONGEST:
        return line
    half = LONGEST // 2
    return f"{line[:half]} ... {line[-half:]}"


def first_line(error: BaseException) -> str:
    """Returns up to 150 letters of the first telling line of an error's message, or its type."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line]
    if any(line.startswith(("Traceback", "Original Traceback")) for line in lines[:2]):
        lines = lines[-1:]  # of a data loading process
    return lines[0][:150] if lines else type(error).__name__


def tell(message: str) -> None:
    """Prints the line of an error on the standard error."""
    print(f"error: {one_line(message)}", file=sys.stderr)


class InputError(Exception):
    """Bad input that the user can correct.

    The message is one line. It names the file or flag, the field and the remedy. The command line
    prints it without a traceback and ends with exit code 2.
    """

    def __init__(self, message: str):
        # a data loading process hands on its whole traceback; the message is its last line
        last = message.strip().splitlines()[-1:]
        if last and last[0].startswith(HANDED_ON):
            message = last[0].removeprefix(HANDED_ON)
        super().__init__(one_line(message))


class SomeFailed(Exception):
    """Some of several inputs failed, and each is named in the log. All others are done.

    The command line prints the message, one line, and ends with exit code 1.
    """
