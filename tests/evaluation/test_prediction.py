"""Predictions for a user's own prompts: each query sees the whole context, and bad prompts are refused."""

import json

import numpy as np
import pytest
import torch
from tiny_runs import TINY

from icl import api
from icl.build import build_model
from icl.evaluation.prediction import PromptError, predict_from_prompt, read_prompt_file, write_predictions

MODEL = build_model(TINY)  # D = 2, K = 4


@pytest.mark.parametrize("num_context", [0, 1, 3])
def test_each_query_is_the_last_x_of_a_prompt_of_its_own(num_context):
    context, targets, queries = torch.randn(num_context, 2), torch.randn(num_context), torch.randn(5, 2)
    predictions = predict_from_prompt(MODEL, context, targets, queries)
    for query, prediction in zip(queries, predictions, strict=True):
        xs = torch.cat((context, query[None]))[None]
        ys = torch.cat((targets, torch.tensor([99.0])))[None]  # a target after the query changes nothing
        torch.testing.assert_close(MODEL(xs, ys)[0, -1], prediction)


def test_lists_and_arrays_will_do():
    expected = predict_from_prompt(MODEL, torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]), torch.tensor([[0.0, 1.0]]))
    lists = predict_from_prompt(MODEL, [[1, 2]], [0.5], [[0, 1]])
    arrays = predict_from_prompt(MODEL, np.array([[1.0, 2.0]]), np.array([0.5]), np.array([[0.0, 1.0]]))
    assert torch.equal(lists, expected)
    assert torch.equal(arrays, expected)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (([[1.0, 2.0, 3.0]], [0.0], [[0.0, 1.0]]), r"x_context.*\(rows, 2\)"),
        (([[1.0, 2.0]], [0.0], [[1.0]]), r"x_query.*\(rows, 2\)"),
        (([[1.0, 2.0]], [0.0, 1.0], [[0.0, 1.0]]), "one target per example"),
        (([[1.0, 2.0]] * 4, [0.0] * 4, [[0.0, 1.0]]), "at most 3 context examples"),
        (([[float("nan"), 2.0]], [0.0], [[0.0, 1.0]]), "NaN"),
        (([[1.0, 2.0]], [float("inf")], [[0.0, 1.0]]), "y_context"),
        (([[1.0, 2.0], [3.0]], [0.0, 1.0], [[0.0, 1.0]]), "rows of equal length"),
        (([["a", "b"]], [0.0], [[0.0, 1.0]]), "must be numbers"),
    ],
)
def test_bad_prompts_are_refused_in_one_sentence(prompt, said, as_users_run):
    with pytest.raises(PromptError, match=said) as refusal:
        predict_from_prompt(MODEL, *prompt)
    assert "\n" not in str(refusal.value)


def test_json_and_csv_say_the_same(tmp_path):
    content = {"x_context": [[1, 2], [3, 4]], "y_context": [0.5, -1], "x_query": [[5, 6]]}
    (tmp_path / "p.json").write_text(json.dumps(content))
    (tmp_path / "p.csv").write_text("x1,x2,y\n1,2,0.5\n5,6,\n3,4,-1\n")
    for ours, theirs in zip(read_prompt_file(tmp_path / "p.json"), read_prompt_file(tmp_path / "p.csv"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.json", "{", "must be JSON like"),
        ("p.json", '{"x_context": []}', "must be JSON like"),
        ("p.json", '{"x_context": [], "y_context": [], "x_query": []}', "no query"),
        ("p.csv", "a,b\n1,2\n", "header"),
        ("p.csv", "", "header"),
        ("p.csv", "x1,y\n1,2\n", "no query"),
        ("p.csv", "x1,y\noops,\n", "numbers"),
    ],
)
def test_malformed_files_are_refused_in_one_sentence(tmp_path, name, text, said, as_users_run):
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=said) as refusal:
        read_prompt_file(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PromptError, match=r"gone.json"):
        read_prompt_file(tmp_path / "gone.json")


def test_predictions_are_written_as_json_and_csv(tmp_path):
    (tmp_path / "p.csv").write_text("x1,x2,y\n1,2,0.5\n5,6,\n")
    prompt = read_prompt_file(tmp_path / "p.csv")
    predictions = predict_from_prompt(MODEL, *prompt)
    written = json.loads(write_predictions(tmp_path / "out.json", prompt, predictions).read_text())
    assert written["x_query"] == [[5.0, 6.0]]
    assert written["y_predicted"] == pytest.approx(predictions.tolist())
    lines = write_predictions(tmp_path / "out.csv", prompt, predictions).read_text().splitlines()
    assert lines[0] == "x1,x2,y_predicted"
    assert float(lines[1].split(",")[2]) == pytest.approx(predictions.item())


def test_the_api_offers_the_same_function():
    assert api.predict_from_prompt is predict_from_prompt
