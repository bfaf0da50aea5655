"""The number of modules in two typical computations does not grow unnoticed."""

from icl.rng import stream
from tools.count_modules import modules_of, walks


def test_a_call_enters_the_modules_whose_functions_run():
    assert modules_of(lambda: stream(0, "a")) == ["icl.rng"]
    assert modules_of(lambda: None) == []


def test_walks_pass_through_few_modules():
    """The aim for `llc` is 15 modules. At 300 lines per module, the code of this walk needs at least 24.

    Three of them, `config.task`, `tasks.laws` and `tasks.pools`, choose the world of the prompts.
    """
    modules = walks()
    assert len(modules["loss"]) <= 9
    assert len(modules["llc"]) <= 40
    assert modules["llc"][0] == "icl.sampling.run"
