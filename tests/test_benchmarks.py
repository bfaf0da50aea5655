"""The benchmarks are fair: both programs compute the same numbers, and a ratio compares the same amount of work."""

import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, change

from icl.baselines import dmmse
from icl.build import build_architecture
from icl.presets import preset
from icl.runs.folder import RunError
from icl.runs.metrics_file import MetricsFile
from icl.training.data import PromptStream
from icl.training.module import PopulationAdam
from icl.whole_runs import RunEvaluator

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _import_from_the_checkout(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def test_the_plain_model_is_the_same_model():
    """With our weights, the plain model gives exactly our predictions."""
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
    """Reorder the rows of `qkv`: in the plain model they are (3, H, c), in ours (H, 3, c)."""
    return weight.unflatten(0, (4, 3, 16)).transpose(0, 1).flatten(0, 2) if "qkv" in name else weight


def test_the_loop_over_prefixes_is_dmmse():
    from benchmarks.peers import dmmse_by_prefix

    generator = torch.Generator().manual_seed(0)
    xs, tasks = (torch.randn(*size, 3, generator=generator).double() for size in ((6, 5), (7,)))
    ys = torch.randn(6, 5, generator=generator).double()
    torch.testing.assert_close(dmmse_by_prefix(xs, ys, tasks, 0.3), dmmse(xs, ys, tasks=tasks, noise_variance=0.3))


class Clock:
    """A clock that only moves when work is done."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def work(self, seconds):
        """Return a function that takes a given time on this clock, and counts its calls."""

        def act(*_):
            self.now += seconds
            act.times += 1

        act.times = 0
        return act


def test_a_ratio_counts_work_and_is_large_where_we_are_fast(monkeypatch):
    from benchmarks.__main__ import row
    from benchmarks.turns import Ratio, Side, take_turns

    clock = Clock(monkeypatch)
    peer, ours = Side(clock.work(2e-3), calls=2), Side(clock.work(2e-3), calls=5)
    same = Ratio.over(take_turns(peer, ours, "cpu", 0.1), name="same")
    twice = Ratio.over(take_turns(peer, ours, "cpu", 0.1, work=2), name="twice the work")
    assert same.low <= same.ratio <= same.high
    assert same.ratio == pytest.approx(1)
    assert twice.ratio == pytest.approx(2)
    assert (twice.peer_ms, twice.ours_ms) == pytest.approx((2, 1))
    assert "twice the work" in row(twice)


def test_a_step_takes_trainings_prompts_and_a_turn_whole_blocks_of_them(monkeypatch):
    """The population has so many members that its blocks of prompts are shorter than those of a single member."""
    from benchmarks import cases

    seen = []
    monkeypatch.setattr(cases, "make_step", lambda *_, **__: lambda state, *prompts: seen.append(prompts))
    step = cases.training_step(4, "cpu")
    stream = PromptStream([cases.CONFIG] * 4, lambda: 0)
    assert step.calls == stream.block > 1
    for _ in range(step.calls + 1):
        step.call()
    for (xs, ys, _), expected in zip(seen, stream, strict=False):
        assert torch.equal(xs, expected.xs)
        assert torch.equal(ys, expected.ys)


def test_a_step_alone_is_split_into_parts_as_in_training(monkeypatch):
    from benchmarks import cases

    given = {}
    monkeypatch.setattr(cases, "make_step", lambda *_, **settings: given.update(settings))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cases.training_step(1, "cpu", compiled=True)
    assert given == {"compiled": True, "packed": False, "num_parts": 2}


def test_the_evaluation_of_a_whole_run_is_measured(monkeypatch):
    from benchmarks import cases

    monkeypatch.setattr(cases, "CONFIG", TINY)
    monkeypatch.setattr(cases, "NUM_CHECKPOINTS", 3)
    monkeypatch.setattr(cases, "RunEvaluator", lambda **options: RunEvaluator(**options | {"compiled": False}))
    turns = cases.take_evaluation_turns("cpu", 0.1)
    assert all(turn.peer > 0 and turn.ours > 0 for turn in turns)


# The application, whose stretches here end at the rows of its log (10 steps) and have four steps at most

APPLICATION = change(TINY, trainer={"max_steps": 10**6}, checkpoints={"every": None, "num_log": 0})


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Let temporary folders be made below the folder of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def slow_steps(monkeypatch, act):
    """Let every training step also call `act`."""
    step = PopulationAdam.step
    monkeypatch.setattr(
        PopulationAdam, "step", lambda self, closure=None, *, prompts: act() or step(self, prompts=prompts)
    )


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_the_application_is_measured_against_as_many_bare_steps(seconds, monkeypatch, folder):
    """A bare step takes 2 ms and a training step 1 ms. A row of the log takes 2 ms at every tenth step. So the ratio is 2 / 1.2."""
    from benchmarks.application import measure_application

    clock = Clock(monkeypatch)
    bare, step, row = clock.work(2e-3), clock.work(1e-3), clock.work(2e-3)
    slow_steps(monkeypatch, step)
    write = MetricsFile.append
    monkeypatch.setattr(MetricsFile, "append", lambda self, values: row() or write(self, values))
    turns = measure_application(APPLICATION, "cpu", bare, seconds)
    assert bare.times == step.times == 10 * (1 + len(turns))  # the first turn warms up
    assert len(turns) == max(5, math.ceil(seconds / 32e-3))
    for turn in turns:
        assert turn.peer == pytest.approx(2e-3)
        assert turn.ours == pytest.approx(1.2e-3)
    assert list(folder.iterdir()) == []


def test_on_a_gpu_a_turn_has_an_evaluation_too():
    from benchmarks.application import turn_length

    assert turn_length(APPLICATION, "cpu") == 10
    assert turn_length(APPLICATION, "cuda") == 20
    assert turn_length(change(APPLICATION, evaluation={"every": None}), "cuda") == 10


def test_an_application_that_dies_says_why(monkeypatch, folder):
    from benchmarks.application import measure_application

    def fail():
        raise OSError("no more of this")

    with pytest.raises(RunError, match="ended at step 20, before"):
        measure_application(change(APPLICATION, trainer={"max_steps": 20}), "cpu", int, 0.0)
    with pytest.raises(RunError, match=r"ended at step 10, before.*NaN or infinite at step"):
        measure_application(change(APPLICATION, optim={"lr": 1e30, "grad_clip": None}), "cpu", int, 0.0)
    slow_steps(monkeypatch, fail)
    with pytest.raises(OSError, match="no more of this"):
        measure_application(APPLICATION, "cpu", int, 0.0)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_bare_step_goes_on_inside_the_application():
    """Both use the real step and a real clock, so neither time is many times the other."""
    from benchmarks import cases
    from benchmarks.application import measure_application
    from benchmarks.turns import Ratio

    config = change(cases.CONFIG, trainer={"compile": "false", "log_every": 10})
    step = cases.training_step(1, "cpu")
    ratio = Ratio.over(measure_application(config, "cpu", step.call, 0.0), name="application")
    assert 0.2 < ratio.ratio < 5


# What is written


def test_an_interrupted_measurement_keeps_what_it_has(monkeypatch, tmp_path):
    from benchmarks import __main__ as bench
    from benchmarks.cases import Case
    from benchmarks.turns import Turn

    def cases(device):
        yield Case("first", lambda seconds: [Turn(2 * seconds, seconds)] * 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "make_cases", cases)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--seconds", "3", "--out", str(tmp_path / "new")])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    content = json.loads((tmp_path / "new/cpu.json").read_text())
    assert [(ratio["name"], ratio["ratio"], ratio["ours_ms"]) for ratio in content["ratios"]] == [("first", 2, 3000)]
    assert content["command"] == "python -m benchmarks --seconds 3"


def test_the_chart_has_a_bar_for_each_ratio():
    from benchmarks.__main__ import plot_ratios
    from benchmarks.turns import Ratio

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
    """The moves of devinterp are counted by its losses, and ours by the recorded losses."""
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


def test_gradients_for_an_error_are_variance_over_what_the_bias_leaves():
    from benchmarks.gradients import Efficiency

    assert Efficiency(bias=0.3, variance=32.0).gradients(0.5) == pytest.approx(200.0)
    assert Efficiency(bias=0.5, variance=1.0).gradients(0.5) == math.inf


def test_the_plain_model_of_a_checkpoint_predicts_what_our_model_predicts():
    from benchmarks.equal_error import plain_model
    from icl.build import build_checkpoint_model
    from icl.runs.checkpoints import load_checkpoint_file
    from icl.tasks.prompts import sample_prompts

    checkpoint = load_checkpoint_file(ROOT / "data/small/models/quickstart/step-000005000.safetensors")
    prompts = sample_prompts(checkpoint.config, stream="llc", step=0, batch_size=16)
    with torch.no_grad():
        ours = build_checkpoint_model(checkpoint)(prompts.xs, prompts.ys)
        torch.testing.assert_close(plain_model(checkpoint)(prompts.xs, prompts.ys), ours, rtol=1e-4, atol=1e-4)


def test_work_at_equal_error():
    """An estimate with bias 0.3 and variance 0.32 needs four times its draws for the error sqrt(0.3^2 + 0.32 / 4)."""
    from benchmarks.equal_error import Accuracy, Estimate, as_table

    accuracy = Accuracy(bias=0.3, bias_stderr=0.0, deviation=0.32**0.5, gradients=100, seconds=2.0)
    assert accuracy.share((0.3**2 + 0.32 / 4) ** 0.5) == pytest.approx(4.0)
    assert accuracy.share(0.3) == math.inf
    over = Accuracy.over([Estimate(1.0, 10, 0.5), Estimate(3.0, 30, 1.5)], reference=1.5)
    assert over == pytest.approx((0.5, 1.0, 2**0.5, 20.0, 1.0))
    assert over.rmse == pytest.approx(2**0.5)  # the bias is within its standard error
    table = as_table({"first": over, "second": over})
    assert table.gradients_at_equal_rmse.tolist() == [20.0, 20.0]


def test_the_comparison_at_equal_error_refuses_a_missing_file_in_one_sentence(tmp_path, capsys):
    from benchmarks.equal_error import main

    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "missing.safetensors"), "--reference", "1"])
    assert "There is no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_baoab_needs_an_eighth_of_the_gradients_on_a_stiff_quadratic():
    from benchmarks.gradients import ERROR, NAMES, on_problem
    from icl.sampling.self_test import problems

    problem = next(problem for problem in problems() if problem.name == NAMES[0])
    truth = problem.finite(problem.nbetas[0], 0.0)
    sgld, baoab = on_problem(problem, "sgld", 0.25), on_problem(problem, "baoab", 4)
    assert baoab.gradients(ERROR * truth) < sgld.gradients(ERROR * truth) / 8
