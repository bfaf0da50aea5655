"""The benchmarks compare like with like: peers compute what we compute, and a ratio is one where both sides are the same."""

import re
from pathlib import Path

import pytest
import torch

from icl.baselines import dmmse
from icl.build import build_architecture
from icl.presets import preset

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _import_from_the_checkout(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def test_the_plain_model_is_the_same_model():
    """Number for number: with our weights it gives our predictions."""
    from benchmarks.peers import PlainTransformer

    config = preset("L2H4")
    ours, plain = build_architecture(config).double(), PlainTransformer(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.3, generator=generator)
        weights = dict(ours.named_parameters())
        for name, parameter in plain.named_parameters():
            parameter.copy_(_as_theirs(weights[_our_name(name)], name))
    xs, ys = torch.randn(5, 8, 4, generator=generator).double(), torch.randn(5, 8, generator=generator).double()
    torch.testing.assert_close(plain(xs, ys), ours(xs, ys), rtol=1e-10, atol=1e-12)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters()) == 51_717


def _our_name(name):
    names = {"positions": "position_embedding", "embedding.weight": "token_embedding.weight"}
    name = names.get(name, name).replace("mlp.0", "mlp.hidden").replace("mlp.2", "mlp.output")
    name = re.sub(r"^norm", "final_norm", name)
    return re.sub(r"(blocks\.\d\.)(qkv|output)", r"\1attention.\2", name)


def _as_theirs(weight, name):
    """Their rows of `qkv` are (3, H, c), ours (H, 3, c)."""
    return weight.unflatten(0, (4, 3, 16)).transpose(0, 1).flatten(0, 2) if "qkv" in name else weight


def test_the_loop_over_prefixes_is_dmmse():
    from benchmarks.peers import dmmse_by_prefix

    generator = torch.Generator().manual_seed(0)
    xs, tasks = (torch.randn(*size, 3, generator=generator).double() for size in ((6, 5), (7,)))
    ys = torch.randn(6, 5, generator=generator).double()
    torch.testing.assert_close(dmmse_by_prefix(xs, ys, tasks, 0.3), dmmse(xs, ys, tasks=tasks, noise_variance=0.3))


def test_a_ratio_counts_work_and_is_large_where_we_are_fast(monkeypatch):
    """On a clock of its own, which stands still but for the work."""
    from benchmarks import __main__ as bench
    from benchmarks.__main__ import measure, row
    from benchmarks.cases import Case

    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def wait():
        now[0] += 2e-3

    same = measure(Case("same", wait, wait, calls=2), "cpu", 0.1)
    twice = measure(Case("twice the work", wait, wait, work=2, calls=2), "cpu", 0.1)
    assert same.low <= same.ratio <= same.high
    assert same.ratio == pytest.approx(1)
    assert twice.ratio == pytest.approx(2)
    assert "twice the work" in row(twice)


def test_the_chart_has_a_bar_for_each_ratio():
    from benchmarks.__main__ import Ratio, plot_ratios

    ratios = [Ratio("fast", 2.0, 1.9, 2.1, 20.0, 10.0, "1"), Ratio("slow", 0.5, 0.4, 0.6, 10.0, 20.0, "")]
    (axes,) = plot_ratios(ratios, "here").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["slow", "fast"]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 2.0]


def test_without_devinterp_its_case_is_left_out_in_a_sentence(monkeypatch, capsys):
    from benchmarks import sampling
    from benchmarks.cases import sampling_cases

    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    assert sampling_cases("cpu") == []
    assert re.fullmatch(r"[^\n]*devinterp[^\n]*\.\[bench\][^\n]*\.\n", capsys.readouterr().out)


@pytest.mark.slow
def test_devinterp_and_we_make_as_many_moves(monkeypatch):
    """Counted by their losses and by ours; ours are the moves and two gradients for MALA's acceptance."""
    pytest.importorskip("devinterp", reason='needs devinterp 1.3.2: pip install -e ".[bench]"')
    from benchmarks.sampling import NUM_CHAINS, PlainTransformer, devinterp_chains, our_chains

    config, seen = preset("quickstart"), []
    forward = PlainTransformer.forward
    monkeypatch.setattr(PlainTransformer, "forward", lambda self, *batch: seen.append(1) or forward(self, *batch))
    devinterp_chains(config, "cpu", num_moves=3)()
    assert len(seen) == 3 * NUM_CHAINS
    traces = our_chains(config, "cpu", num_moves=3, compiled=False)()
    assert traces.burnin.shape[-1] + traces.losses.shape[-1] == 3
    assert traces.losses.shape[:2] == (1, NUM_CHAINS)
