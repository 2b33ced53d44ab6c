"""What a run without a GPU needs of the machine's memory: estimates, good to about a third, from the model's config."""

import os

import psutil
from omegaconf import DictConfig

MICRO_BATCH_BYTES = 2 << 30  # for logits and layers: 770 tokens of a model of 135M parameters and 49k words
PROCESS_BYTES = 1 << 29  # Python with torch and verl
HOW_TO_NEED_LESS = (
    "Lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu (a micro-batch's tokens), then data.train_batch_size, "
    "actor_rollout_ref.rollout.n or data.max_response_length (the answers of a step), or take a smaller model"
)


def model_config(path: str):
    """The config of a model in a folder or in the hub's cache, None where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(os.path.expanduser(path), local_files_only=True)
    except (OSError, ValueError):
        return None


def parameters(model) -> int:
    """About how many a dense decoder has: embeddings, attention with grouped keys, a gated feed-forward network."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    shared = (getattr(model, "num_key_value_heads", None) or heads) / heads
    layer = (2 + 2 * shared) * hidden**2 + 3 * hidden * model.intermediate_size
    return round(model.num_hidden_layers * layer + model.vocab_size * hidden * (1 if model.tie_word_embeddings else 2))


def token_bytes(model) -> int:
    """Bytes that a token of a micro-batch takes in float32: six rows of logits, and what the layers keep to go back."""
    layer = 10 * model.hidden_size + 5 * model.intermediate_size
    return 4 * (6 * model.vocab_size + model.num_hidden_layers * layer)


def needed(config: DictConfig) -> str | None:
    """A line that says what memory the job needs and what is free; None for a model that is no dense decoder."""
    at = config.actor_rollout_ref
    model = model_config(at.model.path)
    if not all(hasattr(model, key) for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size")):
        return None
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    longest = config.data.max_prompt_length + config.data.max_response_length
    rows = config.data.train_batch_size * at.rollout.n
    size = at.actor.ppo_micro_batch_size_per_gpu or at.actor.ppo_mini_batch_size * at.rollout.n
    tokens = at.actor.ppo_max_token_len_per_gpu if at.actor.use_dynamic_bsz else size * longest
    tokens = min(tokens, rows * longest // ranks)
    key_heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    cached = 8 * model.num_hidden_layers * key_heads * model.hidden_size // model.num_attention_heads  # a token
    reference = at.actor.use_kl_loss or config.algorithm.use_kl_in_reward
    copies = 4 + reference + ranks  # weights, gradients and Adam's two are shared out to the ranks; a server has a copy
    storage = config.transfer_queue.backend.SimpleStorage.num_data_storage_units
    processes = 3 + storage + 2 * ranks + at.rollout.agent.num_workers + config.reward.num_workers
    parts = {
        f"{copies} copies of {parameters(model) / 1e6:,.0f}M parameters": 4 * copies * parameters(model),
        f"micro-batches of {tokens:,} tokens": ranks * tokens * token_bytes(model),
        f"the cache of {rows:,} answers": rows * longest * cached,
        f"{processes} processes": processes * PROCESS_BYTES,
    }
    total, free = sum(parts.values()), psutil.virtual_memory().available
    listed = ", ".join(f"{size / 2**30:.1f} for {what}" for what, size in parts.items())
    line = f"memory: about {total / 2**30:.1f} GiB ({listed}); {free / 2**30:.1f} GiB are free"
    return line if total <= free else f"{line}. It will not fit. {HOW_TO_NEED_LESS}"
