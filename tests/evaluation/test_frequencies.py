"""Frequencies of tokens and pairs of tokens: few pairs of a large vocabulary need little memory."""

import pytest
import torch

from icl.config import LanguageConfig, ModelConfig, RunConfig
from icl.config.validation import ConfigError
from icl.evaluation import frequencies
from icl.tasks.rows import TEST, row_source

MODEL = ModelConfig(family="language", num_heads=2, embed_size=8, mlp_size=0, attention_bias=True, init="normal")


def rows_and_config(vocab_size):
    config = RunConfig(model=MODEL, language=LanguageConfig(vocab_size=vocab_size))
    rows = row_source(config, stream=TEST).sample(range(1), range(5))
    return type(rows)(*(part[0] for part in rows)), config


def test_losses_are_those_of_the_tables_of_frequencies():
    rows, config = rows_and_config(16)
    tables, losses = frequencies.frequencies(config), frequencies.frequency_losses(config, rows)
    assert torch.equal(losses["unigram"], -tables.unigrams.log()[rows.ys])
    assert torch.equal(losses["bigram"], -tables.smoothed.log()[rows.xs, rows.ys])


def test_a_vocabulary_may_be_too_large_for_tables_of_pairs(monkeypatch):
    monkeypatch.setattr(frequencies, "_MAX_TOKENS", 2**12)
    rows, config = rows_and_config(2**20)
    assert frequencies.frequency_losses(config, rows)["bigram"].isfinite().all()
    with pytest.raises(ConfigError, match="the pairs of 1,048,576 tokens"):
        frequencies.frequencies(config)
