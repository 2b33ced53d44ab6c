"""Where along a response a policy loss clips.

A run of REINFORCE, whose policy no clip range holds. After every step its batch is read once more under the model after
the step's updates, which is as far from the one that sampled it as the batch ever sees. Of the tokens in a stretch of
the response, over all steps: the mean |log-ratio|, and the share that a loss leaves without gradient.
"""

import itertools
from pathlib import Path

import torch
from torch import Tensor

from verl_krpo.lab.train import loop
from verl_krpo.lab.train.conditions import CONDITIONS
from verl_krpo.lab.train.losses import LOSSES, of_verl
from verl_krpo.report import tables

ENDS = (0, 32, 64, 128, 256, 512, 1024)  # of the stretches, in tokens
SHOWN = (
    "vanilla", "vanilla_tight", "gspo", "minpro", "kpo", "kpo_Q0.001_clip0.004", "kpo_measured", "kpo_token",
    "kpo_token_Q0.001_clip0.004",
)  # fmt: skip


def without_gradient(name: str, old_log_prob: Tensor, log_prob: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """(rows, tokens) whether a loss of losses.py clips the token; advantage: (rows, 1), none of them 0."""
    log_prob = log_prob.detach().requires_grad_()
    loss = of_verl(LOSSES[name], "token-mean")(old_log_prob, log_prob, advantage, mask)
    return mask & (torch.autograd.grad(loss, log_prob)[0] == 0)


def of_run(models: Path, condition: str, seed: int = 0) -> list[dict]:
    """One line a measure, `log-ratio` or a loss; a column a stretch."""
    settings = CONDITIONS[condition]
    first, found = loop.start(models, settings.task), {}
    for step in loop.train(first, settings, "reinforce", seed):
        owner = torch.from_numpy(step.batch.owners)
        with torch.no_grad():
            new = loop.log_probs(step.model, step.batch.prompts, step.batch.responses, owner)
        told = step.advantage[:, 0] != 0
        old, new, advantage, mask = (
            part[told] for part in (step.batch.log_probs, new, step.advantage, step.batch.mask)
        )
        found.setdefault("log-ratio", []).append((new - old).abs() * mask)
        for name in SHOWN:
            found.setdefault(name, []).append(without_gradient(name, old, new, advantage, mask))
        found.setdefault("tokens", []).append(mask)
    width = max(part.shape[1] for part in found["tokens"])
    summed = {
        name: sum(torch.nn.functional.pad(part.double().sum(0), (0, width - part.shape[1])) for part in parts)
        for name, parts in found.items()
    }
    tokens = summed.pop("tokens")
    return [
        {"condition": condition, "of": name}
        | {f"{a + 1} to {b}": float(sums[a:b].sum() / tokens[a:b].sum()) for a, b in _stretches(width)}
        for name, sums in summed.items()
    ]


def _stretches(width: int) -> list[tuple[int, int]]:
    return [(a, b) for a, b in itertools.pairwise(ENDS) if a < width]


def run(out: Path, models: Path, conditions: list[str]) -> str:
    """Write clipped.csv and table.md to `out`; the table as text."""
    lines = [line for condition in conditions for line in of_run(models, condition)]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    lines = [{key: line.get(key, "") for key in columns} for line in lines]
    tables.write_csv(out / "clipped.csv", lines)
    text = tables.markdown(lines)
    (out / "table.md").write_text(text + "\n")
    return text
