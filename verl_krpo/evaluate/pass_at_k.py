"""pass@k and maj@k of the samples of one problem, exact.

Of n samples of a problem, c of them right:

    pass@k    1 - C(n-c, k) / C(n, k): the probability that k samples hold a right one (arXiv 2107.03374, eq. 1)
    maj@k     the expected correctness of the most frequent answer of k samples drawn without replacement; equally
              frequent answers share, and a sample without an answer does not vote. Exact, not simulated
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import comb

import numpy as np


def pass_at(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k) for 1 <= k <= n and 0 <= c <= n."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def majority_at(answers: Sequence[str], right: Sequence[float], k: int) -> float:
    """Expected correctness of the vote of k of the samples; equal answers count as right by their mean."""
    n = len(answers)
    counts = Counter(answer for answer in answers if answer)
    silent = n - sum(counts.values())
    mean_right = {a: np.mean([r for b, r in zip(answers, right, strict=True) if b == a]) for a in counts}
    weight: dict[int, float] = {}  # an answer's count -> its share of the wins
    for answer, count in counts.items():
        if mean_right[answer] > 0 and count not in weight:
            others = list(counts.values())
            others.remove(count)
            weight[count] = sum(
                comb(count, votes) * _outvoted(others, silent, k - votes, votes)
                for votes in range(1, min(count, k) + 1)
            )
    return sum(mean_right[a] * weight[c] for a, c in counts.items() if mean_right[a] > 0) / comb(n, k)


def _outvoted(others: Iterable[int], silent: int, places: int, votes: int) -> float:
    """Ways to fill `places` from the other answers, none with more than `votes`, each way divided by 1 + ties."""
    ways = np.zeros((places + 1, places // votes + 2))  # (places filled, answers tied at `votes`)
    ways[0, 0] = 1.0
    for count in others:
        grown = ways.copy()
        for taken in range(1, min(count, votes, places) + 1):
            tie = int(taken == votes)
            grown[taken:, tie:] += comb(count, taken) * ways[:-taken, : ways.shape[1] - tie]
        ways = grown
    filled = sum(comb(silent, places - s) * ways[s] for s in range(max(0, places - silent), places + 1))
    return float(np.sum(filled / np.arange(1, ways.shape[1] + 1)))


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
