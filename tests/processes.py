"""Other processes: each may end, be a zombie or be reaped between two questions about it."""

import time
from contextlib import suppress

import psutil

# A zombie is gone: who started it has not asked for its status yet, or never will (init, in a container without one).


def below(pid: int | None = None, word: str = "") -> list[psutil.Process]:
    """All that `pid` (None: this process) has started, directly or not, and that has `word` in its command line."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # of a zombie too
                if word in " ".join(process.cmdline()):
                    found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to each that is still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def still_running(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def ended(pid: int, seconds: float = 300) -> bool:
    """Whether the process `pid` has ended, or does within `seconds`."""
    with suppress(psutil.NoSuchProcess):
        return not still_running([psutil.Process(pid)], seconds)
    return True
