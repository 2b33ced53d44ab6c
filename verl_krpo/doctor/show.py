"""doctor: what it looks at, and its findings as a table or JSON."""

import json
from dataclasses import asdict

from verl_krpo.doctor import installation, nodes
from verl_krpo.doctor.finding import WRONG_JOB, Finding, exit_status

COLORS = {"ok": "green", "setting": "", "note": "cyan", "warning": "yellow", "failure": "bold red"}


def doctor(overrides: list[str], ray: bool = True, as_json: bool = False) -> int:
    """`verl-krpo doctor`: what comes later is left out where an earlier failure decides it. The exit status."""
    findings = installation.look()
    if ray and not exit_status(findings):
        findings += nodes.ask()
    if overrides and not exit_status(findings):
        from verl_krpo.doctor import job  # the estimators: they may be what cannot be imported

        findings += job.look(overrides)
    if as_json:
        found = [asdict(finding) for finding in findings]
        print(json.dumps({"exit_status": exit_status(findings), "findings": found}, indent=2))
    else:
        show(findings)
    return exit_status(findings)


def show(findings: list[Finding]) -> None:
    """The report on the terminal; the traceback of a failed import comes last."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=40)
    table.add_column(overflow="fold")
    for f in findings:
        if not f.section:
            table.add_row(Text(f.status, style=COLORS[f.status]), Text(f.check), Text(_with_fix(f)))
    console.print(table)
    for section in dict.fromkeys(f.section for f in findings if f.section):
        console.print(f"\n{section}:")
        for f in findings:
            if f.section == section and f.status == "setting":
                console.print(Text(f"  {f.check} = {f.text}"))
            elif f.section == section:
                console.print(Text(f.status, style=COLORS[f.status]), Text(f"{f.check}: {_with_fix(f)}"))
    for f in findings:
        if f.code and f.detail:
            console.print(Text("\n" + f.detail.rstrip()))
    status, warned = exit_status(findings), sum(f.status == "warning" for f in findings)
    if status:
        verdict = "the plugin is in force, this job is not right" if status == WRONG_JOB else "not in force"
        console.print(Text(f"\n{verdict} (exit status {status})", style="bold red"))
    else:
        console.print(
            Text(f"\nin force{f', {warned} warning' if warned else ''}{'s' * (warned > 1)}", style="bold green")
        )


def _with_fix(finding: Finding) -> str:
    return f"{finding.text}: {finding.fix}" if finding.fix else finding.text
