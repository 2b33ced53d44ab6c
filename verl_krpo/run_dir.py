"""One directory a run, over all its attempts: `python -m verl_krpo.run_dir RUN_DIR COMMAND...` runs a verl job in it.

    log.txt                  the output of the job; of earlier attempts log.1.txt, log.2.txt, ...
    metrics.jsonl            verl's file logger: one line a step; while a resumed attempt runs, only its own lines
    metrics.earlier.jsonl    the lines of earlier attempts, until the attempt has ended
    attempts.jsonl           one line when an attempt begins (command, versions, git commit, the step it resumes from)
                             and one when it ends (exit status, last step)
    .hydra/                  the composed config and the overrides, written by verl's Hydra
    global_step_*/           checkpoints; latest_checkpointed_iteration.txt names the last

A job that was killed goes on when the same command is given again, with `trainer.resume_mode=auto`. verl's file
logger opens its file anew at every start, so what earlier attempts logged is kept aside and joined at the end: of
steps that are done again, the later attempt counts. A run that has ended well is not started again. Without COMMAND,
one line sums the run up.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from verl_krpo import __version__, versions

METRICS, EARLIER, ATTEMPTS, LOG = "metrics.jsonl", "metrics.earlier.jsonl", "attempts.jsonl", "log.txt"
TRACKER = "latest_checkpointed_iteration.txt"


def run(run_dir: str | os.PathLike, command: list[str], log: bool = True) -> int:
    """Run one attempt of `command` in `run_dir` and return its exit status; 0 at once where it has ended well before.

    Output goes to the terminal and, with `log`, to log.txt too. SIGTERM and Ctrl-C are passed on to the command and
    what it started. A command that fails is followed by one line on stderr that says where it stopped and what goes on
    from there. ValueError where another command has ended well in `run_dir`: a directory is one run.
    """
    run_dir = Path(run_dir)
    done = finished(run_dir)
    if done and done["command"] != command:
        raise ValueError(
            f"{run_dir} holds a run with other settings, finished at step {done['step']} ({ATTEMPTS} has its command): "
            f"set RUN_DIR for a new run, remove the folder to start again, or only {ATTEMPTS} to go on from there"
        )
    if done:
        print(f"{run_dir} holds this run, finished at step {done['step']}: set RUN_DIR, or remove it, to train again")
        return 0
    begin(run_dir, command)
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if log else {}
    job = subprocess.Popen(command, start_new_session=True, **piped)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.killpg(job.pid, number))
    if log:
        with open(run_dir / LOG, "wb") as kept:
            while chunk := job.stdout.read1(1 << 16):
                kept.write(chunk)
                kept.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
    status = job.wait()
    step = end(run_dir, status)
    if status:
        reason = f"; {run_dir / LOG} has the reason" if log else ""
        print(
            f"{run_dir}: the job ended with status {status} after step {step}{reason}; "
            f"the same command goes on from step {saved_step(run_dir)}",
            file=sys.stderr,
        )
    return status if status >= 0 else 128 - status


def saved_step(run_dir: Path) -> int:
    """The step of the last complete checkpoint, 0 without one."""
    tracker = run_dir / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def finished(run_dir: Path) -> dict | None:
    """{"command", "step"} of the last attempt, where it ended with status 0; else None."""
    attempts = _read(run_dir / ATTEMPTS)
    if len(attempts) < 2 or attempts[-1].get("status") != 0:
        return None
    return {"command": attempts[-2]["command"], "step": attempts[-1]["step"]}


def begin(run_dir: Path, command: list[str]) -> None:
    """Keep what earlier attempts left, and write down how this one starts."""
    run_dir.mkdir(parents=True, exist_ok=True)
    step = saved_step(run_dir)  # verl starts there; what was logged beyond it is done again
    kept = {number: data for number, data in metrics(run_dir).items() if number <= step} if step else {}
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
    joined = metrics(run_dir)
    _write_metrics(run_dir / METRICS, joined)
    (run_dir / EARLIER).unlink(missing_ok=True)
    step = max(joined, default=0)
    _append(run_dir / ATTEMPTS, {"ended": _now(), "status": status, "step": step})
    return step


def metrics(run_dir: str | os.PathLike) -> dict[int, dict]:
    """{step: verl's scalars} over all attempts, a live one included; step 0 is the validation before training."""
    run_dir = Path(run_dir)
    rows: dict[int, dict] = {}
    for row in _read(run_dir / EARLIER) + _read(run_dir / METRICS):
        # A resumed attempt validates before it trains, and logs that under the step it resumes from: one row of two.
        rows[row["step"]] = rows.get(row["step"], {}) | row["data"]
    return rows


def summary(run_dir: str | os.PathLike, last: int = 10) -> dict[str, float]:
    """steps, mean reward of the `last` of them, last held-out accuracy and hours; what was not logged is left out."""
    rows = metrics(run_dir)
    steps = sorted(rows)
    found: dict[str, float] = {"steps": max(steps, default=0)}
    rewards = [rows[step]["critic/score/mean"] for step in steps if "critic/score/mean" in rows[step]][-last:]
    if rewards:
        found["reward"] = sum(rewards) / len(rewards)
    for step in reversed(steps):
        accuracies = [value for key, value in rows[step].items() if key.startswith("val-") and "/acc/mean@" in key]
        if accuracies:
            found["accuracy"] = sum(accuracies) / len(accuracies)
            break
    found["hours"] = sum(data.get("timing_s/step", 0.0) for data in rows.values()) / 3600
    return found


def _environment() -> dict:
    """Versions, git commit (`+` after it: with changes that are not committed) and machine."""
    packages = {name: found for name in versions.PACKAGES if (found := versions.installed(name))}
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


def _read(path: Path) -> list[dict]:
    """The whole lines of a JSONL file; a killed job can leave a last line without its end."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def _append(path: Path, line: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def _write_metrics(path: Path, rows: dict[int, dict]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps({"step": step, "data": rows[step]}) + "\n" for step in sorted(rows)))
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m verl_krpo.run_dir", description=__doc__.splitlines()[0])
    parser.add_argument("--no-log", action="store_true", help="the command keeps its own log")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if not given.command:
        print(" ".join(f"{key} {value:.4g}" for key, value in summary(given.run_dir).items()))
        return 0
    try:
        return run(given.run_dir, given.command, log=not given.no_log)
    except ValueError as error:
        print(f"run_dir: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
