import pytest
import torch

from verl_krpo import tiny_model

PAD, EOS, VOCAB = 0, 1, 48


@pytest.fixture(scope="session")
def model():
    """A random Qwen2 of 2 layers over 48 tokens, float32: 0 pads, 1 ends."""
    return tiny_model.untrained(VOCAB, PAD, EOS, seed=0).eval()


@pytest.fixture
def plain_log_probs(model):
    """Oracle: log_softmax(logits / temperature) of one sequence by one forward pass, no cache, no padding."""

    @torch.no_grad()
    def log_probs(prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return (logits / temperature).log_softmax(-1)  # (response, vocab)

    return log_probs
