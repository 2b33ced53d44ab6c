"""What filters, loss, estimator, memory and rewards cost: `verl-krpo bench`. One thread on a CPU."""

import importlib
import json
from pathlib import Path

TABLES = {
    "filter": "the Kalman filters against the published approach",
    "kpo": "the KPO loss, forward and backward, against verl's vanilla and the published loss",
    "krpo": "the KRPO estimator against verl's grpo and grpo_vectorized (on a CPU, where verl computes advantages)",
    "memory": "what krpo_memory's memory of many prompts costs a step and a checkpoint",
    "reward": "answers that the mathematics reward grades in a second, against verl's wrapper and math-verify alone",
}
HOST_ONLY = ("krpo", "memory", "reward")


def run(table: str, rounds: int = 15, device: str = "cpu", path: Path | None = None) -> str:
    """The table as Markdown; its rows and the machine go to `path` too. ValueError for no such table or device."""
    import torch

    from verl_krpo.lab.bench.timing import machine
    from verl_krpo.report.tables import markdown

    if table not in TABLES:
        raise ValueError(f"no table {table}: there are {', '.join(TABLES)}")
    if device == "cuda" and (table in HOST_ONLY or not torch.cuda.is_available()):
        raise ValueError(f"{table} runs on a CPU only" if table in HOST_ONLY else "no CUDA device here")
    torch.set_num_threads(1)
    rows = importlib.import_module(f"verl_krpo.lab.bench.{table}").table(rounds, device)
    if path:
        report = {"table": table, "rounds": rounds, "machine": machine(device), "rows": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    return markdown(rows)
