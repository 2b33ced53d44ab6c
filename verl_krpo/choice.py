"""Which prompts the next step rolls out, and how many responses each of them gets, by what a memory expects of them.

A prompt whose responses all earn the same teaches nothing: what a gradient has from it grows with the variance of its
rewards. Of a prompt whose rewards have the mean m and lie within [a, b] that is at most

    s(m) = (m - a)(b - m)        which it is where every reward is either a or b (Bhatia and Davis 2000)

its *signal*; p (1 - p) of right answers where these earn 1 and wrong ones 0. (Under weights of responses m is the
weighted mean, and s what a unit of weight adds to the gradient's variance: E w (r - m)^2 / E w.) m is not known. The
memory forecasts its mean and standard deviation (PromptMemory.forecast), and m has the Beta law on [a, b] with these:

    draw        s of one draw of m (Thompson 1933): a prompt that is uncertain has its chances
    expected    E s = s(mean) - std^2

Two ways to take `count` of a pool of candidates. `choose` takes the largest signals: the steps train on other prompts
than the data holds. `include` leaves the objective as it is, the mean over the pool. It takes prompt i with probability

    pi_i  proportional to  (1 - FLOOR) sqrt(s_i) / mean sqrt(s) + FLOOR,   at most 1,   sum pi = count

by systematic sampling (Madow 1949), and the mean over the pool of anything x is without bias that of weight x over the
prompts taken, weight = count / (pool pi). The gradient's variance that comes from rewards is sum s_i / pi_i, least with
the square root. FLOOR bounds what a wrong forecast can do: no weight is above 1 / FLOOR.

`allocate` splits `total` responses so that a mean over prompts of means over responses has the least variance,
sum s_i / n_i. Giving the next response to the largest s_i / (n_i (n_i + 1)) ends there exactly (Huntington's and Hill's
way to give states their seats), with n_i nearly proportional to sqrt(s_i).
"""

import heapq

import numpy as np
import torch

FLOOR = 0.1  # of the mean probability; a weight is at most 10
WORTH = 0.01, 1e6  # responses: a Beta law of fewer has no use, one of more is known


def signal(mean: np.ndarray, low: float, high: float) -> np.ndarray:
    """s of means that are known, (prompts,)."""
    mean = np.clip(mean, low, high)
    return (mean - low) * (high - mean)


def draw(mean: np.ndarray, std: np.ndarray, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """s of one draw of every mean, (prompts,)."""
    return signal(low + (high - low) * rng.beta(*_counts(mean, std, low, high)), low, high)


def expected(mean: np.ndarray, std: np.ndarray, low: float, high: float) -> np.ndarray:
    """E s of every prompt, (prompts,)."""
    return np.maximum(signal(mean, low, high) - std**2, 0.0)


def dead(mean: np.ndarray, std: np.ndarray, low: float, high: float, size: np.ndarray) -> np.ndarray:
    """The chance that all of `size` rewards, each `low` or `high`, are alike: E (p^size + (1 - p)^size), (prompts,)."""
    right, wrong = map(torch.from_numpy, _counts(mean, std, low, high))
    total, size = right + wrong, torch.from_numpy(size)
    below = torch.lgamma(total + size) - torch.lgamma(total)
    alike = [torch.lgamma(count + size) - torch.lgamma(count) - below for count in (right, wrong)]
    return sum(part.exp() for part in alike).numpy()


def choose(signals: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The candidates with the `count` largest signals, equal ones at random: their places, ascending."""
    _check(signals, count)
    order = rng.permutation(len(signals))
    return np.sort(order[np.argsort(-signals[order], kind="stable")[:count]])


def inclusion(signals: np.ndarray, count: int) -> np.ndarray:
    """pi, (candidates,)."""
    _check(signals, count)
    root = np.sqrt(signals)
    share = (1 - FLOOR) * root / root.mean() + FLOOR if root.any() else np.ones(len(root))
    if count == len(share):
        return np.ones(count)
    order = np.argsort(-share, kind="stable")
    largest, left = share[order], count - np.arange(len(share))
    rest = largest[::-1].cumsum()[::-1]  # from each one on
    # The first ones are certain, as long as one would get more than 1 of what those before it leave over.
    certain = int(np.argmax(largest * left <= rest * (1 - 1e-9)))
    pi = np.ones(len(share))
    pi[order[certain:]] = largest[certain:] * left[certain] / rest[certain]
    return pi


def systematic(inclusion: np.ndarray, order: np.ndarray, start: float) -> np.ndarray:
    """The candidates taken, sum(inclusion) of them, each with its probability: their places, ascending.

    Laid end to end in `order`, every candidate covers its probability of a line, which is read at `start` in [0, 1),
    1 + start, 2 + start, ...; certain ones stand beside it.
    """
    order = order[inclusion[order] < 1]
    ends = inclusion[order].cumsum()
    count = round(ends[-1]) if len(ends) else 0
    at = np.searchsorted(ends[:-1], start + np.arange(count), side="right")  # beyond the last end but one: the last
    return np.sort(np.concatenate([np.flatnonzero(inclusion >= 1), order[at]]))


def include(signals: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` candidates, each taken with its probability pi: their places, ascending, and their weights, (count,)."""
    pi = inclusion(signals, count)
    chosen = systematic(pi, rng.permutation(len(pi)), rng.random())
    return chosen, count / (len(pi) * pi[chosen])


def effective_size(weights: np.ndarray) -> float:
    """How many equal weights make a mean as certain as these (Kish 1965)."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


def allocate(signals: np.ndarray, total: int, least: int = 1) -> np.ndarray:
    """How many of `total` responses each prompt gets, (prompts,), at least `least`."""
    _check(signals, 0)
    if least < 1 or total < least * len(signals):
        raise ValueError(f"{total} responses for {len(signals)} prompts, at least {least} each: raise the total")
    counts = np.full(len(signals), least)
    queue = [(-s / (least * (least + 1)), least, i) for i, s in enumerate(signals.tolist())]
    heapq.heapify(queue)
    for _ in range(total - counts.sum()):
        _, n, i = queue[0]
        counts[i] = n + 1
        heapq.heapreplace(queue, (-signals[i] / ((n + 1) * (n + 2)), n + 1, i))
    return counts


def _check(signals: np.ndarray, count: int) -> None:
    if count > len(signals):
        raise ValueError(f"{count} of {len(signals)} candidates cannot be taken: give more candidates")
    wrong = np.flatnonzero(~(np.isfinite(signals) & (signals >= 0)))
    if len(wrong):
        raise ValueError(f"the signal of candidate {wrong[0]} is {signals[wrong[0]]}: a finite number >= 0 is needed")


def _counts(mean: np.ndarray, std: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """alpha and beta of the Beta laws, (prompts,): of so many responses that earned `high` and `low`."""
    width = (high - low) or 1.0
    share = np.clip((mean - low) / width, 1e-9, 1 - 1e-9)
    worth = np.clip(share * (1 - share) / np.maximum(std / width, 1e-9) ** 2 - 1, *WORTH)
    return share * worth, (1 - share) * worth
