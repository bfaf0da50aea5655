"""The number of members that fit in memory: the estimate counts what autograd keeps, and larger populations are trained in groups."""

import pytest
import torch
from tiny_runs import TINY, change

from icl.build import build_model
from icl.compute import devices
from icl.compute.devices import device_bytes
from icl.model import attention as tiny_attention
from icl.model.stacked import stack
from icl.presets import preset
from icl.runs.folder import local_root
from icl.training import capacity, run
from icl.training.capacity import activation_bytes, num_fitting
from icl.training.run import train, train_population


def kept(config):
    return activation_bytes(config, stack([dict(build_model(config).named_parameters())]))


def test_activations_grow_with_layers_and_tokens():
    base = preset("L2H4")
    assert kept(change(base, model={"num_layers": 4})) > 1.8 * kept(base)
    assert 1.9 < kept(change(base, task={"max_examples": 16})) / kept(base) < 3  # attention's patterns grow faster


def test_activations_hold_at_least_the_inputs_of_every_matrix_product():
    """Each block of L2H4 keeps, per token in float32: norm, query-key-value input, heads' output, MLP input and hidden layer."""
    model, tokens = preset("L2H4").model, 2 * preset("L2H4").task.max_examples
    floor = 4 * tokens * model.num_layers * (3 * model.embed_size + model.mlp_size) / 2
    assert kept(preset("L2H4")) > floor


