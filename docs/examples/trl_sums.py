"""KrpoTrainer on the CPU: the tiny model of the CPU recipes learns to add. Writes a reward a step.

    python docs/examples/trl_sums.py [STEPS] [CURVE.csv]

In an environment with torch, trl and this package (docs/without_verl.md).
"""

import random
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig
from trl_grpo import KrpoTrainer

from verl_krpo.data.arithmetic import draw_sum, is_test
from verl_krpo.reward.answer_tag import compute_score
from verl_krpo.tiny_model import build


def reward(completions, answer, **_):
    return [compute_score("sums", text, truth)["score"] for text, truth in zip(completions, answer, strict=True)]


def train(folder: Path, steps: int, trainer: type = KrpoTrainer, **settings) -> list[float]:
    """The mean reward of every step; the tiny model is built in `folder` if it is not there."""
    build(folder / "model")
    model, tokenizer = (each.from_pretrained(folder / "model") for each in (AutoModelForCausalLM, AutoTokenizer))
    rng, sums = random.Random(1), []
    while len(sums) < 16 * steps:
        problem = draw_sum(rng)
        sums += [] if is_test(problem.expression) else [problem]
    rows = Dataset.from_list([{"prompt": f"{problem.question}\n", "answer": problem.answer} for problem in sums])
    shape = dict(per_device_train_batch_size=128, num_generations=8, max_completion_length=32, max_steps=steps)
    machine = dict(use_cpu=True, bf16=False, gradient_checkpointing=False)
    quiet = dict(logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
    chosen = {"learning_rate": 1e-4, "lr_scheduler_type": "constant"} | settings
    args = GRPOConfig(str(folder / "trl"), **shape, **machine, **quiet, **chosen)
    run = trainer(model, reward_funcs=reward, args=args, train_dataset=rows, processing_class=tokenizer)
    run.train()
    return [line["reward"] for line in run.state.log_history if "reward" in line]


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        rewards = train(Path(folder), steps)
    lines = ["step,reward", *(f"{step},{reward:.4f}" for step, reward in enumerate(rewards, start=1))]
    Path(sys.argv[2] if len(sys.argv) > 2 else "trl_sums.csv").write_text("\n".join(lines) + "\n")
