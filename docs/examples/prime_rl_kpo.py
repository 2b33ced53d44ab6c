"""prime-rl: KPO as the loss of its trainer.

    [trainer.loss]
    type = "custom"
    import_path = "prime_rl_kpo.kpo_loss"
    kwargs = {clip_low = 3e-4, clip_high = 4e-4}    # and any key of KpoConfig

Checked with 559b4477. prime-rl takes the log-probs of its inference as the old ones, so their noise is filtered too.
"""

from verl_krpo import KpoConfig, kpo


def kpo_loss(inputs, clip_low: float = 3e-4, clip_high: float = 4e-4, **settings):
    """LossOutputs of one sequence's LossInputs: a sum over its tokens, which the trainer divides by the batch's."""
    from prime_rl.trainer.rl.loss import LossOutputs

    named = (inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages, inputs.loss_mask)
    loss, metrics = sequence_loss(*named, inputs.loss_weights, clip_low, clip_high, **settings)
    return LossOutputs(loss=loss, metrics={name: loss.new_tensor(value) for name, value in metrics.items()})


def sequence_loss(log_prob, old_log_prob, advantages, mask, weights=None, clip_low=3e-4, clip_high=4e-4, **settings):
    """(loss, metrics) of tensors (tokens,)."""
    rows = (tensor[None] for tensor in (log_prob, old_log_prob, advantages, mask))
    losses, metrics = kpo(*rows, KpoConfig(**settings), clip_low=clip_low, clip_high=clip_high)
    return (losses[0] if weights is None else losses[0] * weights).sum(), metrics
