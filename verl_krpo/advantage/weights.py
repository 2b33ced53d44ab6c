"""What a response weighs in a baseline: the square of its score, |grad log pi(y)|^2, from log-probs that are there.

With respect to the logits of one token, |grad log pi(y_t)|^2 = 1 - 2 pi_t + sum_k pi_k^2. The sampled token's own
probability is enough (docs/which_variance.md has both):

    w = sum_t (1 - pi_t)^2              over the observed tokens of the response
    w / T^2                             where the loss averages over a response's T tokens (seq-mean-token-mean)

The temperature of the sampling is a common factor of all scores, which cancels in every use. With the length as the
weight, as OPO has it (arXiv 2505.23585), every (1 - pi_t)^2 is 1.
"""

import torch

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
ROWS = 16  # at a time, which stay in the cache: (1024, 8192) takes 27 ms in place of 165, log_prob.exp().sum() 32


def score_weights(log_prob: torch.Tensor, mask: torch.Tensor, loss_agg_mode: str = "token-mean") -> torch.Tensor:
    """w of every response, (rows,) float64, from log pi of its tokens (rows, tokens); 0 where no token is observed.

    mask: (rows, tokens), bool or 0/1, true where a token is the response's own; nothing else is read. loss_agg_mode:
    how verl's loss adds tokens up. A log-prob of -inf is a token of probability 0. ValueError names the row and token
    of a NaN, and an unknown mode.
    """
    if log_prob.shape != mask.shape:
        raise ValueError(f"log_prob has shape {tuple(log_prob.shape)}, mask {tuple(mask.shape)}")
    mask = mask.bool()
    squares = torch.cat(
        [
            torch.where(observed, log_probs, 0.0).expm1().square().sum(dim=1, dtype=torch.float64)
            for log_probs, observed in zip(log_prob.split(ROWS), mask.split(ROWS), strict=True)
        ]
    )
    if squares.isnan().any():
        row, token = (log_prob.isnan() & mask).nonzero()[0].tolist()
        raise ValueError(f"log_prob is NaN in row {row}, token {token}, which is observed: no score has such a weight")
    return _averaged(squares, mask, loss_agg_mode)


def length_weights(mask: torch.Tensor, loss_agg_mode: str = "token-mean") -> torch.Tensor:
    """The number of observed tokens in the place of the score, (rows,) float64; arguments as in score_weights."""
    return _averaged(mask.bool().sum(dim=1, dtype=torch.float64), mask, loss_agg_mode)


def _averaged(squares: torch.Tensor, mask: torch.Tensor, loss_agg_mode: str) -> torch.Tensor:
    if loss_agg_mode not in MODES:
        raise ValueError(f"loss_agg_mode={loss_agg_mode!r} is not one of {', '.join(MODES)}")
    if loss_agg_mode == "seq-mean-token-mean":
        return squares / mask.bool().sum(dim=1).clamp(min=1).double().square()
    return squares
