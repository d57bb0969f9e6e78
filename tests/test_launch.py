"""The scripts in launch/: dry runs, and real runs with stand-ins for python and gcloud."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Writes down its arguments, one line per call, and fails where an argument asks it to.
STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
for argument in "$@"; do [[ $argument != *quickstart* || -z ${BREAK:-} ]] || exit 7; done
"""


def run(
    script: str, *arguments: str, cwd: pathlib.Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHON": "python3", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines()]


@pytest.fixture
def stand_in(tmp_path: pathlib.Path) -> dict[str, str]:
    """Environment in which python (by PYTHON) and gcloud (by PATH) are stand-ins."""
    directory = tmp_path / "bin"
    directory.mkdir()
    gcloud = directory / "gcloud"
    gcloud.write_text(STAND_IN)
    gcloud.chmod(0o755)
    return {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "PYTHON": str(gcloud),
        "CALLS": str(tmp_path / "calls"),
    }


def calls(environment: dict[str, str]) -> list[list[str]]:
    path = pathlib.Path(environment["CALLS"])
    return commands(path.read_text()) if path.exists() else []


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "launch").glob("*.sh")))
def test_executable_with_help(script: str) -> None:
    assert os.access(ROOT / "launch" / script, os.X_OK)
    result = run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: launch/{script}")


def test_local_dry_run_prints_what_it_would_run(
    tmp_path: pathlib.Path, stand_in: dict[str, str]
) -> None:
    flag = "--config.task.prompt=translate to {en}: '$HOME' \"*\""
    result = run(
        "local.sh",
        "--dry-run",
        "--runs=a b",
        "quickstart",
        "configs/aeslc.py",
        "--",
        flag,
        cwd=tmp_path,
        **stand_in,
    )
    assert result.returncode == 0, result.stderr
    assert commands(result.stdout) == [
        [
            *(stand_in["PYTHON"], "-m", "l2s_jax.main"),
            f"--config=configs/{name}.py",
            f"--workdir={tmp_path}/a b/{name}",
            flag,
        ]
        for name in ("quickstart", "aeslc")
    ]
    assert calls(stand_in) == []


def test_local_runs_in_order_from_the_root(stand_in: dict[str, str]) -> None:
    result = run("local.sh", "quickstart", "aeslc", cwd=ROOT / "tests", **stand_in)
    assert result.returncode == 0, result.stderr
    assert [call[2:] for call in calls(stand_in)] == [
        [f"--config=configs/{name}.py", f"--workdir=runs/{name}"]
        for name in ("quickstart", "aeslc")
    ]


def test_local_stops_at_the_first_failure(stand_in: dict[str, str]) -> None:
    result = run("local.sh", "quickstart", "aeslc", BREAK="1", **stand_in)
    assert result.returncode == 7
    assert len(calls(stand_in)) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", [], "no config given"),
        ("local.sh", ["no_such"], "no such config: configs/no_such.py"),
        ("local.sh", ["quickstart", "--config.seed=1"], "unknown option --config.seed=1"),
        ("tpu_vm.sh", [], "expected create, setup, run, fetch or delete"),
        ("tpu_vm.sh", ["destroy"], "got 'destroy'"),
        ("tpu_vm.sh", ["run"], "run needs a config"),
        ("tpu_vm.sh", ["fetch", "no_such"], "no such config: configs/no_such.py"),
    ],
)
def test_wrong_arguments(
    script: str, arguments: list[str], message: str, stand_in: dict[str, str]
) -> None:
    result = run(script, *arguments, **stand_in)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert calls(stand_in) == []


@pytest.mark.parametrize(
    "arguments", [["create"], ["setup"], ["run", "quickstart"], ["fetch", "aeslc"], ["delete"]]
)
def test_tpu_vm_dry_run(arguments: list[str], stand_in: dict[str, str]) -> None:
    result = run("tpu_vm.sh", "--dry-run", *arguments, NAME="my vm", ZONE="z-1", **stand_in)
    assert result.returncode == 0, result.stderr
    printed = commands(result.stdout)
    gcloud = [command for command in printed if command[0] == "gcloud"]
    assert gcloud
    for command in gcloud:
        assert command[1:4] == ["compute", "tpus", "tpu-vm"]
        assert "--zone=z-1" in command
        assert any(word.startswith("my vm") for word in command)
    assert calls(stand_in) == []


def test_tpu_vm_run_quotes_flags_for_the_far_shell(stand_in: dict[str, str]) -> None:
    flag = "--config.task.prompt=to {en}: '$HOME'"
    result = run("tpu_vm.sh", "run", "quickstart", flag, **stand_in)
    assert result.returncode == 0, result.stderr
    (call,) = calls(stand_in)
    (remote,) = (word for word in call if word.startswith("--command="))
    assert shlex.split(remote.removeprefix("--command=")) == [
        *("cd", "l2s_jax", "&&", ".venv/bin/python", "-m", "l2s_jax.main"),
        "--config=configs/quickstart.py",
        "--workdir=runs/quickstart",
        flag,
    ]


def test_tpu_vm_setup_is_one_chain_of_commands(stand_in: dict[str, str]) -> None:
    result = run("tpu_vm.sh", "--dry-run", "setup", **stand_in)
    (remote,) = (
        word.removeprefix("--command=")
        for command in commands(result.stdout)
        for word in command
        if word.startswith("--command=")
    )
    assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0
    assert all(len(shlex.split(part)) > 1 for part in remote.split("&&"))


def test_tpu_vm_failure_is_passed_on(stand_in: dict[str, str]) -> None:
    assert run("tpu_vm.sh", "run", "quickstart", BREAK="1", **stand_in).returncode == 7
