"""Behaviours of language models: against plain loops, and on models whose behaviour is known."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from icl.analysis.language import probes, released, scores, weights
from icl.evaluation.frequencies import count_pairs, from_counts
from icl.metrics import Estimate
from icl.model.language import LanguageModel
from icl.model.stacked import stack
from icl.runs.measure import Entry
from tests.model.test_language import make_config, make_model

V, T, BOS = 11, 24, 10


def stacked(*models):
    return {
        name: tensor.detach() for name, tensor in stack([dict(model.named_parameters()) for model in models]).items()
    }


def random_rows(num_rows, length=T, seed=0):
    rows = torch.randint(BOS, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    rows[:, 0] = BOS
    return rows


def models(**options):
    config = make_config(**{"positions": "shortformer", "mlp_size": 4, **options})
    return config, [make_model(config, seed, context_size=T) for seed in (0, 1)]


def mean_of(values):
    values = np.asarray(values, dtype=float)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


def assert_estimate(estimate: Estimate, member, values, tolerance=1e-9):
    value, error = mean_of(values)
    assert float(estimate.value[member]) == pytest.approx(value, rel=tolerance)
    assert float(estimate.stderr[member]) == pytest.approx(error, rel=1e-6)


def bigram_model(table):
    """Return a model without attention whose next-token probabilities are the rows of a table."""
    vocab_size = len(table)
    config = make_config(num_layers=1, num_heads=1, embed_size=vocab_size)
    model = LanguageModel(config, vocab_size=vocab_size, context_size=T).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(".w") else 0.0)
        model.embed["W_E"].copy_(torch.eye(vocab_size))
        gain = 1 / math.sqrt((1 / vocab_size) * (1 - 1 / vocab_size) + 1e-5)  # LN(e_s) = gain (e_s - 1 / V)
        model.unembed["W_U"].copy_(table.log() / gain)
        model.unembed["b_U"].copy_(table.log().mean(0))
    return model


def induction_model(strength=60.0):
    """Return a hand-made induction head: head 0.0 attends to the previous token and copies it, head 1.0 looks for the current token there.

    The stream has a one-hot part for the token, one for the previous token, and one for the position, which is only in W_pos.
    """
    width = 2 * V + T
    config = make_config(num_layers=2, num_heads=1, embed_size=width, head_size=max(T, V), positions="shortformer")
    model = LanguageModel(config, vocab_size=V, context_size=T).double()
    token, previous, place = range(V), range(V, 2 * V), range(2 * V, width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(".w") else 0.0)
        model.embed["W_E"][range(V), token] = 1.0
        model.pos_embed["W_pos"][range(T), place] = 1.0
        first, second = model.blocks[0].attn, model.blocks[1].attn
        first.W_Q[0, place[1:], range(T - 1)] = strength  # the query at t asks for position t - 1
        first.W_K[0, place, range(T)] = strength
        first.W_V[0, token, range(V)] = 1.0
        first.W_O[0, range(V), previous] = 1.0
        second.W_Q[0, token, range(V)] = strength
        second.W_K[0, previous, range(V)] = strength
    return model


def test_losses_and_ablated_losses_are_those_of_a_loop():
    config, members = models()
    rows, params = random_rows(5), stacked(*members)
    losses = scores.token_losses(config, params, rows)
    ablated = scores.token_losses(config, scores.without_positions(params), rows)
    for number, model in enumerate(members):
        for ours, is_ablated in ((losses, False), (ablated, True)):
            if is_ablated:
                with torch.no_grad():
                    model.pos_embed["W_pos"].zero_()
            logs = model(rows).detach().log_softmax(-1)
            expected = [[-float(logs[b, p, rows[b, p + 1]]) for p in range(T - 1)] for b in range(5)]
            torch.testing.assert_close(ours[number], torch.tensor(expected, dtype=torch.float64))
        differences = (ablated[number] - losses[number]).mean(-1).tolist()
        assert_estimate(scores.paired_difference(ablated.mean(-1), losses.mean(-1)), number, differences)


def test_bigram_score_is_that_of_a_loop():
    config, members = models()
    rows = random_rows(9)
    at = torch.tensor([1, 5, 20, 3, 3, 8, 2, 11, 7])
    pairs = torch.rand(V, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs[:, 4] = 0
    pairs = pairs / pairs.sum(1, keepdim=True)
    pairs[int(rows[2, 20])] = 0  # a token that the text does not have
    score, floor = scores.bigram_score(config, stacked(*members), rows, at, pairs)
    for number, model in enumerate(members):
        values, floors = [], []
        for b in range(9):
            q = pairs[rows[b, at[b]]]
            if q.sum() == 0:
                continue
            logs = model(rows[b : b + 1]).detach()[0, at[b]].log_softmax(-1)
            values.append(-sum(float(q[t] * logs[t]) for t in range(V)))
            floors.append(-sum(float(q[t] * q[t].log()) for t in range(V) if q[t] > 0))
        assert_estimate(score, number, values)
        assert_estimate(floor, number, floors)


def test_a_table_of_bigrams_as_a_model_is_on_the_floor_and_no_other_table_is():
    table = torch.rand(V, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    table = table / table.sum(1, keepdim=True)
    model = bigram_model(table)
    rows = random_rows(50)
    torch.testing.assert_close(model(rows).detach().softmax(-1), table[rows])
    at = probes.positions(0, 50, num_predictions=T - 1)
    score, floor = scores.bigram_score(model.config, stacked(model), rows, at, table)
    assert float(score.value[0]) == pytest.approx(float(floor.value[0]), rel=1e-10)
    other, _ = scores.bigram_score(model.config, stacked(model), rows, at, table.roll(1, 0))
    assert float(other.value[0]) > float(floor.value[0]) + 0.01


def test_ngram_score_is_that_of_a_loop_and_one_for_a_model_that_knows_nothing():
    config, members = models()
    ngrams = torch.randint(BOS, (7, 3), generator=torch.Generator().manual_seed(2))
    test_losses = torch.rand(2, 20, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 1
    estimate = scores.ngram_score(config, stacked(*members), ngrams, test_losses, bos=BOS)
    for number, model in enumerate(members):
        own = []
        for ngram in ngrams.tolist():
            logs = model(torch.tensor([[BOS, *ngram]])).detach()[0].log_softmax(-1)
            own.append(-float(logs[2, ngram[2]]))  # the prediction after BOS and the first two tokens
        (value, error), (test, test_error) = mean_of(own), mean_of(test_losses[number])
        assert float(estimate.value[number]) == pytest.approx(test / value)
        expected = test / value * math.hypot(error / value, test_error / test)
        assert float(estimate.stderr[number]) == pytest.approx(expected, rel=1e-6)
    uniform = bigram_model(torch.full((V, V), 1 / V, dtype=torch.float64))
    losses = scores.token_losses(uniform.config, stacked(uniform), random_rows(6))
    score = scores.ngram_score(uniform.config, stacked(uniform), ngrams, losses[..., 2], bos=BOS)
    assert float(score.value[0]) == pytest.approx(1.0, rel=1e-9)


def test_a_hand_made_induction_head_has_scores_of_one():
    model = induction_model()
    sizes = {"bos": BOS, "context_size": T}
    rows, last = probes.previous_token_rows(0, 40, **sizes)
    previous = scores.previous_token_scores(model.config, stacked(model), rows, last)
    assert float(previous[0, :, 0, 0].min()) > 0.999
    rows, first, second = probes.prefix_rows(0, 40, **sizes)
    matching = scores.prefix_matching_scores(model.config, stacked(model), rows, first, second)
    assert float(matching[0, :, 1, 0].min()) > 0.999
    assert float(matching[0, :, 0, 0].max()) < 0.001


def test_uniform_attention_has_the_closed_form():
    """A head with zero queries attends to all t + 1 tokens alike."""
    config, (model, _) = models()
    with torch.no_grad():
        for block in model.blocks:
            for part in "QK":
                getattr(block.attn, f"W_{part}").zero_()
                getattr(block.attn, f"b_{part}").zero_()
    rows, last = probes.previous_token_rows(3, 30, bos=BOS, context_size=T)
    expected = (1 / (last + 1).double())[None, :, None, None].expand(1, -1, 2, 2)
    torch.testing.assert_close(scores.previous_token_scores(config, stacked(model), rows, last), expected)
    rows, first, second = probes.prefix_rows(3, 30, bos=BOS, context_size=T)
    expected = (1 / (second + 1).double())[None, :, None, None].expand(1, -1, 2, 2)
    torch.testing.assert_close(scores.prefix_matching_scores(config, stacked(model), rows, first, second), expected)


def test_probe_rows_have_the_promised_places():
    sizes = {"bos": 4999, "context_size": 1024}
    rows, last = probes.previous_token_rows(0, 2000, **sizes)
    assert rows.shape == (2000, 64)
    assert (int(last.min()), int(last.max())) == (15, 63)
    rows, first, second = probes.prefix_rows(0, 2000, **sizes)
    assert rows.shape == (2000, 128)
    assert (int(first.min()), int(first.max()), int(second.min()), int(second.max())) == (1, 63, 65, 127)
    special = rows.gather(1, first[:, None])
    assert torch.equal(special, rows.gather(1, second[:, None]))
    assert ((rows == special).sum(1) == 2).all()
    assert (rows[:, 0] == 4999).all()
    assert (rows[:, 1:] < 4999).all()
    more, _, _ = probes.prefix_rows(0, 2100, **sizes)
    assert torch.equal(more[:2000], rows)
    assert not torch.equal(probes.prefix_rows(1, 2000, **sizes)[0], rows)


def test_frequent_ngrams_are_those_of_a_count():
    rows = torch.randint(4, (30, 12), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 4
    counts: dict[tuple[int, ...], int] = {}
    for row in rows.tolist():
        for i in range(1, 11):
            counts[tuple(row[i : i + 2])] = counts.get(tuple(row[i : i + 2]), 0) + 1
    ours = [tuple(ngram) for ngram in probes.frequent_ngrams(rows, 2, 5, bos=4).tolist()]
    assert [counts[ngram] for ngram in ours] == sorted(counts.values(), reverse=True)[:5]
    assert len(set(ours)) == 5


def test_ngrams_of_a_larger_vocabulary_are_the_first_that_split_into_n_tokens():
    class Split:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return type("Encoding", (), {"ids": [ord(letter) for letter in text]})

    words = ["a", "bc", "d e", "fg", "hi", "jkl"]
    assert probes.vocabulary_ngrams(Split(), words, 2, 2).tolist() == [[98, 99], [102, 103]]
    assert probes.vocabulary_ngrams(Split(), words, 3, 9, skipped=32).tolist() == [[106, 107, 108]]


def test_numbers_of_a_run_stand_below_the_released_numbers_of_the_same_step():
    def entry(step, value):
        keys = [*released.RELEASED, ("loss", "", "7")]
        rows = [{"quantity": q, "part": part, "position": at, "value": value, "stderr": 0.5} for q, part, at in keys]
        return Entry(step, "x", rows if step else rows[:1])

    llcs = pd.DataFrame({"step": [900, 6400, 6400], released.LLC_COLUMN: [None, 7.0, 172.44]})
    lines = released.beside_released([entry(0, 8.0), entry(1001, 9.0), entry(6400, 3.5)], llcs)
    told = [line.split() for line in lines[3:]]
    assert told[0] == ["0", "7.943", "7.947", "-0.122", "0.030", "0.011", "123.6", "released"]
    assert told[1] == ["8.000", "±", "0.500", "-", "-", "-", "-", "-", "this", "run"]
    assert told[2][0] == "6,500"  # step 1,001 is too far from 900
    assert told[3] == ["6,400", *["3.500", "±", "0.500"] * 5, "172.4", "this", "run"]
    assert len(told) == 4
    assert released.beside_released([entry(300, 1.0)], llcs) == []


def test_k_composition_and_norms_are_those_of_loops():
    config, members = models(num_layers=3)
    params = stacked(*members)
    ours = weights.k_composition(config, params)
    pairs = weights.head_pairs(config)
    assert len(pairs) == 3 * 2 * 2
    for number, model in enumerate(members):
        for column, ((l1, h1), (l2, h2)) in enumerate(pairs):
            early, late = model.blocks[l1].attn, model.blocks[l2].attn
            qk = (late.W_Q[h2] @ late.W_K[h2].T).detach().numpy()
            ov = (early.W_V[h1] @ early.W_O[h1]).detach().numpy()
            product = (
                sum(sum(qk[i, k] * ov[j, k] for k in range(8)) ** 2 for i in range(8) for j in range(8)) ** 0.5
            )  # what the key side of the later head reads of what the earlier head writes
            expected = product / (np.linalg.norm(qk) * np.linalg.norm(ov))
            assert float(ours[number, column]) == pytest.approx(expected, rel=1e-10)
        total = math.sqrt(sum(float((parameter.detach() ** 2).sum()) for parameter in model.parameters()))
        assert float(weights.weight_norm(params)[number]) == pytest.approx(total)
        values = np.linalg.svd(model.pos_embed["W_pos"].detach().numpy(), compute_uv=False)
        assert weights.position_spectrum(params)[number].tolist() == pytest.approx(values.tolist())


def test_a_head_that_reads_exactly_what_another_writes_composes_fully():
    model = induction_model()
    composition = float(weights.k_composition(model.config, stacked(model))[0, 0])
    # W_QK is the V x V identity between two parts and W_OV the same one: |I I| / (|I| |I|) = sqrt(V) / V.
    assert composition == pytest.approx(1 / math.sqrt(V), rel=1e-9)


def test_frequencies_are_those_of_a_count_and_smoothed_rows_are_probabilities():
    xs = torch.tensor([[0, 1, 2, 0, 1]])
    ys = torch.tensor([[1, 2, 0, 1, 1]])
    counted = from_counts(count_pairs(xs, ys, 4))
    assert counted.pairs[0].tolist() == [0, 1, 0, 0]
    assert counted.pairs[1].tolist() == [0, 0.5, 0.5, 0]
    assert counted.pairs[3].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(counted.unigrams, torch.tensor([1.5, 3.5, 1.5, 0.5]) / 7)
    torch.testing.assert_close(counted.smoothed.sum(1), torch.ones(4))
    assert float(counted.smoothed[0, 1]) == pytest.approx((2 + 0.5 * 0.5) / 2.5)


def test_rows_are_computed_in_parts_with_the_same_results(monkeypatch):
    config, members = models()
    params, rows = stacked(*members), random_rows(7)
    whole = scores.token_losses(config, params, rows)
    first, second = torch.arange(1, 8), torch.arange(9, 16)
    matching = scores.prefix_matching_scores(config, params, rows, first, second)
    monkeypatch.setattr(scores, "rows_at_once", lambda *args: 3)
    torch.testing.assert_close(scores.token_losses(config, params, rows), whole)
    torch.testing.assert_close(scores.prefix_matching_scores(config, params, rows, first, second), matching)


def test_logits_of_next_tokens_are_those_of_a_loop():
    config, members = models()
    rows, at = random_rows(5), torch.tensor([1, 20, 3, 22, 9])
    logits = scores.next_token_logits(config, stacked(*members), rows, at)
    for number, model in enumerate(members):
        every = model(rows[:, :-1]).detach()
        expected = [float(every[b, at[b], rows[b, at[b] + 1]]) for b in range(5)]
        assert logits[number].tolist() == pytest.approx(expected, rel=1e-10)
