from pathlib import Path

import pytest

from recipe.distributed.deepspeed_env import deepspeed_env_files, read_deepspeed_env


def test_reads_what_deepspeed_carries(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("GLOO_SOCKET_IFNAME=eth0\n NCCL_DEBUG = INFO \nA=b=c\nWORDS=two words\nEMPTY=\n")
    variables, refusals = read_deepspeed_env([file])
    expected = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "INFO", "A": "b=c", "WORDS": "two words", "EMPTY": ""}
    assert variables == expected
    assert refusals == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "blank; remove the line"),
        ("# interfaces", "a comment; remove the line"),
        ("# A=1", "a comment; remove the line"),
        ("export A=1", "not NAME=value; write it as in"),
        ("A", "not NAME=value; write it as in"),
        ("=1", "not NAME=value; write it as in"),
        ("A;reboot=1", "not NAME=value; write it as in"),
        ('A="1"', "the hosts' shells or pdsh would change this value; write it out"),
        ("A='1'", "the hosts' shells or pdsh would change this value; write it out"),
        ("A=$HOME", "the hosts' shells or pdsh would change this value; write it out"),
        ("A=$(reboot)", "the hosts' shells or pdsh would change this value; write it out"),
        ("A=`reboot`", "the hosts' shells or pdsh would change this value; write it out"),
        ("A=50%h", "the hosts' shells or pdsh would change this value; write it out"),
    ],
)
def test_names_the_line(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "env"
    file.write_text(f"FIRST=1\n{line}\nLAST=1\n")
    variables, refusals = read_deepspeed_env([file])
    assert variables == {"FIRST": "1", "LAST": "1"}
    (refusal,) = refusals
    assert f"{file}: line 2 = " in str(refusal)
    assert problem in str(refusal)


def test_an_empty_file_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    empty, bad = tmp_path / "empty", tmp_path / "bad"
    empty.touch()
    bad.write_bytes(b"A=\xff\n")
    variables, refusals = read_deepspeed_env([empty, bad])
    assert variables == {}
    assert [refusal.file for refusal in refusals] == [str(bad)]


def test_takes_the_files_that_deepspeed_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, folder = tmp_path / "home", tmp_path / "project"
    for place in (home, folder):
        place.mkdir()
        (place / ".deepspeed_env").touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(folder)
    assert deepspeed_env_files() == [home / ".deepspeed_env", folder / ".deepspeed_env"]
    monkeypatch.setenv("DS_ENV_FILE", "another")
    assert deepspeed_env_files() == []
