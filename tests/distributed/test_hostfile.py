from collections.abc import Callable
from pathlib import Path

import pytest

from recipe.config.reader import ConfigError
from recipe.distributed.hostfile import count_slots, deepspeed_env_files, read_deepspeed_env, read_hostfile

HostfileOf = Callable[[str | bytes], Path]


@pytest.fixture
def hostfile(tmp_path: Path) -> HostfileOf:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "cluster"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


NO_ENTRY = ("not a host and its slots", 'use "host slots=4"')
NO_NAME = ("not a host name", "write letters, digits")
GOOD = [
    ("worker-1 slots=8", {"worker-1": 8}, 8),
    ("worker-1 slots=8\nworker-2 slots=4\n", {"worker-1": 8, "worker-2": 4}, 12),
    ("b slots=1\na slots=2\n", {"b": 1, "a": 2}, 3),
    ("# the cluster\n\n  worker-1   slots=8  \n\t\nworker-2\tslots=8", {"worker-1": 8, "worker-2": 8}, 16),
    ("worker-1 slots=4 # rack 2\nworker-2 slots=4#", {"worker-1": 4, "worker-2": 4}, 8),
    ("worker-1 slots=04\r\nworker-2 slots=2\r\n", {"worker-1": 4, "worker-2": 2}, 6),
    ("10.0.0.1 slots=1\nnode_2.cluster.local slots=1", {"10.0.0.1": 1, "node_2.cluster.local": 1}, 2),
    ("ada@worker-1 slots=2", {"ada@worker-1": 2}, 2),
    ("#worker-1 slots=8\nlocalhost slots=2", {"localhost": 2}, 2),
]


@pytest.mark.parametrize(("text", "hosts", "ranks"), GOOD)
def test_reads_hosts_in_order_as_deepspeed_does(
    hostfile: HostfileOf, text: str, hosts: dict[str, int], ranks: int
) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = hostfile(text)
    assert list(read_hostfile(path).items()) == list(hosts.items()) == list(fetch_hostfile(str(path)).items())
    assert count_slots(read_hostfile(path)) == ranks


@pytest.mark.parametrize(
    ("line", "problem", "remedy"),
    [
        ("w slots=0", "no slots", "write slots=1 or more"),
        ("w slots=1x", *NO_ENTRY),
        ("w slots=4 max_slots=8", *NO_ENTRY),
        ("w slots=-1", *NO_ENTRY),
        ("w slots=\u0664", *NO_ENTRY),
        ("w slots = 4", "not a host and its slots", 'without spaces around "="'),
        ("w slots=" + "9" * 5000, *NO_ENTRY),
        ("w", *NO_ENTRY),
        ("w:4", *NO_ENTRY),
        ("w SLOTS=4", *NO_ENTRY),
        ("-oProxyCommand=x slots=1", *NO_NAME),
        ("a@-oProxyCommand=x slots=1", *NO_NAME),
        ("-a@w slots=1", *NO_NAME),
        ("a@b@w slots=1", *NO_NAME),
        ("$(reboot) slots=1", *NO_NAME),
        ("w[1-4] slots=1", *NO_NAME),
        ("w1,w2 slots=1", *NO_NAME),
        ("exec:w slots=1", *NO_NAME),
        ("fe80::1 slots=1", "not a host name", "give an IPv6 address a name"),
        ("wörker slots=1", *NO_NAME),
        ("FIRST slots=2", "the host of line 2", "write one line per host, with all of its slots"),
        ("ada@first slots=2", "the host of line 2", "write one line per host"),
    ],
)
def test_refuses_a_line(hostfile: HostfileOf, line: str, problem: str, remedy: str) -> None:
    path = hostfile(f"# two racks\nfirst slots=4\n\n  {line}\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    message = str(caught.value)
    assert message.startswith(f'{path}: line 4 = "{line[:70]}')
    assert f": {problem}; " in message
    assert remedy in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "empty; fill it"),
        (b"# nothing yet\n\n", 'no hosts; write a line "host slots=4" for each'),
        (b"\xef\xbb\xbfw slots=1", "begins with a byte-order mark; save it as UTF-8 without one"),
        (b"w\xff slots=1", "not UTF-8 at byte 1; save it as UTF-8"),
    ],
)
def test_refuses_a_file(hostfile: HostfileOf, text: bytes, message: str) -> None:
    path = hostfile(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_refuses_a_missing_file_and_a_folder(hostfile: HostfileOf) -> None:
    folder = hostfile("w slots=1").parent
    with pytest.raises(ConfigError, match=r"clutser: no such file or directory; did you mean .*cluster\?"):
        read_hostfile(folder / "clutser")
    with pytest.raises(ConfigError, match=r"is a directory; .* holds cluster"):
        read_hostfile(folder)


def test_reads_variables(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("GLOO_SOCKET_IFNAME=eth0\n NCCL_DEBUG = INFO \nA=b=c\nWORDS=two words\nEMPTY=\n")
    variables, refusals = read_deepspeed_env([file])
    expected = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "INFO", "A": "b=c", "WORDS": "two words", "EMPTY": ""}
    assert variables == expected
    assert refusals == []


@pytest.mark.parametrize(
    "line",
    ["", "# A=1", "export A=1", "A", "=1", "A;reboot=1", 'A="1"', "A='1'", "A=$HOME", "A=`reboot`", "A=50%h", "A=\\n"],
)
def test_refuses_a_line_that_would_not_reach_the_ranks_unchanged(tmp_path: Path, line: str) -> None:
    file = tmp_path / "env"
    file.write_text(f"FIRST=1\n{line}\nLAST=1\n")
    variables, (refusal,) = read_deepspeed_env([file])
    assert variables == {"FIRST": "1", "LAST": "1"}
    assert f"{file}: line 2 = " in str(refusal)
    assert "not NAME=value as it reaches the ranks" in str(refusal)


def test_empty_and_unreadable_env_files(tmp_path: Path) -> None:
    empty, bad = tmp_path / "empty", tmp_path / "bad"
    empty.touch()
    bad.write_bytes(b"A=\xff\n")
    variables, refusals = read_deepspeed_env([empty, bad])
    assert variables == {}
    assert [refusal.file for refusal in refusals] == [str(bad)]


def test_finds_the_env_files_that_deepspeed_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, folder = tmp_path / "home", tmp_path / "project"
    for place in (home, folder):
        place.mkdir()
        (place / ".deepspeed_env").touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(folder)
    assert deepspeed_env_files() == [home / ".deepspeed_env", folder / ".deepspeed_env"]
    monkeypatch.setenv("DS_ENV_FILE", "another")
    assert deepspeed_env_files() == []
