"""Rows of the synthetic language: functions of (seed, stream, step, index) with the statistics that the settings say."""

import math

import pytest
import torch

from icl.config import EvaluationConfig, LanguageConfig, ModelConfig, RunConfig, SeedsConfig
from icl.tasks.rows import bigram_table, row_source, sample_rows_together

MODEL = ModelConfig(family="language", num_heads=2, embed_size=8, mlp_size=0, attention_bias=True, init="normal")


def run(seeds=None, **language):
    return RunConfig(
        model=MODEL,
        language=LanguageConfig(**language),
        seeds=SeedsConfig(**(seeds or {})),
        evaluation=EvaluationConfig(num_prompts=8),
    )


def rows_of(config, steps=range(1), indices=range(4), stream="train"):
    xs, ys = row_source(config, stream=stream).sample(steps, indices)
    assert torch.equal(xs[..., 1:], ys[..., :-1])
    return torch.cat([xs[..., :1], ys], dim=-1)


def by_loops(config, step, index):
    """Return one row by a loop, from the module's docstring."""
    from icl import rng

    text, table_key = config.language, rng.stream(config.seeds.tasks, "language/table")
    key = rng.stream(config.seeds.data, "language/train")
    words = rng.words(key, torch.tensor([step]), torch.tensor([index]), 4 * text.context_size)[0, 0].tolist()
    successors = [
        [
            word * (text.vocab_size - 1) >> 32
            for word in rng.words(table_key, torch.tensor([0]), torch.tensor([token]), text.num_successors)[
                0, 0
            ].tolist()
        ]
        for token in range(text.vocab_size)
    ]
    harmonic = sum(1 / j for j in range(1, text.num_successors + 1))
    row, left, place = [text.vocab_size - 1], 0, 0
    shortest = text.copy_length // 2
    for t in range(1, text.context_size):
        start, length, where, chosen = words[4 * t : 4 * t + 4]
        if t > 2 and left == 0 and start < int(text.copy_rate * 2**32):
            left, place = shortest + (length * (text.copy_length - shortest + 1) >> 32), 1 + (where * (t - 2) >> 32)
        if left:
            row.append(row[place])
            left, place = left - 1, place + 1
            continue
        total, slot = 0.0, 0
        for j in range(1, text.num_successors + 1):
            total += 1 / j / harmonic
            if chosen < int(total * 2**32) or j == text.num_successors:
                slot = j - 1
                break
        row.append(successors[row[-1]][slot])
    return row


def test_rows_are_those_of_a_loop():
    config = run(vocab_size=20, context_size=40, copy_rate=0.2, copy_length=8, num_successors=3)
    rows = rows_of(config, range(5, 7), range(3))
    for s, step in enumerate((5, 6)):
        for index in range(3):
            assert rows[s, index].tolist() == by_loops(config, step, index)


def test_a_row_depends_on_seed_stream_step_and_index_only():
    config = run()
    rows = rows_of(config, range(3), range(4))
    assert torch.equal(rows[2, 1:], rows_of(config, range(2, 3), range(1, 4))[0])
    assert torch.equal(rows[2], rows_of(config, range(2, 3), torch.tensor([0, 1, 2, 3]))[0])
    assert len({tuple(row) for row in rows.flatten(0, 1).tolist()}) == 12
    for other in (
        rows_of(run(seeds={"data": 1}), range(3)),
        rows_of(run(seeds={"tasks": 1}), range(3)),
        rows_of(config, range(3), stream="llc"),
    ):
        assert not torch.equal(rows, other)
    assert torch.equal(rows, rows_of(run(seeds={"evaluation": 1}), range(3)))


def test_a_shorter_row_is_the_beginning_of_a_longer_one():
    assert torch.equal(rows_of(run(context_size=50))[..., :30], rows_of(run(context_size=30)))


def test_rows_of_many_sources_are_those_of_each():
    configs = [run(seeds={"data": seed}) for seed in (3, 4)]
    together = sample_rows_together([row_source(config, stream="train") for config in configs], range(2), range(3))
    for member, config in enumerate(configs):
        alone = row_source(config, stream="train").sample(range(2), range(3))
        assert torch.equal(together.xs[member], alone.xs)
        assert torch.equal(together.ys[member], alone.ys)


def test_without_copies_the_frequencies_of_bigrams_are_those_of_the_table():
    config = run(vocab_size=6, context_size=60, num_successors=3, copy_rate=0.0)
    rows = rows_of(config, range(2), range(1000)).flatten(0, 1)
    table = bigram_table(row_source(config, stream="train"))
    torch.testing.assert_close(table.sum(1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-8)
    counts = torch.zeros(6, 6, dtype=torch.float64).index_put(
        (rows[:, :-1].flatten(), rows[:, 1:].flatten()), torch.tensor(1.0, dtype=torch.float64), accumulate=True
    )
    totals = counts.sum(1, keepdim=True)
    spread = (table * (1 - table) / totals).sqrt()
    seen = totals[:, 0] > 0
    assert ((counts / totals - table).abs() <= 5 * spread + 1e-12)[seen].all()
    assert (counts[table == 0] == 0).all()


def test_copies_begin_at_their_rate():
    """Most pairs of tokens of a large vocabulary are no bigrams of the language, so such a pair shows where a copy begins."""
    config = run(vocab_size=5000, context_size=64, num_successors=2, copy_rate=0.01, copy_length=4)
    rows = rows_of(config, range(1), range(2000))[0]
    table = bigram_table(row_source(config, stream="train"))
    rate = (table[rows[:, :-1], rows[:, 1:]] == 0)[:, 3:].double().mean().item()
    expected = 1 / (1 / 0.01 + 3 - 1)  # a copy of 2 to 4 tokens begins 1 / rate tokens after the last one ended
    # Copies of a pair that began a copy count again; they are about 2 in 100.
    assert rate == pytest.approx(expected, abs=6 * math.sqrt(expected / (2000 * 60)) + 0.05 * expected)


def test_a_copy_repeats_an_earlier_segment_of_the_row():
    config = run(vocab_size=5000, context_size=64, num_successors=2, copy_rate=1.0, copy_length=6)
    rows = rows_of(config, range(1), range(50))[0]
    for row in rows.tolist():
        assert set(row[3:]) <= set(row[1:3])  # from the fourth token on, everything is copied
    longest = run(vocab_size=5000, context_size=64, num_successors=2, copy_rate=0.1, copy_length=20)
    for row in rows_of(longest, range(1), range(20))[0].tolist():
        segments = {tuple(row[t : t + 5]) for t in range(1, 59)}
        assert len(segments) < 58  # some segment of five tokens occurs twice


def test_rows_begin_with_the_token_that_appears_nowhere_else():
    rows = rows_of(run(vocab_size=10), range(1), range(200))[0]
    assert (rows[:, 0] == 9).all()
    assert (rows[:, 1:] < 9).all()
