"""A process in which no trainer has started."""

import pytest

from verl_krpo.plugin import metrics, prompt_memory, scores


@pytest.fixture
def no_run(monkeypatch):
    monkeypatch.setattr(prompt_memory, "_run", None)
    monkeypatch.setattr(scores, "_loss_agg_mode", None)
    yield
    metrics.discard()
