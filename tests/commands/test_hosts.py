"""``python -m recipe hosts``: how it judges the hosts' answers, and that no host name reaches a shell."""

import copy
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from recipe.commands.hosts import compare, format_problems, format_table, main, probe
from recipe.commands.hosts.visit import NO_FOLDER, NO_INTERPRETER, Host, explain, remote_command
from tests.launch import DIGITS, ROOT

VERSIONS = {"python": "3.11.7", "torch": "2.15.0", "deepspeed": "0.19.8", "timm": "1.0.31", "torchvision": "0.29.1"}
FACTS: dict[str, Any] = {
    "clock": 0.1,
    "checkout": {
        "versions": VERSIONS,
        "code_sha256": "c0de",
        "commit": "8f7e6184",
        "config_sha256": "c0f1",
    },
    "network": {"machine": "boot 1", "address": "10.0.0.1"},
    "unseen": None,
    "unreached": [],
    "devices": {"gpus": ["H100", "H100"], "knows_precision": True},
    "data": {"classes": 10, "train_images": 5000, "validation_images": 100},
    "exchange": {"slowest_round_trip": "0.21 ms to node-1", "lowest_bandwidth": "10 Gbit/s to node-1"},
}


def good_hosts(count: int = 3) -> list[Host]:
    """Hosts without problems, each with two GPUs and two slots."""
    hosts = [Host(f"node-{number}", 2, copy.deepcopy(FACTS)) for number in range(count)]
    for number, host in enumerate(hosts):
        host.facts["network"] = {"machine": f"boot {number}", "address": f"10.0.0.{number + 1}"}
    return hosts


EXPECTED = {"classes": 10, "train_images": 5000, "validation_images": 100}


@pytest.mark.parametrize(
    ("count", "question", "fact"),
    [
        (3, "unseen", None),  # nothing wrong
        (3, "clock", 5.0),  # 4.9 s apart
        (1, "network", {"machine": "boot 1", "address": "127.0.0.1"}),  # one host may be at any address
    ],
)
def test_good_hosts_have_no_problems(count: int, question: str, fact: Any) -> None:
    hosts = good_hosts(count)
    hosts[-1].facts[question] = fact
    compare(hosts, EXPECTED, "fp16")
    assert format_problems(hosts) == []


@pytest.mark.parametrize(
    ("question", "change", "problem"),
    [
        ("clock", 6.2, "its clock is 6.1 s ahead of node-0's; synchronise both by NTP"),
        ("clock", -5.0, "its clock is 5.1 s behind node-0's; synchronise both by NTP"),
        ("devices", {"gpus": ["H100"]}, "1 GPU for 2 slots; write slots=1, or find out why torch does not see more"),
        ("devices", {"gpus": []}, "it would train on CPU, node-0 on 2 × H100; check GPUs and drivers"),
        ("devices", {"knows_precision": False}, 'its 2 × H100 does not support fp16; use "fp16": {"enabled": false}'),
        ("checkout", {"code_sha256": "0ther"}, "code 8f7e6184 0ther, node-0 has 8f7e6184 c0de; make the checkouts"),
        ("checkout", {"commit": "aaaaaaaa"}, "code aaaaaaaa c0de, node-0 has 8f7e6184 c0de; make the checkouts"),
        ("checkout", {"config_sha256": "0ther"}, "config 0ther, node-0 has c0f1; copy the same file to all hosts"),
        ("checkout", {"versions": {"timm": "missing"}}, "timm missing, node-0 has 1.0.31; install the same"),
        ("network", {"address": "127.0.1.1"}, "its own name resolves to 127.0.1.1, which other hosts cannot reach"),
        ("network", {"address": "::1"}, "its own name resolves to ::1, which other hosts cannot reach"),
        ("unreached", ["node-2"], "it cannot reach node-2; open all ports between the hosts"),
        ("network", {"machine": "boot 0"}, "the same machine as node-0; write one line for it, with all of its slots"),
        (
            "data",
            {"train_images": 4999},
            "data 10 classes, 4,999 + 100 images, node-0 has 10 classes, 5,000 + 100 images; copy what",
        ),
        ("data", {"classes": 9}, "the data has 9 classes, the config says 10; correct one of them"),
        ("unseen", "node-0", "it does not share the output folder with node-0"),
    ],
)
def test_problem_is_reported_for_its_host_alone(question: str, change: Any, problem: str) -> None:
    hosts = good_hosts()
    facts = hosts[1].facts
    if isinstance(change, dict):
        versions = facts[question].get("versions", {}) | change.get("versions", {})
        facts[question] |= change | ({"versions": versions} if versions else {})
    else:
        facts[question] = change
    compare(hosts, EXPECTED, "fp16")
    lines = format_problems(hosts)
    assert any(line.startswith(f"node-1: {problem}") for line in lines), lines
    assert all(line.startswith("node-1: ") for line in lines)


