"""Attention patterns of the real model, and scores of made-up patterns with known answers."""

import math

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl.analysis.attention import Settings, measure_members, over_queries, patterns, scores, uniform_pattern
from icl.analysis.run import Members
from icl.build import build_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.model.stacked import stack
from icl.plotting.attention import plot
from icl.runs.checkpoints import Checkpoint, save_checkpoint
from icl.runs.folder import RunFolder
from icl.tasks.prompts import sample_prompts

DEEP = change(TINY, model={"num_layers": 2})


def weights(config=DEEP, *, seed=0):
    model = build_model(change(config, seeds={"model": seed}))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def random_patterns(count=6, num_tokens=7, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, num_tokens, num_tokens, generator=generator, dtype=torch.float64)
    return logits.masked_fill(torch.ones(num_tokens, num_tokens).triu(1).bool(), -math.inf).softmax(-1)


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_patterns_are_those_that_the_forward_pass_uses(layer_norm, has_bias):
    """The average of the values under a pattern is the input of the attention's output map."""
    config = change(DEEP, model={"layer_norm": layer_norm, "attention_bias": has_bias})
    params = weights(config, seed=3)
    prompts = sample_prompts(config, stream="a", step=0, batch_size=5)
    model = build_model(config)
    found = patterns(model, params, prompts, prompts_at_once=2)
    model.load_state_dict(params)
    seen = {}
    for number, block in enumerate(model.blocks):
        for name in ("qkv", "output"):
            module = getattr(block.attention, name)
            module.register_forward_hook(lambda _, given, out, key=(number, name): seen.update({key: (given[0], out)}))
    model(prompts.xs, prompts.ys)
    for number, pattern in enumerate(found):
        assert pattern.shape == (5, 2, 7, 7)
        values = seen[number, "qkv"][1].unflatten(-1, (2, 3, 4))[..., 2, :]  # B T H c
        gathered = torch.einsum("bhqk,bkhc->bqhc", pattern, values).flatten(2)
        torch.testing.assert_close(gathered, seen[number, "output"][0])


def test_patterns_do_not_touch_the_model():
    model, prompts = build_model(DEEP), sample_prompts(DEEP, stream="a", step=0, batch_size=3)
    patterns(model, weights(seed=1), prompts, prompts_at_once=3)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights(seed=0).items())


