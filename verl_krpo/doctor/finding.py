"""What every look gives."""

from collections.abc import Iterable
from dataclasses import dataclass

NOT_INSTALLED, BROKEN, HIDDEN, WRONG_VERL, WRONG_JOB, NOT_IN_WORKER = 10, 11, 12, 13, 14, 15
MISSING = 1  # of preflight: the job would miss something here


@dataclass
class Finding:
    """One line of a report.

    status: ok, setting, note, warning or failure. fix: what to do about it. detail: a traceback, say. section: the
    part of the report. code: the exit status of a failure, else 0.
    """

    check: str
    status: str
    text: str
    fix: str = ""
    detail: str = ""
    section: str = ""
    code: int = 0


def missing(text: str, fix: str) -> Finding:
    """What a job would miss on this machine, and what to do about it."""
    return Finding("job", "failure", text, fix, code=MISSING)


def exit_status(findings: Iterable[Finding]) -> int:
    """The code of the first failure, 0 without one."""
    return next((finding.code for finding in findings if finding.code), 0)