def test_a_member_of_several_keeps_more_than_one_alone_and_elsewhere_than_on_a_cpu_that_is_counted(monkeypatch):
    """A single member uses fused operations."""
    config = preset("L2H4")
    monkeypatch.setattr(tiny_attention, "HAS_KERNEL", False)
    member = dict(build_model(config).named_parameters())
    alone, together, four = (activation_bytes(config, stack([member] * num)) for num in (1, 2, 4))
    assert 1.1 < together / alone < 1.4
    assert four == pytest.approx(together, rel=0.01)
    monkeypatch.setattr(capacity, "device_bytes", lambda device: 2**34)
    rows = 7 * sum(tensor.nbytes for tensor in member.values())
    assert num_fitting([config], "meta") == int(0.85 * 2**34 // (rows + 256 * together))


@pytest.mark.parametrize("max_examples", [8, 64])
def test_what_fits_a_gpu_does_not_depend_on_the_kernel_of_this_machines_cpu(monkeypatch, max_examples):
    """The formula counts scores and patterns. For 128 tokens, these are half of everything that a kernel keeps."""
    config = change(preset("L2H4"), task={"max_examples": max_examples})
    monkeypatch.setattr(capacity, "device_bytes", lambda device: 2**34)
    found = []
    for has_kernel in (tiny_attention.HAS_KERNEL, False):
        monkeypatch.setattr(tiny_attention, "HAS_KERNEL", has_kernel)
        found.append(num_fitting([config], "meta"))
    by_formula = activation_bytes(config, stack([dict(build_model(config).named_parameters())] * 2))
    rows = 7 * sum(tensor.nbytes for tensor in build_model(config).parameters())
    assert found == [int(0.85 * 2**34 // (rows + config.trainer.batch_size * by_formula))] * 2


def test_twice_the_memory_holds_twice_the_members(monkeypatch):
    monkeypatch.setattr(capacity, "device_bytes", lambda device: 2**30)
    once = num_fitting([preset("L2H4")], "meta")
    monkeypatch.setattr(capacity, "device_bytes", lambda device: 2**31)
    assert abs(num_fitting([preset("L2H4")], "meta") - 2 * once) <= 1
    monkeypatch.setattr(capacity, "device_bytes", lambda device: 1)
    assert num_fitting([preset("L2H4")], "meta") == num_fitting([preset("L2H4")], "cpu") == 1


@pytest.mark.parametrize(("name", "shared", "own"), [("L2H4", 1.3, 3.9), ("quickstart", 4.1, 5.8)])
def test_members_on_a_cpu_need_about_what_was_measured(monkeypatch, name, shared, own):
    """Measured growth of the process in MiB per member, for 16 to 96 members of L2H4 and 32 to 160 of quickstart, with one M or many."""
    monkeypatch.setattr(capacity, "device_bytes", lambda device: 2**34)
    config = preset(name)
    seeds = [change(config, seeds={"model": index}) for index in range(8)]
    ladder = [change(config, task={"num_tasks": 2 + index}) for index in range(8)]
    for configs, measured in ((seeds, shared), (ladder, own)):
        estimate = 0.85 * 2**34 / num_fitting(configs, "cpu") / 2**20
        assert measured / 1.5 < estimate < 3 * measured


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cached", "line"),
    [
        ("own", "memory.max", "memory.current", "inactive_file", "0::/own"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "4:memory:/elsewhere"),
    ],
    ids=["second version", "first version, as a container sees it"],
)
def test_the_limit_of_a_control_group_counts(monkeypatch, tmp_path, folder, limit, used, cached, line):
    """The memory left is what the group has not used, without cached files, and never more than what the machine has left."""
    group = tmp_path / folder
    group.mkdir()
    monkeypatch.setattr(devices, "_CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "_PROCESS_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(devices, "_MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    (tmp_path / "cgroup").write_text(f"3:cpu:/x\n{line}\n")
    assert device_bytes("cpu") == 8000 * 1024
    (group / limit).write_text("3000000\n")
    (group / used).write_text("2000000\n")
    (group / "memory.stat").write_text(f"anon 5\n{cached} 500000\n")
    assert device_bytes("cpu") == 1_500_000
    (group / limit).write_text("max\n")
    assert device_bytes("cpu") == 8000 * 1024
    (tmp_path / "meminfo").unlink()
    assert device_bytes("cpu") > 2**27


def test_memory_of_a_gpu_that_is_in_use_is_not_available(monkeypatch):
    """Another process uses 5 of 8 GiB. Of the 2 GiB that PyTorch has reserved for this process, tensors use 1 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**31)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    assert device_bytes("cuda") == 2**31


def test_how_many_fit_is_told_only_where_it_matters(monkeypatch, capsys):
    monkeypatch.setattr(run, "_train_stages", lambda members, steps: None)
    configs = [change(TINY, seeds={"model": seed}) for seed in range(2)]
    for limit, told in ((20, ""), (19, "About 19 members of this size fit on this device at a time.")):
        monkeypatch.setattr(run, "num_fitting", lambda configs, device, limit=limit: limit)
        train_population(configs, folders=[local_root() / f"{limit}-{seed}" for seed in range(2)])
        printed = capsys.readouterr().out
        assert "members of this size fit" not in printed if told == "" else told in printed


@pytest.mark.slow
def test_a_population_that_does_not_fit_is_trained_in_groups_with_the_same_results(monkeypatch, capsys):
    config = change(TINY, trainer={"max_steps": 10})
    configs = [change(config, seeds={"model": seed}) for seed in range(3)]
    monkeypatch.setattr(run, "num_fitting", lambda configs, device: 2)
    results = train_population(configs, folders=[local_root() / f"grouped{seed}" for seed in range(3)])
    assert (
        "About 2 members of this size fit on this device at a time, so they are trained in 2 groups."
        in capsys.readouterr().out
    )
    for seed, result in enumerate(results):
        alone = train(configs[seed], folder=local_root() / f"alone{seed}")
        assert result.status.state == "finished"
        assert result.folder.metrics_file.read_text() == alone.folder.metrics_file.read_text()


@pytest.mark.gpu
def test_the_estimate_bounds_what_a_gpu_needs():
    from icl.compute.step import adam_state, make_step
    from icl.model.flat import layout_of
    from icl.tasks.prompts import sample_prompts

    config, num = preset("L2H4"), 8
    params = stack([{name: p.cuda() for name, p in build_model(config).named_parameters()} for _ in range(num)])
    state, step = adam_state(params), make_step(config.model, config.optim, layout_of(params))
    prompts = sample_prompts(config, stream="train", step=0, batch_size=num * 256, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    step(state, prompts.xs.unflatten(0, (num, -1)), prompts.ys.unflatten(0, (num, -1)), torch.ones(num, device="cuda"))
    used = torch.cuda.max_memory_allocated() / num
    estimate = kept(config) * 256 + 7 * sum(tensor.nbytes for tensor in params.values()) / num
    assert 0.5 < estimate / used < 2
