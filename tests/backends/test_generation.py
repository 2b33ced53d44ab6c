import pytest
import torch
from scipy.stats import chisquare

from verl_krpo.backends.generation import Request, generate
from verl_krpo.backends.sampling import SamplingParams

PAD, EOS = 0, 1


def run(model, *requests, seed=0):
    generate(model, list(requests), {EOS}, PAD, torch.Generator().manual_seed(seed))
    return requests


def prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 48, (3 + 5 * (i % 4),), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_log_probs_equal_a_plain_forward_pass(model, plain_log_probs, temperature):
    params = [SamplingParams(max_tokens=4 * (i + 1), temperature=temperature) for i in range(12)]  # rows drop out
    for request in run(model, *[Request(p, q) for p, q in zip(prompts(12), params, strict=True)]):
        chosen = plain_log_probs(request.prompt, request.tokens, temperature)
        expected = chosen.gather(1, torch.tensor(request.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(request.log_probs), expected, atol=1e-5, rtol=0)
        assert len(request.tokens) == request.params.max_tokens or request.tokens[-1] == EOS
        assert request.stop_reason == "completed"


def test_requests_of_one_batch_keep_their_own_parameters(model, plain_log_probs):
    prompt = prompts(1)[0]
    greedy, one, cold, short, stopping = run(
        model,
        Request(prompt, SamplingParams(max_tokens=12, temperature=0.0)),
        Request(prompt, SamplingParams(max_tokens=12, top_k=1)),
        Request(prompt, SamplingParams(max_tokens=12, temperature=0.3, ignore_eos=True)),
        Request(prompt, SamplingParams(max_tokens=3, ignore_eos=True)),
        Request(prompt, SamplingParams(max_tokens=500, stop_token_ids=tuple(range(2, 48)))),
    )
    most_likely = plain_log_probs(prompt, greedy.tokens)
    assert greedy.tokens == most_likely.argmax(-1).tolist()
    assert greedy.log_probs == pytest.approx(most_likely.max(-1).values.tolist(), abs=1e-5)
    assert one.tokens == greedy.tokens and one.log_probs == pytest.approx([0.0] * len(one.tokens))
    expected = plain_log_probs(prompt, cold.tokens, 0.3).gather(1, torch.tensor(cold.tokens)[:, None])[:, 0]
    assert cold.log_probs == pytest.approx(expected.tolist(), abs=1e-5)
    assert (len(cold.tokens), len(short.tokens), len(stopping.tokens)) == (12, 3, 1)


def test_generated_tokens_follow_the_models_distribution(model, plain_log_probs):
    prompt, rows = prompts(1, seed=7)[0], 4000
    done = run(model, *[Request(prompt, SamplingParams(max_tokens=1, temperature=1.5)) for _ in range(rows)])
    counts = torch.bincount(torch.tensor([request.tokens[0] for request in done]), minlength=48)
    expected = plain_log_probs(prompt, [PAD], 1.5)[0].exp().double()
    assert (expected * rows).min() > 5  # else no chi-square
    assert chisquare(counts.numpy(), (expected / expected.sum() * rows).numpy()).pvalue > 1e-3


def test_a_response_does_not_depend_on_its_neighbours(model):
    prompt = prompts(1)[0]
    params = SamplingParams(max_tokens=20, seed=11, ignore_eos=True)
    (alone,) = run(model, Request(prompt, params), seed=1)
    long = Request(list(range(2, 42)), SamplingParams(max_tokens=3))
    _, beside, _ = run(model, long, Request(prompt, params), Request(prompt[:1], params._replace(seed=12)), seed=2)
    assert alone.tokens == beside.tokens
    assert alone.log_probs == pytest.approx(beside.log_probs, abs=1e-5)


def test_an_aborted_request_keeps_what_it_has(model):
    class AbortsAtThree(Request):
        def append(self, *args):
            super().append(*args)
            self.abort = len(self.tokens) == 3

    params = SamplingParams(max_tokens=10, ignore_eos=True)
    aborted, other = run(model, AbortsAtThree(prompts(1)[0], params), Request(prompts(1)[0], params))
    assert (len(aborted.tokens), len(aborted.log_probs), aborted.stop_reason) == (3, 3, "aborted")
    assert (len(other.tokens), other.stop_reason) == (10, "completed")


def test_a_request_aborted_before_it_starts_returns_nothing(model):
    (request,) = run(model, Request([5, 6], SamplingParams(max_tokens=10), abort=True))
    assert (request.tokens, request.stop_reason) == ([], "aborted")
