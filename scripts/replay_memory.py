"""Peak memory of `verl-krpo replay` on a synthetic rollout log of a given size.

    python scripts/replay_memory.py [GIGABYTES]        1 if not given; the log goes to a temporary folder

Prints seconds and peak memory of the replay process, and that of importing what it needs.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS, MEMBERS, CHARACTERS = 64, 12, 2000


def write(folder: Path, size: int) -> int:
    """Steps of 64 prompts x 12 responses of 2,000 characters until `size` bytes are written; their number."""
    rng = random.Random(0)
    text, written, step = "".join(rng.choices("abcdefgh ", k=CHARACTERS)), 0, 0
    while written < size:
        step += 1
        lines = []
        for prompt in range(PROMPTS):
            rate = rng.random()
            for member in range(MEMBERS):
                row = {"input": f"prompt {prompt} of {step}", "output": text, "gts": "1", "step": step}
                row |= {"score": float(rng.random() < rate), "uid": f"{step}-{prompt}_{member}_0"}
                lines.append(json.dumps(row) + "\n")
        written += (folder / f"{step}.jsonl").write_text("".join(lines))
    return step


def run(*arguments: str) -> tuple[float, float]:
    """Seconds, and the largest resident set in MB of any child so far."""
    began = time.monotonic()
    subprocess.run([sys.executable, *arguments], check=True)
    return time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    _, imports = run("-c", "import verl_krpo.analysis.replay_report, matplotlib.figure")
    with tempfile.TemporaryDirectory() as folder:
        steps = write(Path(folder), int(size * 1e9))
        seconds, peak = run("-m", "verl_krpo", "replay", folder, "--out", f"{folder}/replay.html")
    print(f"\n{size:g} GB in {steps} steps: {seconds:.0f} s, peak {peak:.0f} MB (imports alone: {imports:.0f} MB)")


if __name__ == "__main__":
    main()
