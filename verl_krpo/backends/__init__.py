"""verl without a GPU: a CPU platform and rollout servers. Loaded only when asked for."""

import os


def on_cpu() -> bool:
    """VERL_PLATFORM=cpu: verl is to run without a GPU."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
