"""Batched generation with one KV cache: every request in the batch is sampled with its own parameters."""

from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from verl_krpo.backends import sampling
from verl_krpo.backends.sampling import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it.

    tokens and log_probs grow together, one entry a token. stop_reason is None while running, then verl's word:
    `completed` (end of sequence, stop token or max_tokens) or `aborted` (set `abort` from any thread).
    """

    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stop_reason: str | None = None
    abort: bool = False

    def append(self, token: int, log_prob: float, eos: set[int]) -> None:
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        ended = (token in eos and not self.params.ignore_eos) or token in self.params.stop_token_ids
        if ended or len(self.tokens) >= self.params.max_tokens:
            self.stop_reason = "completed"


@torch.inference_mode()
def generate(
    model: PreTrainedModel, requests: list[Request], eos: set[int], pad: int, generator: torch.Generator
) -> None:
    """Generate for all requests until each has a stop_reason; results are written into the requests.

    Prompts are padded on the left and the padding is masked, so a response does not depend on its neighbors. The
    end token is part of the response, as in vLLM. log_probs are those of the sampled distribution (`sampling`).
    """
    device = next(model.parameters()).device
    width = max(len(request.prompt) for request in requests)
    tokens = torch.full((len(requests), width), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, request in enumerate(requests):
        tokens[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, width - len(request.prompt) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    seeds = {id(r): torch.Generator(device).manual_seed(r.params.seed) for r in requests if r.params.seed is not None}
    cache = DynamicCache(config=model.config)

    running = list(requests)
    params = _Columns(running, device)
    while True:
        for request in running:
            if request.abort and request.stop_reason is None:
                request.stop_reason = "aborted"
        keep = [row for row, request in enumerate(running) if request.stop_reason is None]
        if not keep:
            return
        # Finished rows are dropped when they are half of the batch: each drop copies the cache.
        if len(keep) <= len(running) // 2:
            rows = torch.tensor(keep, device=device)
            running = [running[row] for row in keep]
            tokens, mask, positions, params = tokens[rows], mask[rows], positions[rows], _Columns(running, device)
            if cache.get_seq_length():
                cache.batch_select_indices(rows)

        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        log_probs = sampling.log_probs(logits, params.temperature, params.top_k, params.top_p)
        streams = {row: seeds[id(request)] for row, request in enumerate(running) if id(request) in seeds}
        tokens = sampling.draw(log_probs, params.temperature == 0, generator, streams)[:, None]
        chosen = log_probs.gather(1, tokens)[:, 0].tolist()
        for request, token, log_prob in zip(running, tokens[:, 0].tolist(), chosen, strict=True):
            if request.stop_reason is None:
                request.append(token, log_prob, eos)
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], 1)
        positions = positions[:, -1:] + 1


class _Columns:
    """The parameters of a batch as tensors (rows,)."""

    def __init__(self, requests: list[Request], device: torch.device):
        params = [request.params for request in requests]
        self.temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device)
        self.top_k = torch.tensor([p.top_k for p in params], device=device)
        self.top_p = torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device)
