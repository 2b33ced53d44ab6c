"""Which prompts a step rolls out, and how many responses each gets: every way at equal rollouts.

A pool of POOL prompts of the task `mixed` comes again and again in new orders. In dead_30 three in ten are products,
which the model gets right one time in a hundred; sums and differences are half of the rest each. A step has PROMPTS
groups of SIZE, taken from FROM times as many candidates, which are the next ones of the order:

    uniform     the first ones: what verl does
    dapo        the next ones again and again, until PROMPTS groups have rewards that differ (DAPO's dynamic sampling,
                arXiv 2503.14476), at most ROUNDS times; all rollouts count
    mopps       the draws of a Beta that are nearest to 1/2 (MoPPS, 2507.04632)
    spo         at random by sqrt(v (1 - v)) + 0.05, v SPO's tracker (2509.13232)
    dps         those that a hidden Markov model holds for neither all right nor all wrong (2603.10887)
    oracle      those with the largest p (1 - p) of the model as it is: what no forecast can know better
    signal      krpo_memory's select=signal (plugin/next_batch.py)
    same        the same with objective=same: the objective stays that of all candidates
    allocate    uniform, and allocate=signal: more responses for a larger signal, as many in all
    both        signal and allocate

A method is a choice and an estimator, uniform_rloo and so on. curve: mean probability that a response is right, over
the whole pool and over prompts outside of it (`transfer`), after every PROMPTS x SIZE x EVERY rollouts.
"""

import copy
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from verl_krpo import choice
from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.advantage.weights import score_weights
from verl_krpo.config import Choice, MemoryConfig, Objective
from verl_krpo.lab.train import loop, losses, results, study
from verl_krpo.lab.train.tasks import Problem, mixed
from verl_krpo.plugin import next_batch
from verl_krpo.replay import rollouts as visits
from verl_krpo.replay.trackers import TRACKERS
from verl_krpo.report import tables

TASK = "mixed"
POOL, PROMPTS, SIZE, FROM, ROUNDS = 256, 16, 4, 4, 8
STEPS, EVERY, LEARNING_RATE = 150, 10, 1e-4

CONDITIONS = {"dead_0": "+-", "dead_30": "+++++++-------******", "dead_60": "+-***"}  # what is drawn from
CHOICES = {  # by the estimator of advantages: RLOO, krpo_memory without and with weights
    "rloo": ("uniform", "dapo", "mopps", "spo", "dps", "oracle", "signal", "same", "allocate", "both"),
    "memory": ("uniform", "dapo", "oracle", "signal", "same", "allocate", "both"),
    "memory_score": ("uniform", "oracle", "signal", "same", "both"),
}
OURS = {
    "signal": MemoryConfig(select=Choice.signal),
    "same": MemoryConfig(select=Choice.signal, objective=Objective.same),
    "allocate": MemoryConfig(allocate=Choice.signal),
    "both": MemoryConfig(select=Choice.signal, allocate=Choice.signal),
}
METHODS = {f"{way}_{name}": (way, name) for name, ways in CHOICES.items() for way in ways}


class Step(NamedTuple):
    """What a step rolls out: places in the pool, and of each how many responses and what its advantages count."""

    chosen: np.ndarray
    counts: np.ndarray
    weights: np.ndarray


class Rolled(NamedTuple):
    """places, weights: (prompts,); owner: (rows,) whose response a row is; rewards: (rows,)."""

    places: np.ndarray
    weights: np.ndarray
    owner: np.ndarray
    prompts: Tensor
    sampled: loop.Responses
    rewards: Tensor

    @property
    def right(self) -> np.ndarray:
        return np.bincount(self.owner, self.rewards.numpy(), len(self.places))

    @property
    def counts(self) -> np.ndarray:
        return np.bincount(self.owner, minlength=len(self.places))

    def of(self, kept: np.ndarray) -> "Rolled":
        """The prompts with these numbers alone."""
        rows = np.flatnonzero(np.isin(self.owner, kept))
        owner = np.searchsorted(kept, self.owner[rows])
        sampled = loop.Responses(*(column[rows] for column in self.sampled))
        return Rolled(self.places[kept], self.weights[kept], owner, self.prompts[kept], sampled, self.rewards[rows])


def orders(rng: random.Random) -> Iterator[int]:
    """Places of the pool, in a new order every time."""
    while True:
        yield from rng.sample(range(POOL), POOL)


