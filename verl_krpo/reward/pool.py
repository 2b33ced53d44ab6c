"""Processes that call a function of strings, each call within a limit of its own.

    pool = Pool("package.module:function", processes=4)
    pool.call("a", "b")    what the function returns, any JSON value; Failed where there is nothing to return

The limit counts the CPU time of the call in its worker: neither the worker's start, nor the wait for a free one, nor a
busy machine takes any of it, and the kernel ends what does not listen. Where something else kills a worker, another
takes its place and the call. Workers are plain child processes that read a pipe: they need no `if __name__ ==
"__main__"`, serve any thread and Ray's actors, and end with their parent.
"""

import importlib
import json
import math
import os
import queue
import resource
import signal
import subprocess
import sys
import time

ATTEMPTS = 3  # so often is a call tried whose worker is killed
MEMORY_BYTES = 2 << 30  # of address space for a worker
WALL_SECONDS = 600  # a worker that hangs without using the CPU is ended after that


class Failed(Exception):
    """A call has no result: it took too long or too much memory, raised an error, or its workers were killed."""


class Pool:
    """Workers for one function. The first starts at once, others when calls come at the same time.

    function     "package.module:name"
    processes    the most workers
    seconds      of CPU time for a call
    """

    def __init__(self, function: str, processes: int, seconds: float = 5.0):
        self._seconds, self._processes = seconds, processes
        # The paths as an argument, since they may have been changed in this process. A file's directory stays out of
        # them: ours holds a math.py.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; "
        self._command = [sys.executable, "-c", code + f"_serve({function!r}, {seconds!r})"]
        self._renew()
        os.register_at_fork(after_in_child=self._renew)  # a fork shares no pipes with its parent
        worker = self._idle.get()
        worker.start()
        self._idle.put(worker)

    def _renew(self) -> None:
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # the last used is used next
        for _ in range(self._processes):
            self._idle.put(_Worker(self._command))

    def call(self, *arguments: str):
        worker = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                reply, code = worker.call(arguments)
                if "value" in reply:
                    return reply["value"]
                if "failed" in reply:
                    raise Failed(reply["failed"])
                if code == -signal.SIGXCPU:
                    raise Failed(_too_long(self._seconds))
                if code >= 0:
                    raise RuntimeError(f"a grading process ended with code {code}; the log has its error")
            raise Failed(f"its process was killed {ATTEMPTS} times, last by {signal.Signals(-code).name}")
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that is started when it is called, and again when it is gone."""

    def __init__(self, command: list[str]):
        self._command = command
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        if self._process is None:
            # In a session of its own, so that an interrupt from the keyboard is the parent's.
            self._process = subprocess.Popen(
                self._command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )

    def call(self, arguments: tuple[str, ...]) -> tuple[dict, int]:
        """The worker's reply, or {} and its return code (negative: the signal) where it is gone."""
        self.start()
        try:
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:  # it was gone before
            line = b""
        except BaseException:  # interrupted: what it will reply must not be taken for the next call's
            self._process.kill()
            self._end()
            raise
        return (json.loads(line), 0) if line.endswith(b"\n") else ({}, self._end())

    def _end(self) -> int:
        process, self._process = self._process, None
        process.stdin.close()
        process.stdout.close()
        return process.wait()


class _OutOfTime(BaseException):
    """Not an Exception, so that no library takes it for its own."""


def _raise(*_: object) -> None:
    raise _OutOfTime


def _too_long(seconds: float) -> str:
    return f"more than {seconds:g} s of CPU time"


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _serve(function: str, seconds: float) -> None:
    """A worker's life: a line of JSON in, a line out, until the parent closes the pipe."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whatever the thread blocked that started us
    signal.signal(signal.SIGPROF, _raise)
    signal.alarm(WALL_SECONDS)
    replies = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # what libraries print is no reply
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    signal.alarm(0)
    for line in sys.stdin.buffer:
        signal.alarm(WALL_SECONDS)
        # The kernel ends the process where the timer is not heard, as in a long call of C.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds) + 1)
        signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)  # again and again, should it be swallowed
        try:
            try:
                reply = {"value": call(*json.loads(line))}
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except _OutOfTime:
            reply = {"failed": _too_long(seconds)}
        except MemoryError:
            reply = {"failed": f"more than {MEMORY_BYTES / 2**30:g} GiB of memory"}
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        signal.alarm(0)
        replies.write(json.dumps(reply).encode() + b"\n")
