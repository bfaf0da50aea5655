"""Two real processes (gloo) compared with one: the same global batches, and the same weights up to the order of sums."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, as_arguments, change

from icl.runs.checkpoints import list_steps, load_step
from icl.runs.folder import RunFolder
from icl.tasks.prompts import prompt_source
from icl.training.data import PromptStream
from icl.training.run import train
from icl.training.trainer import evaluation_sets

CONFIG = change(TINY, trainer={"max_steps": 30})


def test_the_ranks_batches_are_the_slices_of_the_whole():
    whole = next(iter(PromptStream([CONFIG], int)))
    parts = [next(iter(PromptStream([CONFIG], int, rank=rank, num_ranks=2))) for rank in range(2)]
    for one, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat((first, second), dim=1))


def test_the_stream_begins_at_the_trainers_step_and_is_the_prompts_of_each_step():
    stream = iter(PromptStream([CONFIG], lambda: 61))
    source = prompt_source(CONFIG, stream="train")
    for step in range(61, 70):  # across the end of a block
        for batch, expected in zip(next(stream), source.sample(range(step, step + 1), range(8)), strict=True):
            assert torch.equal(batch, expected)


def test_only_the_rank_that_evaluates_makes_prompts_for_it(monkeypatch):
    assert [len(sets) for sets in evaluation_sets([CONFIG, CONFIG])] == [2, 2]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert evaluation_sets([CONFIG, CONFIG]) == [[], []]


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(tmp_path, monkeypatch):
    alone = train(CONFIG, folder=tmp_path / "alone").folder
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    arguments = [*as_arguments(CONFIG), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "icl", "train", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Loss per position") == 1
    together = RunFolder(tmp_path / "tiny")
    assert list_steps(together.checkpoints) == list_steps(alone.checkpoints)
    for step in list_steps(alone.checkpoints):
        expected = load_step(alone.checkpoints, step).params
        for name, weight in load_step(together.checkpoints, step).params.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
    tables = [pd.read_csv(folder.metrics_file) for folder in (alone, together)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-6)
