"""KPO where it is meant to matter: long answers and many updates a batch.

The tiny model is shown `length` digits and writes each of them plus one, modulo ten; only an answer that is right to
the last digit is rewarded. It is warm-started on answers in which digits are drawn anew so often that three answers of
ten are right. Every batch is sampled once, its advantages are RLOO's over their standard deviation, and `updates`
mini-batches are made of it, one Adam step each, the gradient's norm clipped at 1 as verl does.

Losses are verl's own by their `loss_mode`, the product's `kpo` among them, aggregated by seq-mean-token-mean;
`reinforce` is the same with every ratio at 1. Accuracy is computed, not sampled: the probability of the right answer,
its mean over digits that nobody trains on.
"""

import copy
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import trange

from verl_krpo import tiny_model
from verl_krpo.lab.train.on_policy import log_probs, sample

HELD_OUT = 64
RIGHT = 0.3  # of the demonstrations


@dataclass(frozen=True)
class Condition:
    """prompts x size rollouts a step, cut into `updates` mini-batches."""

    name: str
    length: int
    learning_rate: float
    steps: int
    updates: int = 16
    prompts: int = 16
    size: int = 8
    every: int = 1  # steps from one look at the accuracy to the next


CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("calm", 32, 3e-4, 15),
        Condition("harsh", 32, 1e-3, 20),
        Condition("calm_long", 128, 3e-4, 15),
        Condition("harsh_long", 128, 1e-3, 20),
    )
}


class Loss(NamedTuple):
    """verl's loss_mode (None: REINFORCE), its clip range, and keys of policy_loss.kpo."""

    mode: str | None
    low: float = 0.2
    high: float = 0.2
    kpo: tuple[tuple[str, object], ...] = ()


def _kpo(low: float = 3e-4, high: float = 4e-4, **keys: object) -> Loss:
    return Loss("kpo", low, high, tuple(keys.items()))


METHODS = {
    "reinforce": Loss(None),
    "vanilla": Loss("vanilla"),
    "vanilla_tight": Loss("vanilla", 3e-4, 4e-4),
    "vanilla_clip0.004": Loss("vanilla", 4e-3, 4e-3),
    "gspo": Loss("gspo", 3e-4, 4e-4),
    "gspo_clip0.004": Loss("gspo", 4e-3, 4e-3),
    "gmpo": Loss("geo_mean", 0.4, 0.4),
    "cispo": Loss("cispo"),
    "kpo": _kpo(),
    "kpo_unclipped": _kpo(process_var=1e-4, clip=False),
    "kpo_steady": _kpo(gain="steady"),
    "kpo_measured": _kpo(measurement_var="batch"),
    "kpo_innovation_clip": _kpo(measurement_var="batch", innovation_clip=3.0),
}
METHODS |= {
    f"kpo_Q{q:g}_clip{clip:g}": _kpo(clip, clip, process_var=q)
    for q in (1e-4, 1e-3, 1e-2)
    for clip in (4e-3, 2e-2, 1e-1)
}


def digits(tokenizer) -> Tensor:
    """(10,) token ids of 0 to 9."""
    return torch.tensor([tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)])


