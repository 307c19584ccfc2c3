"""What a method file does when it is started, before it imports packages, which takes seconds.

Wrong flags are told, and --help is answered. Ctrl-C ends the imports without a traceback, until
`common.process` takes over when the command begins. SIGTERM and SIGHUP do so by themselves.
"""

import signal
import sys

# a job in the background of a script ignores the signal
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from common.flag_check import check_flags

check_flags(sys.modules["__main__"].__file__)
