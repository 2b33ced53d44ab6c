"""What the workers of the pool's tests run; nothing of the package or of pytest is imported."""

import os
import signal
import time


def behave(how: str, detail: str = "") -> object:
    if how == "pid":
        return os.getpid()
    if how == "print":
        print("not a reply")
        os.system("echo neither")
    if how == "spin":
        while True:
            pass
    if how == "spin on":  # as a library that swallows everything
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
    if how == "spin in C":
        return max(range(10**12))
    if how == "memory":
        return len(bytearray(1 << 40))
    if how == "die" or how == "die once" and not os.path.exists(detail):
        if how == "die once":
            open(detail, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "sleep":
        time.sleep(float(detail))
    if how == "fail":
        raise KeyError(detail)
    return detail