def test_hosts_with_the_same_problem_share_a_line() -> None:
    hosts = good_hosts(7)
    for host in hosts[1:]:
        host.facts["unseen"] = hosts[0].name
    compare(hosts, EXPECTED, "fp16")
    (line,) = format_problems(hosts)
    assert line.startswith("node-1, node-2, node-3, node-4 and 2 more: it does not share the output folder")


def test_table_shows_what_is_known() -> None:
    hosts = good_hosts(2)
    hosts[1] = Host("node-1", 2)
    for name in ("data", "clock"):
        del hosts[0].facts[name]
    rows = [re.split(r"  +", line.strip()) for line in format_table(hosts).splitlines()]
    assert list(zip(*rows, strict=True)) == [
        ("host", "node-0", "node-1"),
        ("slots", "2", "2"),
        ("device", "2 × H100", "–"),
        ("address", "10.0.0.1", "–"),
        ("Python", "3.11.7", "–"),
        ("torch", "2.15.0", "–"),
        ("torchvision", "0.29.1", "–"),
        ("DeepSpeed", "0.19.8", "–"),
        ("timm", "1.0.31", "–"),
        ("code", "8f7e6184 c0de", "–"),
        ("config", "c0f1", "–"),
        ("slowest round trip", "0.21 ms to node-1", "–"),
        ("lowest bandwidth", "10 Gbit/s to node-1", "–"),
    ]


def test_answers_cannot_move_the_cursor() -> None:
    host = good_hosts(1)[0]
    host.facts["devices"]["gpus"] = ["\x1b[2Jevil"]
    host.problems = ["\x1b[2J\nproblem"]
    assert "\x1b" not in format_table([host]) + "".join(format_problems([host]))
    assert len(format_problems([host])[0].splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "said", "problem"),
    [
        (97, "sh: cd: nowhere", f"no folder {Path.cwd()}; put the checkout at the same path on every host"),
        (98, "", f"no interpreter {sys.executable}; put the environment at the same path"),
        (255, "hello\nada@w: Permission denied (publickey).", "ada@w: Permission denied (publickey).; ssh must not"),
        (255, "ssh: Could not resolve hostname w: …", "ssh: Could not resolve hostname w: …; correct the name"),
        (255, "Host key verification failed.", "Host key verification failed.; log in once by hand"),
        (255, "host w port 22: Connection timed out", "host w port 22: Connection timed out; check that it is up"),
        (1, "/python: No module named recipe", "/python: No module named recipe; run this in the project's folder"),
        (7, "", "it exited with code 7 and no message; try it by hand: ssh w"),
    ],
)
def test_end_of_a_probe_is_explained_with_a_remedy(code: int, said: str, problem: str) -> None:
    assert explain(code, said, "w").startswith(problem)