def test_scores_of_uniform_attention():
    found = scores(uniform_pattern(7))
    expected = [1 / (k + 1) for k in range(1, 7)]
    assert found["entropy"][0].tolist() == pytest.approx([1] * 6)
    assert found["variability"].abs().max() == 0
    assert found["self"][0].tolist() == pytest.approx(expected)
    assert found["previous"][0].tolist() == pytest.approx(expected)
    assert found["x_tokens"][0].tolist() == pytest.approx([(k // 2 + 1) / (k + 1) for k in range(1, 7)])
    assert found["lag"][0].tolist() == pytest.approx([0.5] * 6)
    assert found["hardness"].abs().max() == 0


@pytest.mark.parametrize(("offset", "lag"), [(0, lambda k: 0), (1, lambda k: 1 / k)])
def test_scores_of_a_head_that_looks_at_one_token(offset, lag):
    """The head attends to the token itself, or to the one before it.

    The token k = 0 has no token before it, so it attends to itself and is left out of the scores.
    """
    pattern = torch.eye(7, dtype=torch.float64).roll(-offset, dims=1).tril()
    pattern[0] = torch.eye(7)[0]
    found = scores(pattern.expand(3, 7, 7))
    assert found["entropy"].abs().max() == 0
    assert found["self"].mean() == (1 - offset)
    assert found["previous"].mean() == offset
    assert found["lag"][0].tolist() == pytest.approx([lag(k) for k in range(1, 7)])
    assert found["hardness"][0].tolist() == pytest.approx([k / (k + 1) for k in range(1, 7)])
    of_x, of_y = (over_queries(found["x_tokens"], kind).value.item() for kind in ("x", "y"))
    assert (of_x, of_y) == ((1, 0) if offset == 0 else (0, 1))


def test_scores_by_plain_loops():
    pattern = random_patterns()
    found = scores(pattern)
    mean = pattern.mean(0)
    for b in range(6):
        for k in range(1, 7):
            p = pattern[b, k].tolist()
            expected = {
                "entropy": -sum(p[j] * math.log2(p[j]) for j in range(k + 1)) / math.log2(k + 1),
                "variability": sum(abs(p[j] - mean[k, j].item()) for j in range(7)) / 2,
                "self": p[k],
                "previous": p[k - 1],
                "x_tokens": sum(p[j] for j in (0, 2, 4, 6)),
                "y_tokens": sum(p[j] for j in (1, 3, 5)),
                "lag": sum(p[j] * (k - j) for j in range(k + 1)) / k,
                "hardness": sum(p[j] <= 1e-3 for j in range(k + 1)) / (k + 1),
            }
            assert {name: values[b, k - 1].item() for name, values in found.items()} == pytest.approx(expected)


def test_two_fixed_patterns_vary_by_half():
    """On half of the prompts the head attends to the token itself, on the others to the one before. Each pattern is 1/2 from the mean."""
    itself = torch.eye(5, dtype=torch.float64)
    before = itself.roll(-1, dims=1).tril()
    before[0] = itself[0]
    found = scores(torch.stack([itself, before] * 4))
    assert found["variability"].unique().tolist() == [0.5]


def test_means_over_kinds_of_queries_and_their_errors():
    values = scores(random_patterns(50))["self"]  # B 6, queries 1..6; x-tokens are 2, 4, 6
    for kind, chosen in (("all", range(6)), ("x", (1, 3, 5)), ("y", (0, 2, 4))):
        own = values[:, list(chosen)].mean(1)
        found = over_queries(values, kind)
        assert found.value.item() == pytest.approx(own.mean().item())
        assert found.stderr.item() == pytest.approx(own.std().item() / 50**0.5)
    assert over_queries(values[:, :0], "all").value.isnan()


def test_rows_of_members_do_not_depend_on_memory(monkeypatch):
    params = [weights(seed=seed) for seed in range(2)]
    checkpoints = [Checkpoint(seed, DEEP, one, "digest") for seed, one in enumerate(params)]
    members = Members(DEEP, checkpoints, stack(params), 0)
    whole = measure_members(members, settings=Settings(num_prompts=10))
    monkeypatch.setattr("icl.analysis.prompts._NUMBERS_AT_ONCE", 1)
    again = measure_members(members, settings=Settings(num_prompts=10))
    for one, other in zip(whole, again, strict=True):
        assert {row["part"] for row in one.rows} == {"b1h1", "b1h2", "b2h1", "b2h2"}
        assert [row["value"] for row in one.rows] == pytest.approx([row["value"] for row in other.rows], abs=1e-6)
    assert whole[0].arrays["patterns"].shape == (2, 2, 7, 7)
    assert [row["value"] for row in whole[0].rows] != [row["value"] for row in whole[1].rows]


@pytest.mark.slow
def test_the_attention_of_a_run_from_the_command_line(tmp_path, capsys):
    folder = RunFolder(tmp_path / "r")
    folder.write_config(DEEP)
    for step in (0, 7):
        save_checkpoint(folder.checkpoints, step, DEEP, weights(seed=step))
    assert main(["analyse", str(folder.path), "--what", "attention", "--num_prompts", "16"]) == 0
    assert "uniform attention" in capsys.readouterr().out
    assert (folder.figures / "attention.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(folder.results / "attention.csv")
    pattern = table[table["quantity"] == "pattern"]
    assert set(pattern["step"]) == {7}
    assert pattern.groupby(["part", "query_token"])["value"].sum().to_numpy() == pytest.approx(1)
    curves = table[table["step"].notna() & (table["quantity"] != "pattern")]
    sums = curves[curves["quantity"].isin(("x_tokens", "y_tokens"))].groupby(["step", "part", "queries"])["value"].sum()
    assert sums.to_numpy() == pytest.approx(1)
    assert set(table.loc[table["step"].isna(), "part"]) == {"uniform"}


@pytest.mark.parametrize(("num_layers", "num_heads"), [(1, 1), (5, 2)])
def test_figures_of_few_and_of_many_blocks(tmp_path, num_layers, num_heads):
    from icl.analysis.attention import analyse

    config = change(TINY, model={"num_layers": num_layers, "num_heads": num_heads})
    folder = RunFolder(tmp_path / "r")
    save_checkpoint(folder.checkpoints, 0, config, weights(config))
    figure = plot(analyse(folder.path, Settings(num_prompts=4)).table, title="t")
    assert len(figure.axes) == 9  # eight panels and a colour bar


def test_too_few_prompts_are_a_sentence():
    with pytest.raises(ConfigError, match="num_prompts"):
        Settings(num_prompts=1)
