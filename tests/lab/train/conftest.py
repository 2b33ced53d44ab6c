"""The models of the laboratory in small."""

import pytest

from verl_krpo import tiny_model


@pytest.fixture(scope="package")
def models(tmp_path_factory):
    """A tiny model that knows the form of an answer and few sums, as that of `sharpen`."""
    path = tmp_path_factory.mktemp("models")
    tokenizer = tiny_model.tokenizer()
    model = tiny_model.untrained(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=0)
    tiny_model.warm_start(model, tokenizer, steps=100, seed=0, batch_size=16)
    model.save_pretrained(path / "tiny")
    tokenizer.save_pretrained(path / "tiny")
    return path
