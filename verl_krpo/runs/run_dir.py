"""One directory a run, over all its attempts: `verl-krpo run RUN_DIR COMMAND...` runs a verl job in it.

    log.txt                  the output of the job; of earlier attempts log.1.txt, log.2.txt, ...
    metrics.jsonl            verl's file logger: one line a step; while a resumed attempt runs, only its own lines
    metrics.earlier.jsonl    the lines of earlier attempts, until the attempt has ended
    attempts.jsonl           one line when an attempt begins (command, versions, git commit, the step it resumes from)
                             and one when it ends (exit status, last step)
    .lock                    held by the job for as long as any of its processes lives; names it
    .hydra/                  the composed config and the overrides, written by verl's Hydra
    global_step_*/           checkpoints; latest_checkpointed_iteration.txt names the last

A job that was killed goes on when the same command is given again, with `trainer.resume_mode=auto`. verl's file
logger opens its file anew at every start, so what earlier attempts logged is kept aside and joined at the end: of
steps that are done again, the later attempt counts. A run that has ended well is not started again, and a directory
in which a job still runs (its wrapper may have been killed) starts no second one. Without COMMAND, one line sums the
run up.
"""

import fcntl
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from verl_krpo import __version__, versions
from verl_krpo.runs import progress
from verl_krpo.runs.log import EARLIER, METRICS, REWARD, SECONDS, accuracy, lines, rows, saved_step

ATTEMPTS, LOG, LOCK = "attempts.jsonl", "log.txt", ".lock"
POLL_SECONDS = 0.2
TERM_SECONDS = 60  # for a job that is asked to end


