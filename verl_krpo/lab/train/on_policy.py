"""One run of the laboratory: policy gradient on the tiny model, in this process.

    sample     prompts x size answers at temperature 1, with a KV cache
    score      the product's answer-tag reward, then the condition's noise
    update     loss = -sum(A log pi) / tokens, + kl * k3 to the first model; one Adam step a batch, on policy

No gradient is clipped, so Adam makes nothing of an advantage's overall scale, and methods are compared by what they say
of one response against another. Runs of one seed are paired: the same model, the same prompts in the same order, and in
every step the same random numbers for the tokens and for the reward's noise.

Accuracy is not sampled but computed: the probability that a response begins with `<answer>46</answer>`, its mean over
held-out sums. That is the expected accuracy of a sample, but for rare answers with something before the tag.
"""

import copy
import functools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from verl_krpo.data.arithmetic import Problem, draw_sum, is_test
from verl_krpo.lab.train.conditions import CONDITIONS, NOISES, Condition
from verl_krpo.lab.train.methods import METHODS, Batch
from verl_krpo.reward.answer_tag import compute_score

MAX_TOKENS = 24
HELD_OUT = 128  # sums


class Start(NamedTuple):
    """The warm-started model that every run begins with; its weights are never changed."""

    model: torch.nn.Module
    tokenizer: object
    held_out: tuple[Tensor, Tensor, Tensor]  # sums; right answers, their mask

    def encode(self, problems: list[Problem]) -> Tensor:
        """(problems, tokens): all sums are of the same length."""
        return self.tokenizer([p.question + "\n" for p in problems], return_tensors="pt")["input_ids"]


@functools.cache
def start(path: Path) -> Start:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    problems = sums(random.Random(0), HELD_OUT, held_out=True)
    prompts = [p.question + "\n" for p in problems]
    answers = tokenizer(
        [f"<answer>{p.answer}</answer>" for p in problems], return_tensors="pt", padding=True, padding_side="right"
    )
    tokens = tokenizer(prompts, return_tensors="pt")["input_ids"]
    return Start(model, tokenizer, (tokens, answers["input_ids"], answers["attention_mask"].bool()))


def sums(rng: random.Random, count: int, held_out: bool = False) -> list[Problem]:
    chosen = []
    while len(chosen) < count:
        problem = draw_sum(rng)
        if is_test(problem.expression) == held_out:
            chosen.append(problem)
    return chosen


class Responses(NamedTuple):
    """(rows, longest response): tokens, the mask up to the end token; log_probs, sum_squares as a Batch has them."""

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    sum_squares: Tensor


@torch.inference_mode()
def sample(
    model, prompts: Tensor, size: int, end: int, pad: int, generator: torch.Generator, max_tokens: int = MAX_TOKENS
) -> Responses:
    """`size` responses to each prompt (prompts, tokens).

    By the Gumbel-max trick, with as many random numbers a token whatever was sampled before.
    """
    owner = torch.arange(len(prompts)).repeat_interleave(size)
    logits, cache = read(model, prompts, owner)
    alive, tokens, columns = torch.ones(len(owner), dtype=torch.bool), [], []
    while True:
        exponential = torch.empty_like(logits).exponential_(generator=generator)
        token = (logits - exponential.clamp_min(torch.finfo(logits.dtype).tiny).log()).argmax(-1)
        log_probs = logits.log_softmax(-1)
        tokens.append(torch.where(alive, token, pad))
        own = log_probs.gather(-1, token[:, None])[:, 0]
        columns.append(Responses(tokens[-1], alive, own, (2 * log_probs).exp().sum(-1)))
        alive = alive & (token != end)
        if not alive.any() or len(tokens) == max_tokens:
            return Responses(*(torch.stack(column, 1) for column in zip(*columns, strict=True)))
        logits = model(input_ids=tokens[-1][:, None], past_key_values=cache).logits[:, -1]


def read(model, prompts: Tensor, owner: Tensor) -> tuple[Tensor, object]:
    """Logits (rows, vocabulary) of the first token of row k's response to prompt owner[k], and the cache to go on with.

    Every prompt is read once, however many responses it has.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    logits = model(input_ids=prompts, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    cache.batch_select_indices(owner)
    return logits[owner], cache


def log_probs(model, prompts: Tensor, responses: Tensor, owner: Tensor) -> Tensor:
    """(rows, tokens): log pi of every token of the responses (rows, tokens), row k's to prompt owner[k]."""
    first, cache = read(model, prompts, owner)
    rest = model(input_ids=responses[:, :-1], past_key_values=cache).logits
    logits = torch.cat([first[:, None], rest], dim=1)
    return logits.log_softmax(-1).gather(-1, responses[..., None])[..., 0]


