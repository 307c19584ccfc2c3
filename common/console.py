"""Output that goes on in any locale, and after the other end of a pipe is closed.

Progress is a bar on a terminal, and lines in a log file.
"""

import copy
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import ESCAPES


class ConsoleHandler(logging.StreamHandler):
    """Writes log lines to standard output. If nobody reads it any more, it is silent.

    Control characters of what a line quotes, such as a path with a line break, are escapes.
    """

    def __init__(self):
        super().__init__(sys.stdout)

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, with control characters of its arguments as escapes."""
        if isinstance(record.args, tuple):
            record = copy.copy(record)  # other handlers get it as it is
            record.args = tuple(map(_escaped, record.args))
        return super().format(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Silences a closed pipe, as that of `| head -1`; reports other errors as logging does."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # also for what is still in the buffer
            os.close(nowhere)
        else:
            super().handleError(record)


def _escaped(value: object) -> object:
    """Returns text and paths with control characters as escapes, and other values as they are."""
    return str(value).translate(ESCAPES) if isinstance(value, (str, Path, Exception)) else value


def open_console() -> logging.Handler:
    """Prepares the standard streams, and returns the handler of the log.

    Letters that the locale does not have are written as escapes, as "\\u732b". A stream that is
    closed, as by 2>&-, is replaced by one that goes nowhere.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    return ConsoleHandler()


class Lines:
    """Where a progress bar writes if stderr is no terminal: each state of it is a line."""

    def write(self, text: str) -> None:
        """Writes the text without the returns and blanks that overwrite a line of a terminal."""
        if text := text.strip():
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        """Writes what is in the buffer."""
        sys.stderr.flush()


def progress_bar(
    title: str, total: int, initial: int = 0, unit: str = "img", **options: Any
) -> tqdm:
    """Returns a bar of `total` units, of which `initial` are done. Only rank 0 shows it.

    It has the rate and the time left. In a log file it is a line, at most every 30 seconds.
    options: of tqdm
    """
    from common.distributed import rank  # here, since it imports torch, which takes seconds

    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": 30}
    return tqdm(desc=title, total=total, initial=initial, unit=unit, disable=rank() > 0, **options)
