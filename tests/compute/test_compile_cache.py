"""The compiler's cache folder: it belongs to the user, is refused if others can write in it, and is used only if its digests match."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from icl.compute import compile_cache
from icl.compute.compile_cache import UnusableError, cache_folder, damaged, require_private, take


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Let this process use a folder of the test, with two files whose digests are recorded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    folder = cache_folder()
    held = take(folder)
    monkeypatch.setattr(compile_cache, "_folder", folder)
    monkeypatch.setattr(compile_cache, "_held", held)
    for name in ("ab/cab.so", "fxgraph/x/entry"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"whole")
    compile_cache.note_compiled()
    held.close()
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {
        ".lock",
        ".noting",
        "digests.json",
    }


# Where it is


def test_it_lies_in_the_users_cache_and_is_his_alone(folder, tmp_path, monkeypatch):
    assert folder.parent == tmp_path / "cache" / "icl"
    for place in (folder, folder.parent, tmp_path / "cache"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "icl" / folder.name


def test_a_folder_that_the_user_names_holds_it_and_torchs_own_choice_does_not(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine" / folder.name
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine" / folder.name))  # as a child process finds it
    assert cache_folder() == tmp_path / "mine" / folder.name
    monkeypatch.setattr(compile_cache, "_torch_default", lambda: tmp_path / "torchinductor_me")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torchinductor_me"))
    assert cache_folder() == folder


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o720, 0o1777])
def test_a_folder_that_others_may_write_in_is_refused(folder, mode):
    for place in (folder, folder.parent):
        if place == folder or (mode & 0o002 and not mode & 0o1000):
            place.chmod(mode)
            with pytest.raises(UnusableError, match="other users may write in"):
                take(folder)
            place.chmod(0o700)
    take(folder).close()


def test_a_folder_of_another_user_is_refused(folder, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UnusableError, match="belongs to another user"):
        require_private(folder)


def test_a_pipe_in_the_place_of_the_lock_is_an_error_and_no_waiting(folder):
    take(folder).close()
    (folder / ".lock").unlink()
    os.mkfifo(folder / ".lock")
    with pytest.raises(OSError, match="No such device"):
        take(folder)


def test_a_link_counts_as_what_it_leads_to(folder, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to("open")
    with pytest.raises(UnusableError, match="/open"):
        require_private(tmp_path / "link")
    (tmp_path / "good").symlink_to(folder)
    require_private(tmp_path / "good")


def test_where_there_is_no_such_folder_a_temporary_one_serves_and_a_sentence_says_so(folder, monkeypatch, capsys):
    folder.chmod(0o777)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(compile_cache, "_folder", None)
    monkeypatch.setattr(compile_cache, "_held", None)
    monkeypatch.setattr(compile_cache, "_make_torch_use", lambda folder: None)
    place = compile_cache.use_private_cache()
    assert compile_cache.use_private_cache() == place
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    said = capsys.readouterr().err
    assert (
        f"are not kept for the next start, because the cache {folder} cannot be used: other users may write in {folder}"
        in said
    )
    assert said.count("\n") == 1
    assert not compile_cache.start_afresh()


@pytest.mark.parametrize("base", [None, "relative"])
def test_without_a_home_folder_there_is_none(monkeypatch, base):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "~")  # what `expanduser` leaves where nobody knows the home folder
    monkeypatch.setenv("XDG_CACHE_HOME", base or "")
    with pytest.raises(UnusableError, match="there is no home folder"):
        take(cache_folder())


# What is in it


@pytest.mark.parametrize("harm", [b"", b"whol", b"wholE", b"whole\0"])
def test_what_is_damaged_or_was_never_noted_is_removed_before_it_is_used(folder, harm):
    (folder / "ab/cab.so").write_bytes(harm)
    (folder / "ab/unfinished.so").write_bytes(b"half")
    take(folder).close()
    assert names(folder) == {"fxgraph/x/entry"}


@pytest.mark.parametrize("harm", [None, b"", b"[]", b"{", b'{"ab/cab.so": 3}', b"\xff", b"[" * 100_000])
def test_without_digests_nothing_is_trusted(folder, harm):
    digests = folder / "digests.json"
    digests.unlink() if harm is None else digests.write_bytes(harm)
    take(folder).close()
    assert names(folder) == set()


def test_what_another_process_is_making_stays_and_what_it_uses_is_not_removed(folder):
    with take(folder):
        (folder / "ab/unfinished.so").write_bytes(b"half")
        take(folder).close()
        assert "ab/unfinished.so" in names(folder)
        (folder / "ab/cab.so").write_bytes(b"harm")
        assert damaged(folder) == ["ab/cab.so"]
        with pytest.raises(UnusableError, match="another process is using it"):
            take(folder)
        assert "ab/cab.so" in names(folder)


# The compiler itself


PROGRAM = """
import os, sys, torch
from pathlib import Path
from icl.compute.calls import one_graph
torch.set_num_threads(1)
function = lambda x: (torch.sin(x) * x).exp().sum() / 7
x = torch.linspace(-1, 1, 1001)
print(one_graph(function, work="Testing")(x).item().hex())
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_damaged_files_are_compiled_again_to_the_same_bits_and_nothing_lies_where_a_stranger_could_put_it(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "TRITON"))}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path)}
    (tmp_path / "tmp").mkdir()

    def start() -> tuple[str, str]:
        ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr == ""
        number, hits = ran.stdout.split()
        return number, hits

    number, hits = start()
    assert hits == "0"
    assert start() == (number, "1")
    for harm in (lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\0" * len(data)):
        for file in (tmp_path / "cache").rglob("*"):
            if file.is_file() and file.suffix != ".lock" and file.name not in (".lock", "digests.json"):
                file.write_bytes(harm(file.read_bytes()))
        assert start() == (number, "0")
    assert not [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
