"""Training and early stopping see the monitored prompts. All tables and reports after training have prompts of their own."""

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl import whole_runs
from icl.build import build_checkpoint_model, build_evaluation_sets
from icl.evaluation.sets import MONITOR, REPORT
from icl.plotting.training import draw_run
from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file
from icl.runs.folder import RunFolder
from icl.training.run import train
from icl.whole_runs import evaluate_run

STOPPING = change(
    TINY,
    trainer={"max_steps": 20, "log_every": 10},
    evaluation={"every": 10, "num_prompts": 64},
    early_stopping={"patience": 5},
    checkpoints={"every": 10, "num_log": 0},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEVICE", "cpu")
        patch.setenv("WANDB_MODE", "disabled")
        patch.delenv("AWS_BUCKET_NAME", raising=False)
        folder = RunFolder(tmp_path_factory.mktemp("runs") / "stopping")
        assert train(STOPPING, folder=folder.path).status.state == "finished"
    return folder


def losses(folder, step):
    """Return the mean losses of the last checkpoint on the prompts of a step, computed without `icl.evaluation`."""
    model = build_checkpoint_model(load_checkpoint_file(checkpoint_files(folder.path)[-1]))
    sets = build_evaluation_sets(STOPPING, num_prompts=64, step=step)
    with torch.no_grad():
        return {each.name: (model(*each.prompts[:2]) - each.prompts.ys).square().mean().item() for each in sets}


def test_no_report_uses_the_prompts_on_which_early_stopping_chose(run):
    monitored, reported = losses(run, MONITOR), losses(run, REPORT)
    last = pd.read_csv(run.metrics_file).iloc[-1]
    table = draw_run(run)
    written = pd.read_csv(run.results / "losses.csv").query("position == 'mean'").set_index("distribution")
    numbers, baselines = evaluate_run(run.path, shifts=[])
    final = numbers.query("step == 20 and quantity == 'loss' and position == 'mean'").set_index("distribution")["value"]
    for name in ("pretrain", "true"):
        assert last[f"eval/{name}/loss"] == pytest.approx(monitored[name], rel=1e-4)
        assert written.loc[name, "model"] == pytest.approx(reported[name], rel=1e-4)
        assert final[name] == pytest.approx(reported[name], rel=1e-4)
        assert abs(monitored[name] - reported[name]) > 1e-3 * reported[name]
    assert table.optimum == "dmmse"
    assert table.losses.loc["mean", "bayes_excess"] == pytest.approx(
        table.losses.loc["mean", "model"] - table.losses.loc["mean", "dmmse"], abs=1e-5
    )
    assert set(numbers["prompts"]) == set(baselines["prompts"]) == {"report"}


def test_results_of_an_older_version_are_measured_again(run, monkeypatch):
    counts = []
    true = whole_runs.evaluate
    monkeypatch.setattr(whole_runs, "evaluate", lambda *inputs, **options: counts.append(1) or true(*inputs, **options))
    for version in (1, 1, 2, 2):
        monkeypatch.setattr(whole_runs, "VERSION", version)
        evaluate_run(run.path, num_prompts=8, shifts=[])
    assert len(counts) == 2
