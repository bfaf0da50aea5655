"""Adam's moments beside the checkpoints: their content, resuming and copying; nothing else in the run changes."""

import pytest
import torch
from tiny_runs import TINY, change

from icl.build import build_model
from icl.cli import main
from icl.model.flat import make_layout
from icl.runs.checkpoints import list_steps, load_step
from icl.runs.folder import RunFolder, local_root
from icl.tasks.prompts import sample_prompts
from icl.training import saving
from icl.training.run import train, train_population

SHORT = change(TINY, trainer={"max_steps": 20}, checkpoints={"every": 5, "num_log": 2})
KEPT = change(SHORT, checkpoints={"moments": True})


def moments(folder: RunFolder, step: int) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for key, tensor in load_step(folder.moments, step).params.items():
        kind, _, name = key.partition("/")
        found[kind][name] = tensor
    return found


def test_moments_are_saved_with_every_checkpoint_and_change_nothing():
    plain, kept = train(SHORT).folder, train(KEPT, folder=local_root() / "kept").folder
    assert not plain.moments.root.exists()
    assert list_steps(kept.moments) == list_steps(kept.checkpoints) == list_steps(plain.checkpoints)
    for step in list_steps(plain.checkpoints):
        assert load_step(kept.checkpoints, step).digest == load_step(plain.checkpoints, step).digest
        assert load_step(kept.moments, step).config == KEPT


def test_moments_are_adams():
    """There are none before the first step. After it, they are (1 - beta) times the clipped gradient and its square.

    At the end, they are those in last.ckpt.
    """
    folder, model = train(KEPT).folder, build_model(KEPT).double()
    assert all((tensor == 0).all() for kind in moments(folder, 0).values() for tensor in kind.values())
    xs, ys, _ = sample_prompts(KEPT, stream="train", step=0, batch_size=KEPT.trainer.batch_size)
    (model(xs.double(), ys.double()) - ys).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), KEPT.optim.grad_clip)
    first = moments(folder, 1)
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(first["exp_avg"][name].double(), 0.1 * grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(first["exp_avg_sq"][name].double(), 0.001 * grad**2, rtol=1e-4, atol=1e-9)
    layout = make_layout(dict(model.named_parameters()))
    saved = torch.load(folder.resume_file, weights_only=True)["state_dict"]
    for kind, own in moments(folder, 20).items():
        for name, tensor in layout.to_params(saved[kind]).items():
            assert torch.equal(own[name], tensor[0])


def test_members_of_a_population_save_their_own():
    configs = [change(KEPT, seeds={"model": seed}) for seed in (0, 1)]
    places = [str(local_root() / name) for name in "ab"]
    together = train_population(configs, folders=places)
    for result, config, place in zip(together, configs, "cd", strict=True):
        alone = train(config, folder=local_root() / place).folder
        for step in (0, 1, 20):
            assert load_step(result.folder.moments, step).digest == load_step(alone.moments, step).digest


def test_a_resumed_run_saves_what_one_never_interrupted_does(monkeypatch):
    whole, broken = train(KEPT, folder=local_root() / "whole").folder, RunFolder(local_root() / "broken")
    save = saving.save_checkpoint

    def stop_at_ten(store, step, config, params):
        save(store, step, config, params)
        if step == 10 and store.root.name == "moments":  # the weights of that step are never written
            raise KeyboardInterrupt

    config = change(KEPT, checkpoints={"resume_seconds": 0.0})
    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_checkpoint", stop_at_ten)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(config, folder=broken.path)
    assert max(list_steps(broken.checkpoints)) == 5
    train(config, folder=broken.path)
    assert list_steps(broken.moments) == list_steps(whole.moments)
    for step in list_steps(whole.moments):
        assert load_step(broken.moments, step).digest == load_step(whole.moments, step).digest


def test_a_copy_has_the_moments_and_no_more_of_the_best_than_the_run(tmp_path, capsys):
    config = change(
        KEPT,
        trainer={"max_steps": 60},
        evaluation={"every": 7},
        early_stopping={"patience": 50},
        checkpoints={"every": None, "store": str(tmp_path / "store")},
    )
    run = train(config).folder
    assert list_steps(run.moments) == list_steps(run.checkpoints)
    copy = RunFolder(tmp_path / "store" / "tiny")
    assert list_steps(copy.moments) == list_steps(run.moments)
    assert main(["checkpoints", str(run.path), "verify"]) == 0
    file = run.moments.root / "step-000000060.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    capsys.readouterr()
    assert main(["checkpoints", str(run.path), "verify"]) == 1
    told = capsys.readouterr().out
    assert "moments/step-000000060.safetensors is damaged" in told
    assert "its header describes" in told
