"""TRL: a GRPOTrainer whose advantages are krpo_adaptive's, weighted by the score, and one with KPO's loss as well.

    trainer = KrpoTrainer(model, reward_funcs=..., args=GRPOConfig(...), train_dataset=...)

Tested with TRL 1.16: docs/examples/trl_sums.py trains a tiny model with it. Prompts recur? krpo_memory takes the same
arguments, with an id of each prompt that stays the same.
"""

import torch
from trl import GRPOTrainer

from verl_krpo import AdaptiveConfig, KpoConfig, kpo, krpo_adaptive, score_weights


class KrpoTrainer(GRPOTrainer):
    def _calculate_rewards(self, *args):
        self._rewards = super()._calculate_rewards(*args)  # (rows of all processes, functions), NaN where one is silent
        return self._rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        rewards = (self._rewards.cpu() * self.reward_weights.cpu()).nansum(dim=1)
        size = self.num_generations if self.model.training else self.num_generations_eval
        log_prob = batch.get("old_per_token_logps")
        if log_prob is None:  # TRL leaves them out where a batch is used once
            with torch.no_grad():
                log_prob = self._log_prob(self.model, batch)
        mode = "seq-mean-token-mean" if self.loss_type in ("grpo", "sapo") else "token-mean"
        weights = self.accelerator.gather(score_weights(log_prob, _mask(batch), mode)).cpu()
        prompts, counted = torch.arange(len(rewards)) // size, ~self._rewards.cpu().isnan().all(dim=1)
        estimate = krpo_adaptive(rewards, prompts, AdaptiveConfig(), weights, counted)
        rows, rank = len(batch["advantages"]), self.accelerator.process_index
        batch["advantages"] = estimate.advantages()[rank * rows : (rank + 1) * rows].to(batch["advantages"])
        return batch

    def _log_prob(self, model, batch):
        ids, attention = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        return self._get_per_token_logps_and_entropies(model, ids, attention, batch["completion_ids"].shape[1])[0]


class KpoTrainer(KrpoTrainer):
    settings = KpoConfig()

    def _compute_loss(self, model, inputs):
        if self.beta or self.use_vllm:
            raise ValueError("KpoTrainer has no KL term and no correction of vLLM's log-probs: beta=0, use_vllm=False")
        log_prob, mask = self._log_prob(model, inputs), _mask(inputs)
        old = inputs.get("old_per_token_logps", log_prob.detach())
        advantages = inputs["advantages"][:, None].expand_as(log_prob)
        clip = dict(clip_low=self.epsilon_low, clip_high=self.epsilon_high)  # the paper's: 3e-4 and 4e-4
        losses, _ = kpo(log_prob, old, advantages, mask, self.settings, **clip)
        loss = (losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)


def _mask(batch):
    return batch["completion_mask"] * batch.get("tool_mask", 1)
