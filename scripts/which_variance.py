"""The picture of docs/which_variance.md: a policy over two answers, the right one with probability p.

python scripts/which_variance.py [docs/figures]

With one logit the score of the right answer is 1 - p, of the wrong one -p, and the gradient of a response with the
baseline b is (1 - b)(1 - p) or b p: its mean is p (1 - p), its variance p (1 - p) (1 - p - b)^2. On the left that
variance, on the right the one that is left of RLOO's when prompts come in pairs and the estimators find b themselves.
"""

import sys
from pathlib import Path

import torch

from verl_krpo import AdaptiveConfig, krpo_adaptive
from verl_krpo.report import figure

PROMPTS, SIZE, BATCHES = 32, 2, 150
UNSCALED = AdaptiveConfig(scale="none")
PROMPT = torch.arange(PROMPTS).repeat_interleave(SIZE)


def exact(p: torch.Tensor, baseline: torch.Tensor | float) -> torch.Tensor:
    """Variance of the gradient of one response."""
    return p * (1 - p) * (1 - p - baseline).square()


def rloo(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    pairs = rewards.view(PROMPTS, SIZE)
    return (pairs - pairs.flip(1)).flatten()


METHODS = {
    "rloo": rloo,
    "none": lambda rewards, weights: rewards,
    "krpo_adaptive": lambda rewards, weights: krpo_adaptive(rewards, PROMPT, UNSCALED).advantages(),
    "krpo_adaptive weight=score": lambda rewards, weights: krpo_adaptive(
        rewards, PROMPT, UNSCALED, weights
    ).advantages(),
}


def drawn(p: float) -> dict[str, float]:
    """Variance of a prompt's gradient under every method, over RLOO's, on the same responses."""
    generator = torch.Generator().manual_seed(0)
    squares = dict.fromkeys(METHODS, 0.0)
    for _ in range(BATCHES):
        rewards = (torch.rand(PROMPTS * SIZE, generator=generator, dtype=torch.float64) < p).double()
        scores = rewards - p
        for name, advantages in METHODS.items():
            gradient = (advantages(rewards, scores.square()) * scores).view(PROMPTS, SIZE).mean(dim=1)
            squares[name] += (gradient - p * (1 - p)).square().sum().item()
    return {name: total / squares["rloo"] for name, total in squares.items()}


def main(out: Path) -> Path:
    """Write which_variance.png to `out`; its path."""
    drawing, ((left, right),) = figure.axes(1, 2, 10, 3.6)
    colors = figure.colors(list(METHODS))
    p = torch.linspace(0, 1, 201)
    left.plot(p, exact(p, p), color=colors["rloo"], label="b = p, the mean reward")
    left.plot(p, exact(p, 0.0), color=colors["none"], label="b = 0, no baseline")
    left.plot(p, exact(p, 1 - p), color=colors["krpo_adaptive weight=score"], label="b = 1 - p, the best baseline")
    left.set(title="variance of the gradient of one response", xlabel="p, chance of the right answer")
    left.legend(frameon=False)
    chances = [k / 20 for k in range(1, 20)]
    found = [drawn(chance) for chance in chances]
    for name in METHODS:
        right.plot(chances, [one[name] for one in found], color=colors[name], marker=".", label=name)
    right.set(title="32 prompts in pairs, RLOO = 1", xlabel="p, chance of the right answer", yscale="log")
    right.legend(frameon=False)
    return figure.save(drawing, out / "which_variance")


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/figures")))
