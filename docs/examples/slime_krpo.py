"""slime: rewards that are krpo_adaptive's advantages, weighted by the score, and KPO's loss.

    --advantage-estimator grpo --custom-reward-post-process-path slime_krpo.post_process_rewards
    --loss-type custom_loss --custom-loss-function-path slime_krpo.policy_loss --eps-clip 3e-4 --eps-clip-high 4e-4

Checked with 624b824a. Not with --normalize-advantages, which would scale the advantages once more. The loss has no
entropy and no KL term.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from verl_krpo import kpo, krpo_adaptive, score_weights


def post_process_rewards(args, samples):
    """(rewards, advantages), a number a sample; `grpo` gives every token of a response its number."""
    rewards = [sample.get_reward_value(args) for sample in samples]
    prompts = [sample.group_index for sample in samples]
    counted = torch.tensor([not sample.remove_sample for sample in samples])
    if not all(sample.rollout_log_probs for sample in samples):
        raise ValueError("a sample has no rollout_log_probs: have the rollout collect them, or leave the weights out")
    log_prob = padded([torch.tensor(sample.rollout_log_probs) for sample in samples])
    masks = [sample.loss_mask or [1] * len(sample.rollout_log_probs) for sample in samples]
    mode = "token-mean" if args.calculate_per_token_loss else "seq-mean-token-mean"
    weights = score_weights(log_prob, padded([torch.tensor(mask) for mask in masks]), mode)
    return rewards, krpo_adaptive(rewards, prompts, weights=weights, counted=counted).advantages().tolist()


def policy_loss(args, batch, logits, sum_of_sample_mean):
    """(loss, metrics), as slime's own policy loss with its reducer."""
    from slime.backends.megatron_utils import loss as slime

    if args.context_parallel_size > 1:
        raise ValueError("KPO filters whole responses: --context-parallel-size 1")
    lengths = dict(total_lengths=batch["total_lengths"], response_lengths=batch["response_lengths"])
    top_p = slime.get_rollout_top_p_logprob_kwargs(args, batch)
    tokens = batch["unconcat_tokens"]
    _, found = slime.get_log_probs_and_entropy(logits, args=args, unconcat_tokens=tokens, **lengths, **top_p)
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = old or [log_prob.detach() for log_prob in found["log_probs"]]  # slime leaves them out where they are the same
    clip = dict(clip_low=args.eps_clip, clip_high=args.eps_clip_high)
    losses, clipped = token_losses(found["log_probs"], old, batch["advantages"], batch["loss_masks"], **clip)
    loss = sum_of_sample_mean(losses) + 0 * logits.sum()  # a rank without tokens has a gradient too
    clipped = sum_of_sample_mean(torch.full_like(losses, clipped))
    return loss, {"loss": loss.detach(), "pg_clipfrac": clipped}


def token_losses(log_probs, old_log_probs, advantages, loss_masks, **clip):
    """The losses of all tokens in a row, (tokens,), and the share that is clipped; lists of (tokens of a response,)."""
    named = [padded(each) for each in (log_probs, old_log_probs, advantages, loss_masks)]
    losses, diagnostics = kpo(*named, **clip)
    rows = [row[: len(mask)] for row, mask in zip(losses, loss_masks, strict=True)]
    return torch.cat(rows), diagnostics["pg_clipfrac"]


def padded(tensors):
    return pad_sequence(tensors, batch_first=True)
