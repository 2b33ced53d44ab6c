"""verl without a GPU: a CPU platform and a transformers rollout server. Loaded only when asked for."""