def run(run_dir: str | os.PathLike, command: list[str], quiet: bool = False, stall_seconds: float = 900) -> int:
    """Run one attempt of `command` in `run_dir` and return its exit status; 0 at once where it has ended well before.

    Output goes to log.txt and to the terminal; `quiet` shows one line of progress instead, the end of the output where
    the job fails, and ends a job that writes neither output nor metrics for `stall_seconds` (status 1). SIGTERM and
    Ctrl-C are passed on to the command and what it started. A command that fails is followed by one line on stderr
    that says where it stopped and what goes on from there. ValueError where another command has ended well in
    `run_dir`, as a directory is one run, and where a job is still running in it.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = _lock(run_dir)
    try:
        done = finished(run_dir)
        if done and done["command"] != command:
            raise ValueError(
                f"{run_dir} holds a run with other settings, finished at step {done['step']} ({ATTEMPTS} has its "
                f"command): set RUN_DIR for a new run, remove the folder to start again, or only {ATTEMPTS} to go on "
                "from there"
            )
        if done:
            print(
                f"{run_dir} holds this run, finished at step {done['step']}: set RUN_DIR, or remove it, to train again"
            )
            return 0
        begin(run_dir, command)
        with open(run_dir / LOG, "wb") as log:
            job = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[lock]
            )
        _name_holder(lock, job.pid, command)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: _pass_on(number, job))
        status = _follow(job, run_dir, quiet, stall_seconds)
        step = end(run_dir, status)
    finally:
        os.close(lock)
    if status:
        print(
            f"{run_dir}: the job ended with status {status} after step {step}; {run_dir / LOG} has the reason; "
            f"the same command goes on from step {saved_step(run_dir)}",
            file=sys.stderr,
        )
    return status if status >= 0 else 128 - status


def _pass_on(number: int, job: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):  # the job has ended in the meantime: what is left is to write that down
        os.killpg(job.pid, number)


def _follow(job: subprocess.Popen, run_dir: Path, quiet: bool, stall_seconds: float) -> int:
    """Show the job until it ends; its exit status."""
    shown = (progress.Line if quiet else progress.Output)(run_dir / LOG)
    written, last = -1, time.monotonic()
    while (status := job.poll()) is None:
        time.sleep(POLL_SECONDS)
        shown.update()
        size = sum(path.stat().st_size for path in (run_dir / LOG, run_dir / METRICS) if path.exists())
        if size != written:
            written, last = size, time.monotonic()
        elif quiet and time.monotonic() - last > stall_seconds:
            print(f"no output for {stall_seconds:.0f} s: ending the job", file=sys.stderr)
            os.killpg(job.pid, signal.SIGTERM)
            try:
                job.wait(TERM_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
            status = 1
            break
    shown.close(failed=status != 0)
    return status


def _lock(run_dir: Path) -> int:
    """The lock of `run_dir`, a file descriptor: a child that inherits it holds the lock too, be this process killed."""
    lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 1000).decode(errors="replace").strip()
        os.close(lock)
        raise ValueError(
            f"a job is still running in {run_dir}: {holder}. Wait for it, or end it and give the same command again "
            "(it goes on from the last checkpoint); for another run set RUN_DIR"
        ) from None
    except OSError as error:
        print(f"{run_dir}: no lock here ({error.strerror}), so start no second job in it", file=sys.stderr)
    _name_holder(lock, os.getpid(), sys.argv)
    return lock


def _name_holder(lock: int, pid: int, command: list[str]) -> None:
    words = shlex.join(command)
    words = f"{words[:100]} ..." if len(words) > 100 else words
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {pid} on {platform.node()} ({words})\n".encode(), 0)


def finished(run_dir: Path) -> dict | None:
    """{"command", "step"} of the last attempt, where it ended with status 0; else None."""
    attempts = lines(run_dir / ATTEMPTS)
    if len(attempts) < 2 or attempts[-1].get("status") != 0:
        return None
    return {"command": attempts[-2]["command"], "step": attempts[-1]["step"]}


def begin(run_dir: Path, command: list[str]) -> None:
    """Keep what earlier attempts left, and write down how this one starts."""
    run_dir.mkdir(parents=True, exist_ok=True)
    step = saved_step(run_dir)  # verl starts there; what was logged beyond it is done again
    kept = {number: data for number, data in rows(run_dir).items() if number <= step} if step else {}
    if step:
        print(f"{run_dir} resumes at step {step}")
    _write_metrics(run_dir / EARLIER, kept)
    (run_dir / METRICS).unlink(missing_ok=True)
    if (run_dir / LOG).exists():
        number = 1 + len(list(run_dir.glob("log.*.txt")))
        (run_dir / LOG).rename(run_dir / f"log.{number}.txt")
    line = {"began": _now(), "command": command, "resumes_from": step, "verl_krpo": __version__, **_environment()}
    _append(run_dir / ATTEMPTS, line)


def end(run_dir: Path, status: int) -> int:
    """Join the metrics of all attempts in metrics.jsonl, write down how this one ended, and return its last step."""
    joined = rows(run_dir)
    _write_metrics(run_dir / METRICS, joined)
    (run_dir / EARLIER).unlink(missing_ok=True)
    _tidy(run_dir)
    step = max(joined, default=0)
    _append(run_dir / ATTEMPTS, {"ended": _now(), "status": status, "step": step})
    return step


def summary(run_dir: str | os.PathLike, last: int = 10) -> dict[str, float]:
    """steps, mean reward of the `last` of them, last held-out accuracy and hours; what was not logged is left out."""
    steps = rows(run_dir)
    logged = [steps[step] for step in sorted(steps)]
    rewards = [data[REWARD] for data in logged if REWARD in data][-last:]
    accuracies = [value for data in logged if (value := accuracy(data)) is not None]
    return {
        "steps": max(steps, default=0),
        **({"reward": statistics.fmean(rewards)} if rewards else {}),
        **({"accuracy": accuracies[-1]} if accuracies else {}),
        "hours": sum(data.get(SECONDS, 0.0) for data in logged) / 3600,
    }


def _tidy(run_dir: Path) -> None:
    """Remove what verl leaves of older checkpoints (max_actor_ckpt_to_keep): a folder with no weights in it."""
    for folder in run_dir.glob("global_step_*"):
        number = folder.name.removeprefix("global_step_")
        weights = any(path.is_dir() and any(path.iterdir()) for path in folder.iterdir())
        if number.isdigit() and int(number) < saved_step(run_dir) and not weights:
            shutil.rmtree(folder)


def _environment() -> dict:
    """Versions, git commit (`+` after it: with changes that are not committed) and machine."""
    packages = {name: version for name in versions.PACKAGES if (version := versions.installed(name))}
    return {"python": platform.python_version(), **packages, "commit": _commit(), "host": platform.node()}


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return commit.stdout.strip() + "+" * bool(changes.stdout) if commit.returncode == 0 else None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _append(path: Path, line: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def _write_metrics(path: Path, by_step: dict[int, dict]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps({"step": step, "data": by_step[step]}) + "\n" for step in sorted(by_step)))
    partial.replace(path)
