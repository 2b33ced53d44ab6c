"""How much of a policy gradient is noise, under every estimator: the tiny model's own, or a pretrained one's.

A model is held still while many batches are sampled. Every method sees the same batches and gives each a gradient g:

    signal    |E g|^2     mean of g_a . g_b over pairs of different batches
    variance  tr Var g    mean of |g|^2, less the signal
    snr       signal / variance

both over RLOO's, with 95 % intervals over the batches (bootstrap, paired). A variance is shown of methods whose E g is
the same, UNBIASED: what divides an advantage, or takes a part of its own reward away (opo, otb), scales signal and
noise alike. (batch_mean takes away 1 / rows of it.) Of these the variance says more than the snr where the signal is
small, and as uncertain.

A tiny model is held still before, halfway through and after its training by RLOO. Of a pretrained one the gradient is
that of its last layers (pretrained.py). Gradients are kept as sketches (`sketch`), a file a batch, and those that are
there are not computed again.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from verl_krpo.lab.train import loop, losses
from verl_krpo.lab.train.conditions import CONDITIONS
from verl_krpo.lab.train.methods import METHODS, Batch
from verl_krpo.report import intervals, tables

ADAPTIVE = ("krpo_adaptive", "krpo_adaptive_score", "krpo_adaptive_exact")
UNBIASED = ("rloo", "none", "batch_mean", "jspo", *(f"{name}_unscaled" for name in ADAPTIVE))
OF_PRETRAINED = (*UNBIASED, "opo", "otb")
SHOWN = (*OF_PRETRAINED, "grpo", "krpo", *ADAPTIVE)
SEED = 1000  # of the batches
SKETCH = 65_537  # numbers a gradient; a prime, so that no row of a weight matrix keeps falling into the same bins


class Subject(NamedTuple):
    """A model held still, the parameters whose gradient counts, and its batches by number."""

    name: str
    accuracy: float
    model: torch.nn.Module
    parameters: list[Tensor]
    batch: Callable[[int], Batch]


def of_training(models: Path, name: str) -> Iterator[Subject]:
    """The tiny model before, halfway through and after a condition's training; each is in use until the next is."""
    condition = CONDITIONS[name]
    first = loop.start(models, condition.task)

    def subject(model: torch.nn.Module, steps: int) -> Subject:
        def batch(number: int) -> Batch:
            generator = torch.Generator().manual_seed(SEED * 100_003 + number)
            problems = next(loop.visits(first.task, condition, SEED * 100_003 + number))
            return loop.roll(first, model, condition, problems, number, generator)

        accuracy = loop.look(model, first.held_out)["accuracy"]
        return Subject(f"{name}_{steps}", accuracy, model, list(model.parameters()), batch)

    yield subject(first.model, 0)
    for steps, step in enumerate(loop.train(first, condition, "rloo", seed=0), start=1):
        if steps in (condition.steps // 2, condition.steps):
            yield subject(step.model, steps)


@functools.lru_cache(maxsize=1)
def _signs(count: int) -> Tensor:
    return 2 * torch.randint(2, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int8) - 1


def sketch(gradient: Iterable[Tensor]) -> Tensor:
    """(SKETCH,): entry i under a random sign is added to bin i mod SKETCH (CountSketch; Charikar et al. 2002).

    An inner product of two sketches is that of the gradients, within |a| |b| / sqrt(SKETCH) or 0.4 %.
    """
    flat = torch.cat([part.flatten() for part in gradient])
    flat = flat * _signs(len(flat))
    return torch.nn.functional.pad(flat, (0, -len(flat) % SKETCH)).view(-1, SKETCH).sum(0)


def gradients(
    model: torch.nn.Module, parameters: list[Tensor], batch: Batch, methods: Iterable[str]
) -> dict[str, np.ndarray]:
    """Method -> sketch of its gradient of one batch."""
    owner = torch.from_numpy(batch.owners)
    log_prob, found = loop.log_probs(model, batch.prompts, batch.responses, owner), {}
    for name in methods:
        advantage = METHODS[name](batch).reshape(len(owner), -1).to(log_prob.dtype)
        loss = losses.reinforce(log_prob, advantage, batch.mask, batch.mask, "token-mean")
        found[name] = sketch(torch.autograd.grad(loss, parameters, retain_graph=True)).numpy()
    return found


def collect(subject: Subject, batches: int, methods: tuple[str, ...], parts: Path) -> dict[str, np.ndarray]:
    """Method -> (batches, SKETCH), `reward` -> (batches,); a batch and method that PARTS has are not computed again."""
    folder = parts / subject.name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(batches):
        path = folder / f"{number}.npz"
        known = dict(np.load(path)) if path.exists() else {}
        if missing := [name for name in methods if name not in known]:
            partial = path.with_suffix(".partial.npz")
            batch = subject.batch(number)
            known |= gradients(subject.model, subject.parameters, batch, missing)
            np.savez(partial, **known | {"reward": np.array(float(batch.rewards.mean()))})
            os.replace(partial, path)
    loaded = [np.load(folder / f"{number}.npz") for number in range(batches)]
    return {name: np.stack([part[name] for part in loaded]) for name in ("reward", *methods)}


def signal_and_variance(products: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|E g|^2 and tr Var g from inner products (batches, batches), for every row of weights (resamples, batches)."""
    diagonal = np.diag(products)
    same = weights**2
    signal = (np.einsum("ra,ab,rb->r", weights, products, weights) - same @ diagonal) / (1 - same.sum(1))
    return signal, weights @ diagonal - signal


def measure(subject: Subject, batches: int, methods: tuple[str, ...], parts: Path) -> list[dict]:
    """One row a method."""
    found = collect(subject, batches, methods, parts)
    weights = intervals.weights(np.random.default_rng(0), batches)
    values = {name: signal_and_variance(found[name] @ found[name].T.astype(np.float64), weights) for name in methods}
    (signal_of_rloo, variance_of_rloo), rows = values["rloo"], []
    for name, (signal, variance) in values.items():
        row = {"model": subject.name, "accuracy": subject.accuracy, "reward": float(found["reward"].mean())}
        row |= {"method": name, "batches": batches, "snr": float((signal / variance)[0])}
        snr_to_rloo = signal / variance * (variance_of_rloo / signal_of_rloo)
        for key, ratio in (("snr_to_rloo", snr_to_rloo), ("variance_to_rloo", variance / variance_of_rloo)):
            row |= intervals.of_weighted(ratio).columns(key)
        rows.append(row)
    return rows


def run(out: Path, subjects: Iterable[Subject], batches: int, methods: tuple[str, ...], parts: Path) -> str:
    """Write a CSV a subject to `out`, and its table beside it; the tables as text."""
    texts = []
    for subject in subjects:
        rows = measure(subject, batches, methods, parts)
        tables.write_csv(out / f"{subject.name}.csv", rows)
        texts.append(as_table(rows))
        (out / f"{subject.name}.md").write_text(texts[-1] + "\n")
    return "\n\n".join(texts)


def as_table(rows: list[dict]) -> str:
    """The rows, of `measure` or as a CSV has them, for reading."""
    return tables.markdown(
        [
            {
                "model": f"{row['model']}, reward {float(row['reward']):.2f}",
                "method": row["method"],
                "snr of a batch": f"{float(row['snr']):.3f}",
                "over RLOO's": tables.interval(row, "snr_to_rloo", 2),
                "variance over RLOO's": tables.interval(row, "variance_to_rloo", 2)
                if row["method"] in UNBIASED
                else "-",
            }
            for row in rows
        ]
    )
