"""One run of the laboratory: policy gradient on a tiny model, in this process.

    sample     prompts x size responses at temperature 1, with a KV cache
    score      the task's reward, then the condition's noise
    update     loss = -sum(A log pi) / tokens, + kl * k3 to the first model, or a loss of verl's; Adam

Runs of one seed are paired: the same model, the same prompts in the same order, and in every step the same random
numbers for the tokens and for the reward's noise.

What a model is worth is not sampled but computed, of the right response to every held-out question:

    accuracy   mean probability that a sample begins with it: the expected accuracy of a sample, but for rare answers
               with something before the tag
    pass@8     mean probability that one of eight does
    greedy     share of the questions at which greedy decoding gives it
    entropy    of the next token along it, mean over the tokens, in nats
"""

import collections
import copy
import functools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from verl_krpo.lab.train import losses
from verl_krpo.lab.train.conditions import CONDITIONS, NOISES, Condition
from verl_krpo.lab.train.methods import METHODS, Batch
from verl_krpo.lab.train.tasks import TASKS, Problem, Task

HELD_OUT = 128  # questions
SHARED = 32  # tokens that all prompts begin with, from which on reading them once is quicker


class Start(NamedTuple):
    """The warm-started model that every run begins with; its weights are never changed.

    held_out: questions, right responses and their mask, all (questions, tokens).
    """

    task: Task
    model: torch.nn.Module
    tokenizer: object
    held_out: tuple[Tensor, Tensor, Tensor]

    def encode(self, problems: list[Problem]) -> Tensor:
        """(problems, tokens): all questions are of the same length."""
        questions = [problem.question for problem in problems]
        return self.tokenizer(questions, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def right(self, problems: list[Problem]) -> tuple[Tensor, Tensor, Tensor]:
        """Questions, right responses and their mask, as `held_out` has them."""
        responses = [self.task.response(problem.answer) for problem in problems]
        answers = self.tokenizer(
            responses, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="right"
        )
        return self.encode(problems), answers["input_ids"], answers["attention_mask"].bool()


@functools.cache
def start(models: Path, task: str) -> Start:
    """The model of a task of this name, from its folder in `models`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = TASKS[task]
    tokenizer = AutoTokenizer.from_pretrained(models / made.folder)
    model = AutoModelForCausalLM.from_pretrained(models / made.folder, dtype=torch.float32).eval()
    first = Start(made, model, tokenizer, ())
    return first._replace(held_out=first.right(made.draw(random.Random(0), HELD_OUT, True)))


class Responses(NamedTuple):
    """(rows, longest response): tokens, the mask up to the end token; log_probs, sum_squares as a Batch has them."""

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    sum_squares: Tensor


@torch.no_grad()
def sample(
    model, prompts: Tensor, size: int | Tensor, end: int, pad: int, generator: torch.Generator, max_tokens: int
) -> Responses:
    """`size` responses to each prompt (prompts, tokens), one number for all or one each.

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

    Every prompt is read once, however many responses it has, and so is what all of them begin with, where it is long.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    alike = (prompts[:, :-1] == prompts[:1, :-1]).all(0)
    if (shared := int(alike.cumprod(0).sum())) >= SHARED:
        model(input_ids=prompts[:1, :shared], past_key_values=cache, logits_to_keep=1)
        cache.batch_select_indices(torch.zeros(len(prompts), dtype=torch.long))
        prompts = prompts[:, shared:]
    logits = model(input_ids=prompts, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    cache.batch_select_indices(owner)
    return logits[owner], cache


def log_softmax(model, prompts: Tensor, responses: Tensor, owner: Tensor) -> Tensor:
    """(rows, tokens, vocabulary): log pi at every token of the responses (rows, tokens), row k's to prompt owner[k]."""
    first, cache = read(model, prompts, owner)
    rest = model(input_ids=responses[:, :-1], past_key_values=cache).logits
    return torch.cat([first[:, None], rest], dim=1).log_softmax(-1)


def log_probs(model, prompts: Tensor, responses: Tensor, owner: Tensor) -> Tensor:
    """(rows, tokens): log pi of every token of the responses."""
    return log_softmax(model, prompts, responses, owner).gather(-1, responses[..., None])[..., 0]


@torch.no_grad()
def probabilities(model, held_out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(rows,) of the right response, and the log-probs of all tokens along it."""
    prompts, answers, mask = held_out
    all_log_probs = log_softmax(model, prompts, answers, torch.arange(len(prompts)))
    log_prob = all_log_probs.gather(-1, answers[..., None])[..., 0]
    return (log_prob * mask).sum(1).exp(), all_log_probs


def look(model, held_out: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """accuracy, pass8, greedy and entropy."""
    _, answers, mask = held_out
    right, all_log_probs = probabilities(model, held_out)
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
    return {
        "accuracy": float(right.mean()),
        "pass8": float((1 - (1 - right) ** 8).mean()),
        "greedy": float(((all_log_probs.argmax(-1) == answers) | ~mask).all(1).float().mean()),
        "entropy": float(entropy[mask].mean()),
    }


def rewards(first: Start, responses: Tensor, problems: list[Problem], owner: Iterable[int]) -> Tensor:
    """(rows,) of responses, row k's to problem owner[k]."""
    texts = first.tokenizer.batch_decode(responses, skip_special_tokens=True)
    values = [first.task.reward(text, problems[k].answer) for text, k in zip(texts, owner, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def scores(first: Start, responses: Tensor, problems: list[Problem], size: int) -> Tensor:
    """(problems, size) rewards."""
    owner = [k for k in range(len(problems)) for _ in range(size)]
    return rewards(first, responses, problems, owner).view(len(problems), size)


def visits(task: Task, condition: Condition, seed: int) -> Iterator[list[Problem]]:
    """The problems of every step: always new ones, or those of a pool, again and again in a new order."""
    rng = random.Random(seed)
    pool = task.draw(rng, condition.pool, False)
    waiting: list[Problem] = []
    while True:
        if not pool:
            yield task.draw(rng, condition.prompts, False)
            continue
        if len(waiting) < condition.prompts:
            waiting += rng.sample(pool, len(pool))
        yield [waiting.pop() for _ in range(condition.prompts)]


def roll(
    first: Start, model, condition: Condition, problems: list[Problem], step: int, generator: torch.Generator
) -> Batch:
    noise = NOISES[condition.noise](condition.level, (condition.prompts, condition.size), generator)
    prompts = first.encode(problems)
    end, pad = first.tokenizer.eos_token_id, first.tokenizer.pad_token_id
    sampled = sample(model, prompts, condition.size, end, pad, generator, first.task.max_tokens)
    earned = noise(scores(first, sampled.tokens, problems, condition.size))
    return Batch(earned, [problem.question for problem in problems], step, prompts, first.model, *sampled)


def objective(
    model, batch: Batch, advantage: Tensor, rows: Tensor, condition: Condition, loss: losses.Loss | None, reference
) -> tuple[Tensor, Tensor]:
    """The loss of a mini-batch, and the log-ratios of its observed tokens to when they were sampled.

    advantage: (rows of the batch, 1 or tokens), rows: those of the mini-batch.
    """
    whole = batch.mask[rows]
    if loss is None and not condition.kl and advantage[rows].any():
        rows = rows[advantage[rows].any(1)]  # a row without advantage has no gradient
    responses, owner, mask = batch.responses[rows], rows // batch.rewards.shape[1], batch.mask[rows]
    log_prob, old = log_probs(model, batch.prompts, responses, owner), batch.log_probs[rows]
    if loss is None:
        total = losses.reinforce(log_prob, advantage[rows], mask, whole, condition.loss_agg_mode)
    else:
        total = losses.of_verl(loss, condition.loss_agg_mode)(old, log_prob, advantage[rows], mask)
    if condition.kl:
        with torch.no_grad():
            apart = log_probs(reference, batch.prompts, responses, owner)
        apart = apart - log_prob
        total = total + condition.kl * ((apart.exp() - apart - 1) * mask).sum() / whole.sum()
    return total, (log_prob.detach() - old)[mask]


class Step(NamedTuple):
    """The model after a step, its batch, the advantages (rows, 1 or tokens).

    means: mean reward, standard deviation of A, norm of the gradient (mean over the updates), and standard deviation of
    the log-ratios in the last update.
    """

    model: torch.nn.Module
    batch: Batch
    advantage: Tensor
    means: list[float]


def train(first: Start, condition: Condition, method: str, seed: int) -> Iterator[Step]:
    """Step by step; the model is one and the same, and goes on. Parameters that need no gradient stay as they are."""
    model = copy.deepcopy(first.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=condition.learning_rate, fused=True)
    make, loss = METHODS[method]
    estimate, rows = make(), torch.arange(condition.prompts * condition.size)
    samplers = collections.deque([first.model], maxlen=condition.stale + 1)
    for step, problems in zip(range(condition.steps), visits(first.task, condition, seed), strict=False):
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        if condition.updates > 1:
            rows = torch.randperm(len(rows), generator=generator)
        batch = roll(first, samplers[0], condition, problems, step, generator)
        advantage, norms = estimate(batch), []
        by_row = advantage.reshape(len(rows), -1).float()
        for chosen in rows.chunk(condition.updates):
            total, ratio = objective(model, batch, by_row, chosen, condition, loss, first.model)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), condition.clip)))
            optimizer.step()
        samplers.append(copy.deepcopy(model) if condition.stale else model)
        means = [batch.rewards.mean(), advantage.std(), sum(norms) / len(norms), ratio.std()]
        yield Step(model, batch, by_row, [float(value) for value in means])


def run(models: Path, condition: str, method: str, seed: int) -> dict:
    """Train under a condition and a method of these names; the run's line of the CSV, as `line` has it."""
    first = start(models, CONDITIONS[condition].task)
    return line(first, CONDITIONS[condition], method, seed, lambda model: look(model, first.held_out))


def line(
    first: Start,
    condition: Condition,
    method: str,
    seed: int,
    measure: Callable[[torch.nn.Module], dict[str, float]],
) -> dict:
    """Train, and measure the model before the first step and after every condition.every steps; a line of the CSV.

    curve: the measured accuracy, `rollouts` rollouts apart, and a column of the same kind of everything else that is
    measured. reward (with noise), advantage_std, gradient_norm, ratio_std: means over the steps.
    """
    began = time.perf_counter()
    looks, means = [measure(first.model)], []
    for number, step in enumerate(train(first, condition, method, seed), start=1):
        means.append(step.means)
        if number % condition.every == 0:
            looks.append(measure(step.model))
    curves = {key: " ".join(f"{values[key]:.4f}" for values in looks) for key in looks[0]}
    row = {"condition": condition.name, "method": method, "seed": seed, "learning_rate": condition.learning_rate}
    row |= {"rollouts": condition.prompts * condition.size * condition.every, "curve": curves.pop("accuracy")} | curves
    names = ("reward", "advantage_std", "gradient_norm", "ratio_std")
    row |= dict(zip(names, torch.tensor(means).mean(0).tolist(), strict=True))
    return row | {"seconds": time.perf_counter() - began}