def questions(tokenizer, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts (count, length + 1) and their right answers (count, length + 1), the end token among them."""
    shown = torch.randint(10, (count, length), generator=generator)
    equals, end = (
        torch.full((count, 1), tokenizer.convert_tokens_to_ids(token)) for token in ("=", tokenizer.eos_token)
    )
    codes = digits(tokenizer)
    return torch.cat([codes[shown], equals], 1), torch.cat([codes[(shown + 1) % 10], end], 1)


def build(path: Path, length: int, steps: int = 900, batch_size: int = 64) -> None:
    """Warm-start a tiny model on answers of `length` digits and save it to `path`, if it is not there."""
    if path.exists():
        return
    tokenizer = tiny_model.tokenizer()
    model = tiny_model.untrained(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=0)
    generator, codes = torch.Generator().manual_seed(0), digits(tokenizer)
    drawn_anew = (1 - RIGHT ** (1 / length)) / 0.9  # one in ten is right by chance
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in (line := trange(steps, desc="warm start", disable=None)):
        prompts, answers = questions(tokenizer, batch_size, length, generator)
        wrong = torch.rand(answers.shape, generator=generator) < drawn_anew
        wrong[:, -1] = False
        drawn = codes[torch.randint(10, answers.shape, generator=generator)]
        answers = torch.where(wrong, drawn, answers)
        loss = -log_probs(model, prompts, answers, torch.arange(batch_size)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        line.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def rewards(responses: Tensor, answers: Tensor) -> Tensor:
    """(rows,) 1 where a response (rows, at most length + 2 tokens) is the right answer and ends there."""
    width = answers.shape[1]
    if responses.shape[1] < width:
        return torch.zeros(len(responses), dtype=torch.float64)
    return (responses[:, :width] == answers).all(1).double()


@functools.cache
def objective(loss: Loss):
    """(old_log_prob, log_prob, advantages, mask) -> (loss, metrics)."""
    if loss.mode is None:

        def reinforce(old_log_prob, log_prob, advantages, mask):
            return -(advantages * log_prob * mask).sum(1).div(mask.sum(1)).mean(), {}

        return reinforce

    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass

    actor = "actor_rollout_ref.actor"
    overrides = [f"{actor}.ppo_micro_batch_size_per_gpu=1", "actor_rollout_ref.rollout.n=2"]
    overrides += [f"{actor}.clip_ratio_low={loss.low}", f"{actor}.clip_ratio_high={loss.high}"]
    if loss.mode == "kpo":
        overrides += [f"+actor@{actor}.policy_loss=kpo"]
        overrides += [f"{actor}.policy_loss.kpo.{key}={value}" for key, value in loss.kpo]
    else:
        overrides += [f"{actor}.policy_loss.loss_mode={loss.mode}"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = omega_conf_to_dataclass(compose("ppo_trainer", overrides=overrides).actor_rollout_ref.actor)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    function = get_policy_loss_fn(loss.mode)

    def of_verl(old_log_prob, log_prob, advantages, mask):
        return function(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode="seq-mean-token-mean",
            config=config,
            rollout_is_weights=None,
        )

    return of_verl


@functools.cache
def start(path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def accuracy(model, prompts: Tensor, answers: Tensor) -> float:
    """Mean probability of the right answer."""
    return float(log_probs(model, prompts, answers, torch.arange(len(prompts))).sum(1).exp().mean())


def run(path: Path, condition: str, method: str, seed: int) -> dict:
    """Train from the model at `path`; the run's line of the CSV.

    curve: accuracy before the first step and after every condition.every steps. ratio_std: standard deviation of the
    log-ratio of a batch's tokens in its last update; reward, advantage_std, gradient_norm: means over the steps.
    """
    began = time.perf_counter()
    condition, loss = CONDITIONS[condition], objective(METHODS[method])
    first, tokenizer = start(path)
    model = copy.deepcopy(first)
    optimizer = torch.optim.Adam(model.parameters(), lr=condition.learning_rate, fused=True)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    held_out = questions(tokenizer, HELD_OUT, condition.length, torch.Generator().manual_seed(2**40))
    curve, means = [accuracy(model, *held_out)], []
    for step in range(condition.steps):
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        prompts, answers = questions(tokenizer, condition.prompts, condition.length, generator)
        shuffled = torch.randperm(condition.prompts * condition.size, generator=generator)
        owner = torch.arange(condition.prompts).repeat_interleave(condition.size)
        responses, mask, *_ = sample(model, prompts, condition.size, end, pad, generator, condition.length + 2)
        reward = rewards(responses, answers[owner]).view(condition.prompts, condition.size)
        others = (reward.sum(1, keepdim=True) - reward) / (condition.size - 1)
        advantage = (reward - others).flatten()
        advantage = (advantage / (advantage.std() + 1e-6)).float()
        with torch.no_grad():
            old = log_probs(model, prompts, responses, owner)
        norms = []
        for rows in shuffled.chunk(condition.updates):
            log_prob = log_probs(model, prompts, responses[rows], owner[rows])
            seen = mask[rows].to(log_prob.dtype)
            total, _ = loss(old[rows], log_prob, advantage[rows, None] * torch.ones_like(log_prob), seen)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
        ratio_std = float((log_prob.detach() - old[rows])[mask[rows]].std())
        means.append([float(reward.mean()), float(advantage.std()), sum(norms) / len(norms), ratio_std])
        if (step + 1) % condition.every == 0:
            curve.append(accuracy(model, *held_out))
    reward, advantage_std, gradient_norm, ratio_std = torch.tensor(means).mean(0).tolist()
    return {
        "condition": condition.name,
        "method": method,
        "seed": seed,
        "learning_rate": condition.learning_rate,
        "rollouts": condition.prompts * condition.size * condition.every,
        "curve": " ".join(f"{value:.4f}" for value in curve),
        "reward": reward,
        "advantage_std": advantage_std,
        "gradient_norm": gradient_norm,
        "ratio_std": ratio_std,
        "seconds": time.perf_counter() - began,
    }
