"""`verl-krpo bench TABLE [--rounds N] [--device cuda] [--json FILE]`: a Markdown table of what something costs.

    filter   the Kalman filters against the published approach
    kpo      the KPO loss, forward and backward, against verl's vanilla and the published loss
    krpo     the KRPO estimator against verl's grpo and grpo_vectorized (on a CPU, where verl computes advantages)
    memory   what krpo_memory's memory of many prompts costs a step and a checkpoint
    reward   answers that the mathematics reward grades in a second, against verl's wrapper and math-verify alone

One thread on a CPU.
"""

import argparse
import json
from pathlib import Path

import torch

from verl_krpo.lab.bench import filter as filter_bench
from verl_krpo.lab.bench import kpo, krpo, memory, reward
from verl_krpo.lab.bench.timing import machine
from verl_krpo.report.tables import markdown

TABLES = {
    "filter": filter_bench.table,
    "kpo": kpo.table,
    "krpo": krpo.table,
    "memory": memory.table,
    "reward": reward.table,
}

HOST_ONLY = ("krpo", "memory", "reward")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="verl-krpo bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and (options.table in HOST_ONLY or not torch.cuda.is_available()):
        parser.error(f"{options.table} runs on a CPU only" if options.table in HOST_ONLY else "no CUDA device here")
    torch.set_num_threads(1)
    rows = TABLES[options.table](options.rounds, options.device)
    print(markdown(rows))
    if options.json:
        report = {"table": options.table, "rounds": options.rounds, "machine": machine(options.device), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
