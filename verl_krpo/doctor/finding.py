"""What every look gives, and the exit statuses of doctor and preflight."""

from collections.abc import Iterable
from dataclasses import dataclass

NOT_INSTALLED = 10  # the entry point is not visible to verl
BROKEN = 11  # the plugin's import fails
HIDDEN = 12  # VERL_USE_EXTERNAL_PLUGINS hides the plugin
WRONG_VERL = 13  # verl is missing, too old, or does not load entry points
WRONG_JOB = 14  # a typo in a key, a value out of range
NOT_IN_WORKER = 15  # a Ray worker has no plugin
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
