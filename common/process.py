"""The state of this process: the signals that ask it to end, its environment, its locks.

No module that it imports needs torch, whose import takes seconds.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from common.errors import InputError

if TYPE_CHECKING:
    from common.rescue import LastStep

# Windows has no SIGHUP
ENDING = [name for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
SIGNALS = [getattr(signal, name) for name in ENDING]
LOCKS: dict[Path, Callable[[], None]] = {}  # what unlocks the run folders of this process


class Stop(BaseException):
    """A signal asks this process to end. `number` is that of the signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Process:
    """The state of this process. There is one, so the class itself holds it."""

    asked: int = 0  # number of the first signal, 0 before
    ending: bool = False  # further signals are ignored
    heeding: bool = False  # `on_signal` handles the signals
    training: "LastStep | None" = None  # the training that `common.rescue` saves


@contextmanager
def heed_signals() -> Iterator[None]:
    """Context manager in which SIGTERM, SIGINT and SIGHUP raise `Stop`.

    While `LastStep.is_busy`, a signal is only noted, and `check_asked` raises `Stop` later. Signals
    after the first change nothing. A signal that is ignored already, as under nohup, stays ignored.
    Data loading processes ignore all signals, since they end with the process that they serve. A
    thread of theirs that hands it a batch just then does not report the lost connection.
    """
    owner = os.getpid()
    report = sys.excepthook

    def on_signal(number: int, frame: object) -> None:
        if os.getpid() != owner or Process.asked or Process.ending:
            return
        Process.asked = number
        training = Process.training
        if not (training and training.is_busy):
            raise Stop(number)

    def on_error(kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
        if os.getpid() == owner or not issubclass(kind, (ConnectionError, EOFError)):
            report(kind, error, trace)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, on_signal)
    Process.asked, Process.ending, Process.training = 0, False, None
    Process.heeding = bool(before)
    sys.excepthook = on_error
    try:
        yield
    finally:
        sys.excepthook = report
        Process.heeding, Process.training = False, None
        for number, handler in before.items():
            signal.signal(number, handler)


def heed_no_more() -> None:
    """Makes this process ignore all further signals, so that it can save before it ends."""
    Process.ending = True


def asked() -> int:
    """Returns the number of the signal that asked this process to end, or 0."""
    return Process.asked


def check_asked() -> None:
    """Raises `Stop` if a signal has asked this process to end."""
    if Process.asked:
        raise Stop(Process.asked)


def environment_number(name: str, default: int = 0) -> int:
    """Returns an environment variable as a number. Raises InputError if it is none."""
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise InputError(f"the environment variable {name} is {value!r:.60}, no number; unset it")
    return int(value)


def is_in_group() -> bool:
    """Returns whether this process has joined other ranks. Without torch it has not."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()


def leave_group() -> None:
    """Leaves the other ranks, if this process has joined any.

    torch 2.6 waits for the threads of Gloo and holds the GIL meanwhile. A thread that still has the
    tensor of the last collective needs the GIL to drop it, and gets the time to do so before.
    Source: pytorch/pytorch#154976, where torch lets go of the GIL
    """
    if is_in_group():
        time.sleep(0.1)
        sys.modules["torch.distributed"].destroy_process_group()


def lock(folder: Path) -> None:
    """Locks the folder until this process ends. Raises InputError if another process has it.

    The lock is not inherited by data loading processes, which may outlive this one by seconds.
    """
    path = (folder / "run.lock").resolve()
    if path in LOCKS:
        return
    try:
        LOCKS[path] = _lock_file(path)
    except (BlockingIOError, TimeoutError):
        raise InputError(f"another run is training in {folder}; choose another --output") from None


def _lock_file(path: Path) -> Callable[[], None]:
    """Locks a file, and returns what unlocks it. Raises BlockingIOError or TimeoutError."""
    try:
        import fcntl
    except ImportError:  # Windows, where no data loading process is forked
        from filelock import FileLock

        held = FileLock(path, timeout=0)
        held.acquire()
        return held.release
    file = path.open("a")
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file.close  # of this file object, and of any other of the same file


def unlock() -> None:
    """Unlocks all run folders that this process has locked."""
    for path in list(LOCKS):
        LOCKS.pop(path)()