def decide(way: str, candidates: np.ndarray, memory: PromptMemory, trackers: dict, step: int, rng) -> Step:
    """What is rolled out of the candidates, places in the pool."""
    if way in OURS:
        taken = next_batch.choose(memory, candidates, step, OURS[way], PROMPTS, SIZE, rng)
        return Step(candidates[taken.rows], taken.responses, taken.weights)
    chosen = np.arange(PROMPTS)
    if way == "mopps":
        drawn = rng.beta(*trackers["MoPPS"].counts[candidates].T)
        chosen = np.argsort(np.abs(drawn - 0.5))[:PROMPTS]
    elif way == "spo":
        value, _ = trackers["SPO"].predict(candidates, step)
        often = np.sqrt(value * (1 - value)) + 0.05
        chosen = rng.choice(len(candidates), PROMPTS, replace=False, p=often / often.sum())
    elif way == "dps":
        mean, var = trackers["DPS"].predict(candidates, step)
        some = 4 * (mean - var - mean**2)  # of chances 0, 1/2 and 1 that of 1/2
        chosen = choice.choose(np.maximum(some, 0), PROMPTS, rng)
    return all_alike(candidates[chosen])


def all_alike(places: np.ndarray) -> Step:
    """SIZE responses to each prompt."""
    return Step(places, np.full(len(places), SIZE), np.ones(len(places)))


def roll(first: loop.Start, model, pool: list[Problem], asked: Step, generator: torch.Generator) -> Rolled:
    problems = [pool[place] for place in asked.chosen]
    owner = np.arange(len(problems)).repeat(asked.counts)
    prompts = first.encode(problems)
    end, pad = first.tokenizer.eos_token_id, first.tokenizer.pad_token_id
    counts = torch.from_numpy(asked.counts)
    sampled = loop.sample(model, prompts, counts, end, pad, generator, first.task.max_tokens)
    rewards = loop.rewards(first, sampled.tokens, problems, owner)
    return Rolled(asked.chosen, asked.weights, owner, prompts, sampled, rewards)


def dynamic(first: loop.Start, model, pool: list[Problem], waiting: Iterator[int], generator) -> tuple[Rolled, int]:
    """DAPO's groups, and how many rollouts they took."""
    found: list[Rolled] = []
    while len(found) < ROUNDS:
        places = np.array([next(waiting) for _ in range(PROMPTS)])
        rolled = roll(first, model, pool, all_alike(places), generator)
        found.append(rolled.of(np.flatnonzero((rolled.right > 0) & (rolled.right < rolled.counts))))
        if sum(len(part.places) for part in found) >= PROMPTS:
            break
    width = max(part.sampled.tokens.shape[1] for part in found)
    padded = [
        loop.Responses(*(torch.nn.functional.pad(column, (0, width - column.shape[1])) for column in part.sampled))
        for part in found
    ]
    before = np.cumsum([0] + [len(part.places) for part in found])
    whole = Rolled(
        np.concatenate([part.places for part in found]),
        np.concatenate([part.weights for part in found]),
        np.concatenate([part.owner + start for part, start in zip(found, before, strict=False)]),
        torch.cat([part.prompts for part in found]),
        loop.Responses(*(torch.cat(columns) for columns in zip(*padded, strict=True))),
        torch.cat([part.rewards for part in found]),
    )
    return whole.of(np.arange(min(PROMPTS, len(whole.places)))), len(found) * PROMPTS * SIZE


