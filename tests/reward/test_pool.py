"""The pool's promises, each with real processes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import processes
import pytest

from verl_krpo.reward.pool import Failed, Pool


@pytest.fixture(scope="module")
def pool_of():
    """pool_of(seconds, processes) -> a pool of workers that do as they are told, see workers.py."""
    sys.path.append(str(Path(__file__).parent))
    yield lambda seconds=60.0, processes=1: Pool("workers:behave", processes, seconds)
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def pool(pool_of):
    return pool_of()


def test_a_result_is_any_json_value_of_any_text(pool):
    for text in ("", "a\nb", "\x00", "\u2603", "\ud800", "x" * 1_000_000):
        assert pool.call("echo", text) == text


def test_what_a_worker_prints_is_no_reply(pool):
    assert pool.call("print", "reply") == "reply"


@pytest.mark.parametrize("how", ["spin", "spin on", "spin in C"])
def test_a_call_ends_at_its_limit(pool_of, how):
    pool = pool_of(seconds=0.5)
    with pytest.raises(Failed, match=r"more than 0\.5 s of CPU time"):
        pool.call(how)
    assert pool.call("echo", "next") == "next"


def test_the_limit_counts_neither_waiting_nor_sleeping_nor_the_start(pool_of):
    pool = pool_of(seconds=0.5)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda n: pool.call("sleep", f"0.{n}"), range(1, 9))) == [f"0.{n}" for n in range(1, 9)]


def test_memory_has_a_limit(pool):
    with pytest.raises(Failed, match="more than 2 GiB of memory"):
        pool.call("memory")
    assert pool.call("echo", "next") == "next"


def test_an_error_in_a_worker_is_named(pool):
    with pytest.raises(Failed, match="KeyError: 'this'"):
        pool.call("fail", "this")


def test_a_killed_worker_changes_nothing(pool):
    for _ in range(3):
        os.kill(pool.call("pid"), signal.SIGKILL)
        assert pool.call("echo", "still") == "still"


def test_a_call_whose_worker_is_killed_is_repeated(pool, tmp_path):
    assert pool.call("die once", str(tmp_path / "died")) == str(tmp_path / "died")


def test_a_call_that_kills_every_worker_fails(pool):
    with pytest.raises(Failed, match="killed 3 times, last by SIGKILL"):
        pool.call("die")
    assert pool.call("echo", "next") == "next"


def test_a_worker_that_cannot_start_is_an_error():
    with pytest.raises(RuntimeError, match="ended with code 1"):
        Pool("no_such_module:function", 1).call("a")


def test_a_wrong_reply_is_never_anothers(pool_of):
    """Interrupted calls, killed workers and hostile calls beside a thousand others."""
    pool = pool_of(seconds=0.5, processes=2)

    def ask(n):
        if n % 100 == 0:
            with suppress(ProcessLookupError):  # another thread has killed this one first
                os.kill(pool.call("pid"), signal.SIGKILL)
        if n % 250 == 0:
            with pytest.raises(Failed):
                pool.call("spin")
        return pool.call("echo", str(n))

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(ask, range(1000))) == [str(n) for n in range(1000)]


def test_an_interrupted_call_leaves_no_reply(pool):
    """Ctrl-C within a call, then the next call."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
    with pytest.raises(KeyboardInterrupt):
        pool.call("sleep", "30")
    signal.signal(signal.SIGUSR1, before)
    assert pool.call("echo", "mine") == "mine"


def test_a_fork_has_workers_of_its_own(pool):
    parents = pool.call("pid")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(pool.call("pid")).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(os.read(reading, 100)) != parents == pool.call("pid")


def test_a_plain_script_without_a_main_guard_and_its_workers_end(tmp_path):
    script = tmp_path / "grade.py"
    script.write_text(
        textwrap.dedent(r"""
        from verl_krpo.reward.math import _pool, compute_score
        print(compute_score("a", r"\boxed{\frac{2}{4}\pi}", r"\frac{\pi}{2}")["score"])
        print(_pool._idle.get()._process.pid)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    score, pid = done.stdout.split()
    assert score == "1.0" and not done.stderr
    assert processes.ended(int(pid))
