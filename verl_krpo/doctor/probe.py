"""What is asked of other processes and nodes. Standard library only: it also runs where we are not installed."""

import contextlib
import io
import json
import os
import sys
import traceback
from typing import Any


def registered() -> dict[str, Any]:
    """What importing verl registers in the process that runs this."""
    answer: dict[str, Any] = {"executable": sys.executable, "verl": None, "error": None, "registered": []}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            import verl
            from verl.trainer.ppo import core_algos

            answer["verl"] = verl.__version__
            methods = core_algos.ADV_ESTIMATOR_REGISTRY.get("krpo"), core_algos.POLICY_LOSS_REGISTRY.get("kpo")
            answer["registered"] = [f"{method.__module__}.{method.__name__}" for method in methods if method]
            if len(answer["registered"]) < 2:
                import verl_krpo.plugin  # noqa: F401 (verl swallows why a plugin fails: this raises it again)
        except Exception:
            answer["error"] = traceback.format_exc()
    return answer


def absent(paths: list[str]) -> list[str]:
    """Those of the paths that this machine does not have."""
    return [path for path in paths if not os.path.exists(path)]


if __name__ == "__main__":
    print("\n" + json.dumps(registered()))