def rloo(rewards: Tensor, owner: np.ndarray) -> Tensor:
    """(rows,) verl's, whose groups may be uneven; 0 where a group is of one."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    ones = torch.ones(len(rewards), 1, dtype=rewards.dtype)
    return get_adv_estimator_fn("rloo_vectorized")(rewards[:, None], ones, index=owner)[0][:, 0]


def run(models: Path, condition: str, method: str, seed: int, record: Path | None = None) -> dict:
    """Train under a choice and an estimator; the run's line of the CSV.

    record: a folder, for the rewards of every visit as lines that `study forecast` reads, a new file a run.
    """
    began = time.perf_counter()
    way, estimator = METHODS[method]
    log = record / f"{condition}_{method}_seed{seed}.jsonl" if record else None
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    first, rng = loop.start(models, TASK), random.Random(seed)
    pool = mixed(rng, POOL, operations=CONDITIONS[condition])
    outside = mixed(random.Random(0), 2 * loop.HELD_OUT, True, CONDITIONS[condition])
    looked = [first.right(problems) for problems in (pool, outside)]
    waiting = orders(rng)
    model = copy.deepcopy(first.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    memory, trackers = PromptMemory(), {name: TRACKERS[name](POOL) for name in ("MoPPS", "SPO", "DPS")}
    mark, rollouts, step, alive = PROMPTS * SIZE * EVERY, 0, 0, []
    looks = [[loop.look(model, part)["accuracy"] for part in looked]]
    while rollouts < STEPS * PROMPTS * SIZE:
        step += 1
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        if way == "dapo":
            rolled, took = dynamic(first, model, pool, waiting, generator)
        else:
            count = PROMPTS if way in ("uniform", "allocate") else PROMPTS * FROM
            candidates = np.array(list(dict.fromkeys(next(waiting) for _ in range(count))))
            if way == "oracle":
                p, _ = loop.probabilities(model, tuple(column[candidates] for column in looked[0]))
                asked = all_alike(candidates[torch.topk(p * (1 - p), PROMPTS).indices])
            else:
                asked = decide(way, candidates, memory, trackers, step, np.random.default_rng([seed, step]))
            rolled, took = roll(first, model, pool, asked, generator), PROMPTS * SIZE
        rollouts += took
        if log:
            visits.record(log, step, rolled.places[rolled.owner], rolled.rewards.tolist())
        alive.append(((rolled.right > 0) & (rolled.right < rolled.counts)).mean() if len(rolled.places) else 0.0)
        if len(rolled.places):  # DAPO may find no group that differs
            advantage, memory = _advantages(estimator, rolled, memory, step)
            for tracker in trackers.values():
                tracker.update(rolled.places, step, rolled.right, rolled.counts)
            _update(model, optimizer, rolled, advantage * torch.from_numpy(rolled.weights[rolled.owner]))
        while rollouts >= mark * len(looks):
            looks.append([loop.look(model, part)["accuracy"] for part in looked])
    curve, transfer = (" ".join(f"{value:.4f}" for value in values) for values in zip(*looks, strict=True))
    row = {"condition": condition, "method": method, "seed": seed, "rollouts": mark, "curve": curve}
    row |= {"transfer": transfer, "alive": float(np.mean(alive)), "steps": step}
    return row | {"seconds": time.perf_counter() - began}


def show(path: Path, measure: str = "curve") -> str:
    """What a CSV of runs says, a line a pool and way to choose; writes choice.md and curves beside it.

    Accuracy at the end: of uniform itself, and of the others what they differ by from uniform under the same estimator,
    paired by seed. Rollouts: until the level that uniform_rloo has after three quarters of its run, over its own.
    """
    out, rows = study.read(path, measure)
    found = {}  # (condition, method): its line
    for name in CHOICES:
        under = [row for row in rows if METHODS[row["method"]][1] == name or row["method"] == "uniform_rloo"]
        for line in results.summary(under, f"uniform_{name}"):
            found.setdefault((line["condition"], line["method"]), line)
    body = []
    for condition, way in itertools.product(CONDITIONS, dict.fromkeys(itertools.chain(*CHOICES.values()))):
        lines = [found.get((condition, f"{way}_{name}")) for name in CHOICES]
        if any(lines):
            body.append([condition, way, *(_end(line) for line in lines), *(_rollouts(line) for line in lines)])
    text = tables.table(["pool", "choice", *CHOICES, *(f"rollouts, {name}" for name in CHOICES)], body)
    out.mkdir(exist_ok=True)
    (out / "choice.md").write_text(text + "\n")
    results.draw_curves(rows, out / "curves")
    return text


def _end(line: dict | None) -> str:
    if line is None:
        return ""
    uniform = line["method"] == line["other"]
    return f"{line['accuracy']:.3f}" if uniform else results.signed(line["to_other"], line["to_other_half"])


def _rollouts(line: dict | None) -> str:
    return results.rollouts_cell(line) if line else ""


def _advantages(estimator: str, rolled: Rolled, memory: PromptMemory, step: int) -> tuple[Tensor, PromptMemory]:
    """(rows,), and the memory after the step, which choosing needs whatever the estimator."""
    weights = None
    if estimator == "memory_score":
        weights = score_weights(rolled.sampled.log_probs, rolled.sampled.mask)
    estimate, memory = krpo_memory(rolled.rewards, rolled.places[rolled.owner], memory, weights=weights, step=step)
    advantage = rloo(rolled.rewards, rolled.owner) if estimator == "rloo" else estimate.advantages()
    return advantage, memory


def _update(model, optimizer, rolled: Rolled, advantage: Tensor) -> None:
    rows = advantage.nonzero()[:, 0]
    if not len(rows):
        return
    responses, mask = rolled.sampled.tokens[rows], rolled.sampled.mask[rows]
    log_prob = loop.log_probs(model, rolled.prompts, responses, torch.from_numpy(rolled.owner)[rows])
    values = advantage[rows, None].to(log_prob.dtype)
    optimizer.zero_grad(set_to_none=True)
    losses.reinforce(log_prob, values, mask, rolled.sampled.mask, "token-mean").backward()
    optimizer.step()
