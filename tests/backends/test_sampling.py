import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from verl_krpo.backends import sampling
from verl_krpo.backends.sampling import SamplingParams, read_params


def column(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def sampled_distribution(logits, temperature, top_k, top_p):
    """The same distribution by the definition: python floats, sets of tokens."""
    weight = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k > 0:
        order = order[:top_k]
    kept, held, total = [], 0.0, sum(weight[i] for i in order)
    for i in order:
        if top_p == 1 or held < top_p * total or not kept:
            kept.append(i)
            held += weight[i]
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(logits))]


CUTS = [(1.0, -1, 1.0), (0.5, -1, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, -1, 0.7), (0.7, 5, 0.6), (1.3, 1, 0.2)]


@pytest.mark.parametrize("temperature, top_k, top_p", CUTS)
def test_log_probs_are_those_of_the_definition(temperature, top_k, top_p):
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0)) * 2
    rows = len(logits)
    got = sampling.log_probs(
        logits, column(*[temperature] * rows), column(*[top_k] * rows, dtype=torch.long), column(*[top_p] * rows)
    ).exp()
    for row in range(rows):
        expected = sampled_distribution(logits[row].tolist(), temperature, top_k, top_p)
        torch.testing.assert_close(got[row], torch.tensor(expected), atol=2e-6, rtol=0)


def test_each_row_has_its_own_parameters():
    logits = torch.randn(len(CUTS), 11, generator=torch.Generator().manual_seed(1))
    temperature, top_k, top_p = zip(*CUTS, strict=True)
    got = sampling.log_probs(logits, column(*temperature), column(*top_k, dtype=torch.long), column(*top_p))
    for row, (t, k, p) in enumerate(CUTS):
        alone = sampling.log_probs(logits[row : row + 1], column(t), column(k, dtype=torch.long), column(p))
        torch.testing.assert_close(got[row : row + 1], alone, atol=0, rtol=0)


def test_a_greedy_row_reports_the_models_own_log_prob():
    logits = torch.randn(1, 11, generator=torch.Generator().manual_seed(2))
    got = sampling.log_probs(logits, column(0.0), column(3, dtype=torch.long), column(0.5))
    torch.testing.assert_close(got, logits.log_softmax(-1), atol=0, rtol=0)


@settings(max_examples=60)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(-1, 14),
    top_p=st.floats(0.01, 1),
)
def test_a_cut_distribution_is_one_and_keeps_the_most_likely(logits, temperature, top_k, top_p):
    row = torch.tensor([logits])
    got = sampling.log_probs(row, column(temperature), column(top_k, dtype=torch.long), column(top_p))[0].exp()
    assert abs(got.sum().item() - 1) < 1e-5
    assert got[row[0].argmax()] > 0
    if top_k > 0:
        assert (got > 0).sum() <= top_k
    if (got == 0).any():  # nothing kept is less likely than something cut, but by underflow
        assert row[0][got > 0].min() >= row[0][got == 0].max() or top_k <= 0 and top_p == 1


@pytest.mark.parametrize("temperature, top_k, top_p", CUTS)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    draws, vocab = 20_000, 11
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)).expand(draws, vocab)
    log_probs = sampling.log_probs(
        logits,
        column(temperature).expand(draws),
        column(top_k, dtype=torch.long).expand(draws),
        column(top_p).expand(draws),
    )
    tokens = sampling.draw(log_probs, torch.zeros(draws, dtype=torch.bool), torch.Generator().manual_seed(4))
    counts = torch.bincount(tokens, minlength=vocab)
    expected = torch.tensor(sampled_distribution(logits[0].tolist(), temperature, top_k, top_p))
    assert counts[expected == 0].sum() == 0
    if (expected > 0).sum() > 1:
        expected = expected[expected > 0].double()
        assert (
            chisquare(counts[log_probs[0] > -torch.inf].numpy(), (expected / expected.sum() * draws).numpy()).pvalue
            > 1e-3
        )


def test_greedy_rows_take_the_most_likely_token():
    log_probs = torch.randn(50, 11, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    greedy = torch.arange(50) % 2 == 0
    tokens = sampling.draw(log_probs, greedy, torch.Generator().manual_seed(6))
    assert torch.equal(tokens[greedy], log_probs.argmax(-1)[greedy])
    assert not torch.equal(tokens[~greedy], log_probs.argmax(-1)[~greedy])


def test_params_are_read_as_verl_sends_them():
    sent = dict(temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.0, logprobs=True)
    assert read_params(sent, max_tokens=64) == SamplingParams(max_tokens=64, temperature=0.7, top_p=0.9, top_k=20)
    assert read_params(dict(max_tokens=5), max_tokens=64).max_tokens == 5
    assert read_params(dict(max_new_tokens=6), max_tokens=64).max_tokens == 6
    assert read_params(dict(max_tokens=0), max_tokens=64).max_tokens == 1
    assert read_params(dict(stop_token_ids=[3]), max_tokens=64).stop_token_ids == (3,)


@pytest.mark.parametrize(
    "sent, message",
    [
        (dict(repetition_penalty=1.1), "repetition_penalty"),
        (dict(min_p=0.1), "min_p"),
        (dict(stop=["\n"]), "stop"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_k=-2), "top_k=-2"),
    ],
)
def test_params_that_are_not_honoured_are_refused(sent, message):
    with pytest.raises(ValueError, match=message):
        read_params(sent, max_tokens=64)
