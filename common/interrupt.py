"""Ends a command without a traceback if Ctrl-C comes while it still imports its packages.

A method file imports this module before all others, which take seconds. `common.rescue` takes over
when the command begins. SIGTERM and SIGHUP end a process without a traceback by themselves.
"""

import signal
import sys
from pathlib import Path

COMMANDS = Path(__file__).resolve().parent.parent  # the folder of the method files
MAIN = Path(getattr(sys.modules["__main__"], "__file__", None) or "/")  # the program that is run

# A program that uses a method as a library keeps its handler. So does a job in the background of a
# script, which ignores the signal.
is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if is_ours and MAIN.resolve().parent == COMMANDS:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
