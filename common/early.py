"""What a method file does when it is started, before it imports packages, which takes seconds.

Wrong flags are told, and --help is answered. Ctrl-C ends the imports without a traceback, until
`common.process` takes over when the command begins. SIGTERM and SIGHUP do so by themselves.
"""

import os
import signal
import sys

# torch reads it when it is imported: what the GPU of a Mac lacks is computed on the CPU, with a
# warning that names the operation
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

# a job in the background of a script ignores the signal
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from common.flag_check import check_flags

check_flags(sys.modules["__main__"].__file__)
