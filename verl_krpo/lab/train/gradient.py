"""The signal-to-noise ratio of the tiny model's own policy gradient, under every estimator.

RLOO trains the model; before, halfway and after, its weights are held still and many batches are sampled. Every
estimator sees the same batches and gives a gradient g for each, all of the model's parameters:

    signal  |E g|^2     mean of g_a . g_b over pairs of different batches
    noise   tr Var g    mean of |g|^2, less the signal
    snr     signal / noise, over RLOO's; 95 % interval over the batches (bootstrap, paired)
"""

from itertools import islice
from pathlib import Path

import numpy as np
import torch

from verl_krpo.lab.train import on_policy
from verl_krpo.report import intervals, tables

SHOWN = ("grpo", "rloo", "jspo", "krpo", "krpo_adaptive")
CHECKPOINTS = (0, 30, 60)  # steps of RLOO


def checkpoint(first: on_policy.Start, condition: on_policy.Condition, steps: int) -> torch.nn.Module:
    """The model after so many steps of RLOO."""
    if not steps:
        return first.model
    model, _ = next(islice(on_policy.train(first, condition, "rloo", seed=0), steps - 1, None))
    return model


def gradients(
    first: on_policy.Start, model, condition: on_policy.Condition, batches: int, seed: int
) -> dict[str, torch.Tensor]:
    """Method -> (batches, parameters), the same samples for all."""
    parameters = list(model.parameters())
    found: dict[str, list[torch.Tensor]] = {name: [] for name in SHOWN}
    for step, problems in zip(range(batches), on_policy.visits(condition, seed), strict=False):
        batch = on_policy.roll(first, model, condition, problems, seed, step)
        for name in SHOWN:
            loss = on_policy.surrogate(model, batch, on_policy.METHODS[name]()(batch))
            gradient = torch.autograd.grad(loss, parameters)
            found[name].append(torch.cat([part.flatten() for part in gradient]))
    return {name: torch.stack(of_batches) for name, of_batches in found.items()}


def snr(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """|E g|^2 / tr Var g from the inner products (batches, batches), for every row of weights (resamples, batches)."""
    diagonal = np.diag(products)
    same = weights**2
    signal = (np.einsum("ra,ab,rb->r", weights, products, weights) - same @ diagonal) / (1 - same.sum(1))
    return signal / (weights @ diagonal - signal)


def measure(model: Path, condition: str, batches: int = 100, seed: int = 1000) -> list[dict]:
    """One row a checkpoint and method."""
    first, settings = on_policy.start(model), on_policy.CONDITIONS[condition]
    weights = intervals.weights(np.random.default_rng(0), batches)
    rows = []
    for steps in CHECKPOINTS:
        held = checkpoint(first, settings, steps)
        accuracy = on_policy.accuracy(held, first.held_out)
        ratios = {}
        for name, gradient in gradients(first, held, settings, batches, seed).items():
            gradient = gradient / gradient.norm(dim=1).mean()  # of no consequence but for rounding
            ratios[name] = snr((gradient @ gradient.T).double().numpy(), weights)
        for name, ratio in ratios.items():
            value, low, high = intervals.of_weighted(ratio / ratios["rloo"])
            row = {"condition": condition, "steps": steps, "accuracy": accuracy, "method": name, "batches": batches}
            rows.append(row | {"snr": float(ratio[0]), "to_rloo": value, "to_rloo_low": low, "to_rloo_high": high})
    return rows


def run(out: Path, model: Path, condition: str = "pairs", batches: int = 100) -> str:
    """Write gradient.csv to `out`; the table as text."""
    rows = measure(model, condition, batches)
    tables.write_csv(out / "gradient.csv", rows)
    return as_table(rows)


def as_table(rows: list[dict]) -> str:
    """The rows, of `measure` or as a CSV has them, for reading."""
    lines = [
        [
            f"{row['steps']} steps, {float(row['accuracy']):.2f}",
            row["method"],
            f"{float(row['snr']):.3f}",
            "{:.2f} ({:.2f} to {:.2f})".format(*(float(row[k]) for k in ("to_rloo", "to_rloo_low", "to_rloo_high"))),
        ]
        for row in rows
    ]
    return tables.table(["RLOO's steps, accuracy", "method", "snr of a batch", "over RLOO's"], lines)
