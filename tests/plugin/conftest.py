"""A process in which no trainer has started, and nothing waits for its log."""

import pytest

from verl_krpo.plugin import metrics, prompt_memory, scores


@pytest.fixture(autouse=True)
def nothing_pending():
    metrics.discard()  # of tests before, in whichever room


@pytest.fixture
def no_run(monkeypatch):
    monkeypatch.setattr(prompt_memory, "_run", None)
    monkeypatch.setattr(scores, "_loss_agg_mode", None)