@dataclass
class Asked:
    """The command with an ssh and a pdsh that only log their arguments."""

    hostfile: Path
    log: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, text: str, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of ``python -m recipe hosts``."""
        self.hostfile.write_text(text, newline="")
        return main([str(self.hostfile), *arguments]), *self.capsys.readouterr()

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Asked:
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name in ("ssh", "pdsh"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {shlex.quote(str(log))}\nexit 255\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return Asked(tmp_path / "hostfile", log, capsys)


HOSTILE = ["w;touch$IFS''marker", "$(touch marker)", "`touch marker`", "w|touch", "w>marker", "w\ntouch marker", "w\0"]


@pytest.mark.parametrize("name", [*HOSTILE, "-oProxyCommand=touch${IFS}marker", "a@-oProxyCommand=touch", "-l", "%h"])
def test_hostile_names_reach_no_shell(name: str, tmp_path: Path, ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = ask(f"good slots=1\n{name} slots=1\nlast slots=1\n")
    assert (code, out) == (2, "")
    assert f"recipe: {ask.hostfile}: line 2 = " in err
    assert len(err.splitlines()) == 1
    assert ask.calls() == []
    assert not (tmp_path / "marker").exists()


def test_host_name_comes_after_all_ssh_options(ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-tt  -p 2222")
    code, out, _ = ask("ada@node-1 slots=1\nnode-2 slots=1\n")
    assert code == 1
    assert len(ask.calls()) == 5  # for each host the probe and ssh -G, and once DeepSpeed's look for the master address
    assert all(" -- ada@node-1" in call or " -- node-2" in call for call in ask.calls())
    probes = [call for call in ask.calls() if "hosts.probe" in call]
    assert len(probes) == 2
    assert all(call.startswith("-a -x -tt -p 2222 -T -o BatchMode=yes -o ConnectTimeout=5 -- ") for call in probes)
    assert "problem: node-2: it exited with code 255 and no message; try it by hand: ssh node-2" in out
    assert out.splitlines()[-1].startswith("A launch would fail or go wrong: 2 problems (2 ranks on 2 hosts; ")


def test_folder_and_variables_are_quoted_for_the_remote_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a $(touch marker) 'b' \"c\";touch marker"
    (folder / "recipe/commands/hosts").mkdir(parents=True)
    (folder / "recipe/__init__.py").touch()
    (folder / "recipe/commands/__init__.py").touch()
    (folder / "recipe/commands/hosts/probe.py").write_text("import os; print(os.getcwd(), os.environ['PYTHONNOTE'])")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONNOTE", "$(touch marker) ' \"")
    command_line = ["sh", "-c", remote_command()]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == f"{folder} $(touch marker) ' \"\n", done.stderr
    assert not list(tmp_path.rglob("marker"))


def test_missing_folder_or_interpreter_has_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    here = remote_command()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    elsewhere = remote_command()
    assert subprocess.run(["sh", "-c", elsewhere], cwd="/", check=False).returncode == NO_INTERPRETER
    folder.rmdir()
    assert subprocess.run(["sh", "-c", here], cwd="/", stderr=subprocess.DEVNULL, check=False).returncode == NO_FOLDER


def test_refuses_what_a_launch_would_refuse(tmp_path: Path, ask: Asked) -> None:
    for config, message in ((str(ROOT / DIGITS), "train_batch_size"), (str(tmp_path / "absent.json"), "absent.json")):
        code, _, err = ask("node-1 slots=3\n", "--config", config)
        assert code == 2
        assert message in err
    assert main([str(tmp_path / "absent")]) == 2
    with pytest.raises(SystemExit, match="2"):
        ask("node-1 slots=1\n", "--port", "65536")


def test_single_host_must_be_this_machine(ask: Asked) -> None:
    code, out, _ = ask("192.0.2.1 slots=1\n")
    assert code == 1
    assert "problem: 192.0.2.1, the only host, is not this machine" in out
    assert ask.calls() == []


@pytest.mark.slow
def test_remedy_for_this_machine_alone_is_a_launch_without_ssh(tmp_path: Path, ask: Asked) -> None:
    code, out, _ = ask("localhost slots=2\n", "--output", str(tmp_path / "run"))
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("problem: DeepSpeed")] == [
        "problem: DeepSpeed finds no master address by ssh localhost hostname -I: it prints no address; it is this "
        "machine, which needs no ssh: launch with deepspeed --num_gpus 2 instead of --hostfile"
    ]


def test_gloo_interface_is_used_and_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert probe.network()["address"] == "127.0.0.1"
    probe.kept_open.pop().close()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9,lo")
    with pytest.raises(ValueError, match=r"names eth9, which has no IPv4 address; the interfaces are .*\blo\b"):
        probe.network()


def test_problems_of_the_launching_machine(tmp_path: Path, ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin/pdsh").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("A=1\n\n")
    folder = tmp_path / "my project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    code, out, _ = ask("node-1 slots=1\nnode-2 slots=1\n")
    assert code == 1
    assert "problem: pdsh is not installed here, and DeepSpeed starts" in out
    assert f"problem: the folder {folder} has characters that DeepSpeed does not quote" in out
    assert f'problem: {tmp_path}/.deepspeed_env: line 2 = "": not NAME=value' in out


def test_command_does_not_import_torch() -> None:
    code = "import sys, recipe.commands.hosts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
