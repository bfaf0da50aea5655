"""Compilation to one graph works in any thread. A function that cannot be compiled runs as it is, with a warning."""

import subprocess
import sys

import pytest

THREADS = """
import sys, torch
from icl.compute.calls import one_graph
from icl.compute.calls import RELEASE_GIL, in_parallel

torch.set_num_threads(2)
sys.setswitchinterval(1e-5)  # threads overlap wherever they can
double = in_parallel(one_graph(lambda x: 2 * torch.sin(x).sum(), work="Testing", options=RELEASE_GIL), threads_each=1)
for _ in range(20):
    assert len(set(map(float, double([(torch.ones(3000),)] * 1000)))) == 1
"""

BREAK = """
import torch
from icl.compute.calls import one_graph

def waits(x):
    return x * 2 if float(x.sum()) > 0 else x

print(one_graph(waits, work="Testing")(torch.ones(3)).tolist())
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_threads_may_call_one_graph_at_once():
    ran = run(THREADS)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_function_that_waits_for_its_own_numbers_is_no_graph_and_is_called_as_it_is():
    ran = run(BREAK)
    assert ran.stdout.strip() == "[2.0, 2.0, 2.0]"
    assert "Testing continues without torch.compile" in ran.stderr