@torch.no_grad()
def accuracy(model, held_out: tuple[Tensor, Tensor, Tensor]) -> float:
    """Mean probability of the right answer, tags and all."""
    prompts, answers, mask = held_out
    log_prob = log_probs(model, prompts, answers, torch.arange(len(prompts)))
    return float((log_prob * mask).sum(1).exp().mean())


def scores(tokenizer, responses: Tensor, problems: list[Problem], size: int) -> Tensor:
    """(problems, size) rewards."""
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    answers = [problem.answer for problem in problems for _ in range(size)]
    values = [compute_score("sums", text, answer)["score"] for text, answer in zip(texts, answers, strict=True)]
    return torch.tensor(values, dtype=torch.float64).view(len(problems), size)


def visits(condition: Condition, seed: int) -> Iterator[list[Problem]]:
    """The problems of every step: always new ones, or those of a pool, again and again in a new order."""
    rng = random.Random(seed)
    pool = sums(rng, condition.pool)
    waiting: list[Problem] = []
    while True:
        if not pool:
            yield sums(rng, condition.prompts)
            continue
        if len(waiting) < condition.prompts:
            waiting += rng.sample(pool, len(pool))
        yield [waiting.pop() for _ in range(condition.prompts)]


def roll(first: Start, model, condition: Condition, problems: list[Problem], seed: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(seed * 100_003 + step)
    noise = NOISES[condition.noise](condition.level, (condition.prompts, condition.size), generator)
    prompts = first.encode(problems)
    end, pad = first.tokenizer.eos_token_id, first.tokenizer.pad_token_id
    sampled = sample(model, prompts, condition.size, end, pad, generator)
    rewards = noise(scores(first.tokenizer, sampled.tokens, problems, condition.size))
    return Batch(rewards, [p.question for p in problems], step, prompts, first.model, *sampled)


def surrogate(model, batch: Batch, advantage: Tensor, kl: float = 0.0, reference=None) -> Tensor:
    """The loss whose gradient is the policy gradient of a Method's advantages, with kl * k3 to the reference."""
    advantage = advantage.reshape(len(batch.responses), -1).float()  # (rows, 1 or tokens)
    rows = advantage.any(1).nonzero()[:, 0]
    if kl or not len(rows):  # elsewhere a row without advantage has no gradient, but counts among the tokens
        rows = torch.arange(len(advantage))
    responses, owner = batch.responses[rows], rows // batch.rewards.shape[1]
    log_prob = log_probs(model, batch.prompts, responses, owner)
    loss = -advantage[rows] * log_prob
    if kl:
        with torch.no_grad():
            apart = log_probs(reference, batch.prompts, responses, owner)
        apart = apart - log_prob
        loss = loss + kl * (apart.exp() - apart - 1)
    return (loss * batch.mask[rows]).sum() / batch.mask.sum()


def train(first: Start, condition: Condition, method: str, seed: int) -> Iterator[tuple[torch.nn.Module, list[float]]]:
    """The model after every step, and the step's mean reward, standard deviation of A and norm of the gradient."""
    model = copy.deepcopy(first.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=condition.learning_rate, fused=True)
    estimate = METHODS[method]()
    for step, problems in zip(range(condition.steps), visits(condition, seed), strict=False):
        batch = roll(first, model, condition, problems, seed, step)
        advantage = estimate(batch)
        optimizer.zero_grad(set_to_none=True)
        surrogate(model, batch, advantage, condition.kl, first.model).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        yield model, [float(batch.rewards.mean()), float(advantage.std()), float(norm)]


def run(path: Path, condition: str, method: str, seed: int) -> dict:
    """Train from the model at `path` under a condition and a method of these names; the run's line of the CSV.

    curve: held-out accuracy before the first step and after every condition.every steps, `rollouts` rollouts apart.
    reward, advantage_std, gradient_norm: means over the steps; the reward is that with noise.
    """
    began = time.perf_counter()
    settings, first = CONDITIONS[condition], start(path)
    curve, means = [accuracy(first.model, first.held_out)], []
    for step, (model, of_step) in enumerate(train(first, settings, method, seed), start=1):
        means.append(of_step)
        if step % settings.every == 0:
            curve.append(accuracy(model, first.held_out))
    reward, advantage_std, gradient_norm = torch.tensor(means).mean(0).tolist()
    return {
        "condition": condition,
        "method": method,
        "seed": seed,
        "learning_rate": settings.learning_rate,
        "rollouts": settings.prompts * settings.size * settings.every,
        "curve": " ".join(f"{value:.4f}" for value in curve),
        "reward": reward,
        "advantage_std": advantage_std,
        "gradient_norm": gradient_norm,
        "seconds": time.perf_counter() - began,
    }
