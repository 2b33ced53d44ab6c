"""The distribution a token is sampled from, and the draw. Pure functions of tensors.

verl's servers report the log-probability of the *sampled* distribution (`rollout.logprobs_mode=processed_logprobs`):
logits / temperature, cut to the top k, then to the top p, renormalised. At top_p=1 and top_k=-1 that is what the
trainer computes for old_log_probs, log_softmax(logits / temperature). A greedy token (temperature 0) is no sample:
its log-probability is the model's own, log_softmax(logits).
"""

from typing import Any, NamedTuple

import torch

IGNORED_KEYS = ("logprobs",)  # log-probs are always computed: they cost one gather a token


class SamplingParams(NamedTuple):
    """How one request is sampled, in vLLM's words: temperature 0 is greedy, top_k -1 or 0 is off, top_p 1 is off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None


def read_params(words: dict[str, Any], max_tokens: int) -> SamplingParams:
    """Typed parameters from the dict verl sends; `max_tokens` is the limit where the request names none.

    ValueError for a key this server does not honour and for values out of range.
    """
    words = {key: value for key, value in words.items() if key not in IGNORED_KEYS and value is not None}
    limit = words.pop("max_tokens", words.pop("max_new_tokens", max_tokens))
    if words.pop("repetition_penalty", 1.0) != 1.0:
        raise ValueError("rollout.name=hf samples from the model's own distribution: set repetition_penalty=1.0")
    words["stop_token_ids"] = tuple(words.get("stop_token_ids", ()))
    if unknown := words.keys() - set(SamplingParams._fields):
        known = ", ".join(SamplingParams._fields)
        raise ValueError(f"rollout.name=hf does not know the sampling parameters {sorted(unknown)}: it knows {known}")
    params = SamplingParams(max_tokens=max(1, int(limit)), **words)
    if params.temperature < 0:
        raise ValueError(f"temperature={params.temperature} is not valid: 0 for greedy, or a number > 0")
    if not 0 < params.top_p <= 1:
        raise ValueError(f"top_p={params.top_p} is not valid: a number in (0, 1]")
    if params.top_k < -1:
        raise ValueError(f"top_k={params.top_k} is not valid: -1 for all tokens, or a number of tokens")
    return params


def log_probs(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Log of the distribution each row is sampled from; -inf for a token that is cut.

        softmax(logits / temperature), its top_k most likely tokens, of these the fewest that hold top_p of the mass

    logits (rows, vocab); temperature, top_k, top_p (rows,). Returns float32 (rows, vocab). A row with temperature 0
    is greedy: log_softmax(logits), nothing cut. Equally likely tokens at the edge are kept in vocabulary order.
    """
    logits = logits.float()
    greedy = temperature == 0
    logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
    cut = ~greedy & (((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1))
    if cut.any():
        logits[cut] = _cut(logits[cut], top_k[cut], top_p[cut])
    return logits.log_softmax(-1)


def _cut(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    beyond_k = (top_k > 0)[:, None] & (rank >= top_k[:, None])
    mass = ordered.masked_fill(beyond_k, -torch.inf).softmax(-1)
    before = mass.cumsum(-1) - mass  # what the more likely tokens hold
    beyond_p = (top_p < 1)[:, None] & (before >= top_p[:, None]) & (rank > 0)
    return torch.empty_like(logits).scatter_(1, index, ordered.masked_fill(beyond_k | beyond_p, -torch.inf))


def draw(
    log_probs: torch.Tensor,
    greedy: torch.Tensor,
    generator: torch.Generator,
    row_generators: dict[int, torch.Generator] | None = None,
) -> torch.Tensor:
    """One token a row: the most likely where `greedy`, else a sample by the Gumbel-max trick.

    log_probs (rows, vocab), greedy (rows,) bool. Rows named in `row_generators` draw from their own stream, so a
    request with a seed gets the same tokens in any batch. Returns (rows,) int64.
    """
    noise = torch.empty_like(log_probs).exponential_(generator=generator)
    for row, own in (row_generators or {}).items():
        noise[row].exponential_(generator=own)
    tiny = torch.finfo(noise.dtype).tiny  # an exponential variate can round to 0
    sampled = log_probs - noise.clamp_min(tiny).log()
    return torch.where(greedy[:, None], log_probs, sampled).argmax(-1)
