"""Score weights against the gradient itself."""

import math

import pytest
import torch

from verl_krpo import score_weights
from verl_krpo.advantage.weights import MODES, length_weights


def batch(seed=0, rows=5, tokens=7, vocabulary=6):
    """Logits, sampled tokens, their log-probs with rubbish under the mask, and a mask with holes and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, tokens, vocabulary, generator=generator, dtype=torch.float64)
    sampled = torch.randint(vocabulary, (rows, tokens), generator=generator)
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    mask[0] = False
    log_prob = logits.log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
    return logits, sampled, torch.where(mask, log_prob, torch.nan), mask


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_is_the_square_of_what_a_logit_of_the_token_does_to_verls_loss(mode):
    """The gradient of the row's term of verl's loss by the sampled tokens' own logits, up to a factor of all rows."""
    pytest.importorskip("verl")
    from verl.trainer.ppo.core_algos import agg_loss

    logits, sampled, log_prob, mask = batch()
    logits.requires_grad_()
    losses = logits.log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
    agg_loss(losses, mask, mode).backward()
    own = logits.grad.gather(-1, sampled[..., None])[..., 0].square().sum(1)
    found = score_weights(log_prob, mask, mode)
    torch.testing.assert_close(found / found.sum(), own / own.sum())
    assert found[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_mask_and_dtype(dtype):
    *_, log_prob, mask = batch()
    exact = score_weights(log_prob.to(dtype).double(), mask)
    for as_mask in (mask, mask.long(), mask.float()):
        found = score_weights(log_prob.to(dtype), as_mask)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, exact, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert score_weights(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    assert score_weights(torch.zeros(3, 0), torch.zeros(3, 0)).tolist() == [0.0] * 3


def test_certain_and_impossible_tokens():
    log_prob = torch.tensor([[0.0, 0.0], [-math.inf, 0.0], [math.log(0.25), math.log(0.5)]])
    assert score_weights(log_prob, torch.ones(3, 2)).tolist() == pytest.approx([0.0, 1.0, 0.75**2 + 0.5**2])


def test_more_rows_than_fit_at_a_time():
    log_prob = -torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    exact = (1 - log_prob.exp()).square().sum(1)
    torch.testing.assert_close(score_weights(log_prob, torch.ones(1000, 3)).float(), exact)


def test_length_weights_are_those_of_opo():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    assert length_weights(mask).tolist() == [2.0, 3.0, 0.0]
    assert length_weights(mask, "seq-mean-token-mean").tolist() == pytest.approx([1 / 2, 1 / 3, 0.0])


def test_wrong_arguments_are_named():
    log_prob = torch.tensor([[-0.5, -0.5], [-0.5, torch.nan]])
    with pytest.raises(ValueError, match="log_prob is NaN in row 1, token 1"):
        score_weights(log_prob, torch.ones(2, 2))
    assert score_weights(log_prob, torch.tensor([[1, 1], [1, 0]])).isfinite().all()
    with pytest.raises(ValueError, match="loss_agg_mode='mean' is not one of token-mean"):
        length_weights(torch.ones(2, 2), "mean")
    with pytest.raises(ValueError, match=r"log_prob has shape \(2, 2\), mask \(2, 3\)"):
        score_weights(log_prob, torch.ones(2, 3))
