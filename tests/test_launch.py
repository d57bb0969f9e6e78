"""The scripts in launch/: dry runs, and real runs with stand-ins for the programs they call."""

from __future__ import annotations

import copy
import os
import pathlib
import shlex
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from l2s_jax.serve.app import make_app
from l2s_jax.serve.flags import make_parser
from l2s_jax.serve.service import Limits
from l2s_jax.serve.service import Service as ServeService

ROOT = pathlib.Path(__file__).parent.parent
# Writes down its arguments, one line per call, and fails where an argument asks it to.
STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
[[ $* != *describe* ]] || { sed -i -e 1w/dev/stdout -e 1d "$STATES"; }
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
    """Environment in which python (by PYTHON), gcloud and sbatch (by PATH) are stand-ins.

    "describe" of gcloud answers with the lines of the file STATES, one after another.
    """
    directory = tmp_path / "bin"
    directory.mkdir()
    gcloud = directory / "gcloud"
    gcloud.write_text(STAND_IN)
    gcloud.chmod(0o755)
    shutil.copy(gcloud, directory / "sbatch")
    (tmp_path / "states").write_text("ACTIVE\n")
    return {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "PYTHON": str(gcloud),
        "CALLS": str(tmp_path / "calls"),
        "STATES": str(tmp_path / "states"),
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


@pytest.mark.parametrize("script", ["local.sh", "local_multiprocess.sh", "gpu_slurm.sh"])
def test_a_path_is_that_of_the_caller_and_a_name_that_of_a_config(
    script: str, tmp_path: pathlib.Path, stand_in: dict[str, str]
) -> None:
    own = tmp_path / "quickstart.py"
    own.touch()
    options = ["--dry-run", *(["--processes=1"] if "multi" in script else [])]
    for given, found in (
        ("quickstart.py", str(own)),
        (str(own), str(own)),
        ("./quickstart.py", f"{tmp_path}/./quickstart.py"),
        ("quickstart", "configs/quickstart.py"),
        ("configs/quickstart.py", "configs/quickstart.py"),
    ):
        result = run(script, *options, given, cwd=tmp_path, **stand_in)
        assert result.returncode == 0, result.stderr
        assert f"--config={found} " in result.stdout.replace("\\", "")
    own.unlink()
    result = run(script, *options, "quickstart.py", cwd=tmp_path, **stand_in)
    assert "--config=configs/quickstart.py " in result.stdout.replace("\\", "")
    result = run(script, *options, "elsewhere/quickstart.py", cwd=tmp_path, **stand_in)
    assert result.returncode == 2 and "no such config: elsewhere/quickstart.py" in result.stderr


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
        ("local_multiprocess.sh", ["quickstart"], "--processes=: expected a number above 0"),
        ("local_multiprocess.sh", ["--processes=0", "quickstart"], "--processes=0: expected a"),
        ("local_multiprocess.sh", ["--processes=2"], "no config given"),
        (
            "local_multiprocess.sh",
            ["--processes=2", "no_such"],
            "no such config: configs/no_such.py",
        ),
        ("local_multiprocess.sh", ["--processes=2", "--device=tpu", "aeslc"], "expected cpu or"),
        ("local_multiprocess.sh", ["--processes=2", "aeslc", "quickstart"], "one config at a time"),
        ("tpu_vm.sh", [], "expected create, setup, run, resume, logs, fetch or delete"),
        ("tpu_vm.sh", ["destroy"], "got 'destroy'"),
        ("tpu_vm.sh", ["run"], "run needs a config"),
        ("tpu_vm.sh", ["create", "--sport"], "create: unexpected --sport"),
        ("tpu_vm.sh", ["fetch", "no_such"], "no such config: configs/no_such.py"),
        ("tpu_vm.sh", ["resume", "quickstart"], "resume needs BUCKET"),
        ("gpu_slurm.sh", [], "no config given"),
        ("gpu_slurm.sh", ["no_such"], "no such config: configs/no_such.py"),
        ("gpu_slurm.sh", ["--nodes=two", "quickstart"], "--nodes=two: expected a number above 0"),
        ("gpu_slurm.sh", ["--cpus=0", "quickstart"], "--cpus=0: expected a number above 0"),
        ("gpu_slurm.sh", ["quickstart", "--config.seed=1"], "unknown option --config.seed=1"),
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


def test_a_missing_program_is_named_first(tmp_path: pathlib.Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "basename"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    path = {"PATH": str(tmp_path / "bin")}
    for script, arguments, message in (
        ("tpu_vm.sh", ["create"], "gcloud is not installed"),
        ("gpu_slurm.sh", ["quickstart"], "sbatch is not installed"),
        ("local_multiprocess.sh", ["--processes=2", "quickstart"], "no such interpreter"),
        (
            "local_multiprocess.sh",
            ["--processes=2", "--device=gpu", "quickstart"],
            "nvidia-smi is not installed",
        ),
    ):
        python = "bash" if "--device=gpu" in arguments else "no_python"
        result = run(script, *arguments, PYTHON=python, **path)
        assert result.returncode == 2
        assert message in result.stderr


FLAG = "--config.task.prompt=to {en}: '$HOME' \"*\""
VM = ("gcloud", "compute", "tpus", "tpu-vm")
QUEUE = ("gcloud", "compute", "tpus", "queued-resources")


def test_local_multiprocess_dry_run(tmp_path: pathlib.Path, stand_in: dict[str, str]) -> None:
    config = tmp_path / "my task.py"
    config.touch()
    arguments = ("--dry-run", "--processes=2", "--port=1234", "--runs=a b", config.name)
    result = run("local_multiprocess.sh", *arguments, "--", FLAG, cwd=tmp_path, **stand_in)
    assert result.returncode == 0, result.stderr
    workdir = f"{tmp_path}/a b/my task"
    assert commands(result.stdout) == [
        [
            *("env", "JAX_PLATFORMS=cpu", stand_in["PYTHON"], "-m", "l2s_jax.main"),
            *(f"--config={config}", f"--workdir={workdir}", "--coordinator=127.0.0.1:1234"),
            *("--num_processes=2", f"--process_id={process}", FLAG),
            *(">", f"{workdir}/logs/process-{process}.log"),
        ]
        for process in range(2)
    ]
    assert not (tmp_path / "a b").exists()
    result = run("local_multiprocess.sh", *arguments[:-1], "quickstart", "--device=gpu", **stand_in)
    assert [command[:2] for command in commands(result.stdout)] == [
        ["env", f"CUDA_VISIBLE_DEVICES={process}"] for process in range(2)
    ]
    assert calls(stand_in) == []


def test_local_multiprocess_ends_all_when_one_fails(
    tmp_path: pathlib.Path, stand_in: dict[str, str]
) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n[[ $* != *--process_id=1* ]] || exit 7\necho begun; exec sleep 600\n"
    )
    python.chmod(0o755)
    environment = {**stand_in, "PYTHON": str(python)}
    result = run(
        "local_multiprocess.sh", "--processes=3", f"--runs={tmp_path}", "quickstart", **environment
    )
    assert result.returncode == 7
    assert "process 1 ended with status 7" in result.stderr
    assert "begun" in result.stdout


@pytest.mark.parametrize("spot", [[], ["--spot"]])
def test_tpu_vm_dry_run(spot: list[str], stand_in: dict[str, str]) -> None:
    def printed(*arguments: str) -> list[list[str]]:
        environment = {
            "NAME": "my vm",
            "ZONE": "z-1",
            "TYPE": "t",
            "IMAGE": "i",
            "BUCKET": "gs://b/f/",
        }
        result = run("tpu_vm.sh", "--dry-run", *arguments, **environment, **stand_in)
        assert result.returncode == 0, result.stderr
        return commands(result.stdout)

    create = [
        *(*QUEUE, "create", "my vm", "--node-id=my vm", "--zone=z-1"),
        *("--accelerator-type=t", "--runtime-version=i", *spot),
    ]
    delete = [*QUEUE, "delete", "my vm", "--zone=z-1", "--force", "--quiet"]
    assert printed("create", *spot) == [create]
    assert printed("delete") == [delete]
    archive, copy, install, done = printed("setup")
    assert done == [*install[:-1], "--command=rm l2s_jax/.setting_up"]
    assert archive[:3] == ["git", "archive", "--format=tar.gz"]
    assert copy[:5] == [*VM, "scp"] and copy[6:] == [
        *("my vm:l2s_jax.tar.gz", "--zone=z-1", "--worker=all"),
    ]
    assert install[:-1] == [*VM, "ssh", "my vm", "--zone=z-1", "--worker=all"]
    assert "-e '.[gs]'" in remote_of(install)
    start, follow = started = printed("run", "quickstart", FLAG)
    assert start[:-1] == install[:-1]
    assert follow[:-1] == [*VM, "ssh", "my vm", "--zone=z-1", "--worker=0"]
    assert printed("logs", "quickstart") == [follow]
    resumed = printed("resume", *spot, "quickstart", FLAG)
    assert resumed[:2] == [delete, create]
    assert [command[:3] for command in resumed[2:4]] == [archive[:3], copy[:3]]
    assert resumed[4:] == [install, done, *started]
    fetch = printed("fetch", "quickstart")
    assert fetch[0] == ["mkdir", "-p", "runs/quickstart"]
    assert fetch[1][:4] == ["gcloud", "storage", "cp", "--recursive"]
    assert "gs://b/f/runs/quickstart/report.json" in fetch[1]
    assert "--workdir=gs://b/f/runs/quickstart\\" in remote_of(start)
    assert calls(stand_in) == []


def remote_of(command: list[str]) -> str:
    (remote,) = (word for word in command if word.startswith("--command="))
    return remote.removeprefix("--command=")


def test_tpu_vm_starts_the_command_on_the_hosts(
    tmp_path: pathlib.Path, stand_in: dict[str, str]
) -> None:
    """What the hosts' shell makes of it, with stand-ins for their Python."""
    result = run("tpu_vm.sh", "run", "quickstart", FLAG, **stand_in)
    assert result.returncode == 0, result.stderr
    start, follow = calls(stand_in)
    python = tmp_path / "l2s_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"; exit 7\n')
    python.chmod(0o755)
    assert subprocess.run(["bash", "-c", remote_of(start)], cwd=tmp_path).returncode == 0
    followed = subprocess.run(
        ["bash", "-c", remote_of(follow)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert followed.returncode == 7, followed.stderr
    assert followed.stdout.splitlines() == [
        *("-m", "l2s_jax.main", "--config=configs/quickstart.py", "--workdir=runs/quickstart"),
        *("--distributed", FLAG),
    ]


def test_tpu_vm_does_not_start_twice(tmp_path: pathlib.Path, stand_in: dict[str, str]) -> None:
    run("tpu_vm.sh", "run", "quickstart", **stand_in)
    logs = tmp_path / "l2s_jax" / "logs"
    logs.mkdir(parents=True)
    (logs / "quickstart.pid").write_text(f"{os.getpid()}\n")
    again = subprocess.run(
        ["bash", "-c", remote_of(calls(stand_in)[0])], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 2
    assert again.stderr == "quickstart is running; see logs\n"


def test_tpu_vm_setup_is_one_chain_of_commands(stand_in: dict[str, str]) -> None:
    result = run("tpu_vm.sh", "--dry-run", "setup", **stand_in)
    remote = remote_of(commands(result.stdout)[-2])
    assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0
    assert all(len(shlex.split(part)) > 1 for part in remote.split("&&"))


def test_tpu_vm_create_waits_until_the_slice_is_there(
    tmp_path: pathlib.Path, stand_in: dict[str, str]
) -> None:
    sleep = tmp_path / "bin" / "sleep"
    sleep.write_text("#!/usr/bin/env bash\n")
    sleep.chmod(0o755)
    # One question gets no answer.
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\n\nPROVISIONING\nACTIVE\n")
    result = run("tpu_vm.sh", "create", **stand_in)
    assert result.returncode == 0, result.stderr
    assert [call[3] for call in calls(stand_in)] == ["create", *["describe"] * 4]
    (tmp_path / "states").write_text("FAILED\n")
    assert run("tpu_vm.sh", "create", **stand_in).returncode == 1


@pytest.mark.parametrize(
    ("state", "made_anew"), [("ACTIVE", False), ("SUSPENDED", True), ("FAILED", True)]
)
def test_tpu_vm_resume_makes_a_lost_slice_anew(
    tmp_path: pathlib.Path, stand_in: dict[str, str], state: str, made_anew: bool
) -> None:
    (tmp_path / "states").write_text(f"{state}\nACTIVE\n")
    result = run("tpu_vm.sh", "resume", "--spot", "quickstart", BUCKET="gs://b", **stand_in)
    assert result.returncode == 0, result.stderr
    before = ["delete", "create", "describe", "scp", "ssh", "ssh"] if made_anew else ["ssh"]
    assert [call[3] for call in calls(stand_in)] == ["describe", *before, "ssh", "ssh"]


def test_tpu_vm_resume_ends_a_setup_that_was_cut_short(
    tmp_path: pathlib.Path, stand_in: dict[str, str]
) -> None:
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.write_text(f"{gcloud.read_text()}[[ $* != *'test -d'* ]]\n")
    result = run("tpu_vm.sh", "resume", "quickstart", BUCKET="gs://b", **stand_in)
    assert result.returncode == 0, result.stderr
    asked, copied, *rest = [call[3:] for call in calls(stand_in)[1:]]
    assert "--command=test -d l2s_jax/.venv && ! test -f l2s_jax/.setting_up" in asked
    assert copied[0] == "scp"
    assert [call[0] for call in rest] == ["ssh"] * 4


def test_tpu_vm_runs_what_is_committed(stand_in: dict[str, str]) -> None:
    new = ROOT / "configs" / "not_committed.py"
    new.touch()
    try:
        result = run("tpu_vm.sh", "run", "not_committed", **stand_in)
        told = run("tpu_vm.sh", "--dry-run", "setup", **stand_in)
    finally:
        new.unlink()
    assert result.returncode == 2
    assert "configs/not_committed.py is not committed" in result.stderr
    assert calls(stand_in) == []
    assert told.returncode == 0 and "configs/not_committed.py" in told.stderr


# Two hosts, whose homes are folders; scp and ssh do to them what the real ones do.
HOSTS = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
for flag in "$@"; do case $flag in
  --command=*) command=${flag#*=} ;;
  --output-directory=*) logs=${flag#*=} ;;
esac; done
for host in 0 1; do
  home=$HOMES/$host; mkdir -p "$home"; cd "$home"
  case $4 in
    scp) [[ $5 == *.tar.gz ]] || { shift 4; [[ $1 != --recurse ]] || shift; break; } ;;
    ssh) [[ $command != *sha256sum* ]] || HOME=$home bash -c "$command" > "$logs/$host.log" ;;
  esac
done
[[ $2 != *:* ]] || for host in 0 1; do cp -rL "$1" "$HOMES/$host/${2#*:}"; done
"""


@pytest.fixture
def hosts(tmp_path: pathlib.Path, stand_in: dict[str, str]) -> dict[str, str]:
    """`stand_in` with a gcloud that has two hosts, and folders to bring to them."""
    (tmp_path / "bin" / "gcloud").write_text(HOSTS)
    (tmp_path / "my data/da ta/in").mkdir(parents=True)
    (tmp_path / "my data/da ta/in/train set.txt").write_text("one\n")
    (tmp_path / "my data/da ta/held.txt").write_text("two\n")
    (tmp_path / "t5").mkdir()
    # As the hub's cache has them.
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "t5/model.safetensors").symlink_to(tmp_path / "blob")
    return {**stand_in, "HOMES": str(tmp_path / "homes"), "DATA": "my data/da ta", "LLM": "t5"}


def test_tpu_vm_brings_data_and_checkpoints(tmp_path: pathlib.Path, hosts: dict[str, str]) -> None:
    def setup() -> list[str]:
        """Names of the folders that were copied."""
        pathlib.Path(hosts["CALLS"]).unlink(missing_ok=True)
        result = run("tpu_vm.sh", "setup", cwd=tmp_path, **hosts)
        assert result.returncode == 0, result.stderr
        return [pathlib.Path(call[5]).name for call in calls(hosts) if call[4] == "--recurse"]

    def on(host: int) -> dict[str, str]:
        home = tmp_path / f"homes/{host}/l2s_jax"
        return {
            str(path.relative_to(home)): path.read_text()
            for path in home.rglob("*")
            if path.is_file()
        }

    there = {
        "data/da ta/in/train set.txt": "one\n",
        "data/da ta/held.txt": "two\n",
        "checkpoints/t5/model.safetensors": "weights",
    }
    assert setup() == ["da ta", "t5"]
    assert on(0) == on(1) == there
    assert not any(path.is_symlink() for path in (tmp_path / "homes").rglob("*"))
    assert setup() == []
    # One host has lost a file, and half of another; both get these alone.
    homes = [tmp_path / f"homes/{host}/l2s_jax" for host in (0, 1)]
    (homes[1] / "data/da ta/held.txt").unlink()
    (homes[1] / "data/da ta/in/train set.txt").write_text("on")
    assert setup() == ["da ta"]
    assert on(0) == on(1) == there
    (tmp_path / "blob").write_text("WEIGHTS")  # as large as before
    assert setup() == ["t5"]
    assert on(1) == {**there, "checkpoints/t5/model.safetensors": "WEIGHTS"}


def test_tpu_vm_brings_links_to_a_bucket(tmp_path: pathlib.Path, hosts: dict[str, str]) -> None:
    """As gcloud does, which leaves out folders that are links."""
    (tmp_path / "t5/more").symlink_to(tmp_path / "my data")
    (tmp_path / "bin" / "gcloud").write_text(
        '#!/usr/bin/env bash\n[[ $2 != rsync ]] || (cd "${@: -2:1}" && find . -type f -o -type l |'
        ' while IFS= read -r path; do [[ -d $path ]] || { echo "$path"; cat "$path"; echo; }; done)'
    )
    environment = {name: value for name, value in hosts.items() if name != "DATA"}
    result = run("tpu_vm.sh", "setup", BUCKET="gs://b", cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    for line in ("./model.safetensors", "weights", "./more/da ta/held.txt", "two"):
        assert line in result.stdout.splitlines()


def test_tpu_vm_says_where_it_brought_them(tmp_path: pathlib.Path, hosts: dict[str, str]) -> None:
    def printed(*arguments: str, **environment: str) -> list[list[str]]:
        environment = {**hosts, "SLM": f"{tmp_path}/t5", **environment}
        result = run("tpu_vm.sh", "--dry-run", *arguments, cwd=tmp_path, **environment)
        assert result.returncode == 0, result.stderr
        return commands(result.stdout)

    # A list of what is here, a question to the hosts, and the files.
    assert [call[4] for call in printed("setup")[3:-1]] == ["scp", "ssh", "scp"] * 2
    data, llm = printed("setup", BUCKET="gs://b/f")[3:-1]
    sync = ["gcloud", "storage", "rsync", "--recursive"]
    assert data == [*sync, f"{tmp_path}/my data/da ta", "gs://b/f/data/da ta"]
    # What has links is copied as a folder in which all files are.
    assert llm[:-2] == [*sync, "--no-ignore-symlinks"] and llm[-1] == "gs://b/f/checkpoints/t5"
    for bucket, prefix in (("", ""), ("gs://b/f", "gs://b/f/")):
        start = remote_of(printed("run", "quickstart", "--config.seed=2", BUCKET=bucket)[0])
        command = shlex.split(start.partition("bash -c ")[2].partition(" > logs/")[0])[0]
        assert shlex.split(command.partition(";")[0])[-4:] == [
            f"--config.task.data_dir={prefix}data/da ta",
            *(f"--config.{name}.path={prefix}checkpoints/t5" for name in ("llm", "slm")),
            "--config.seed=2",
        ]
    assert calls(hosts) == []


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DATA", "no such", "DATA=no such: expected a folder on this machine"),
        ("LLM", "blob", "LLM=blob: expected a folder on this machine"),
        ("SLM", "empty", "SLM=empty: expected a folder with files"),
        ("SLM", "strange", "SLM=strange: expected no backslash or control character"),
        ("SLM", "other/t5", "SLM=other/t5: expected another name than that of"),
    ],
)
@pytest.mark.parametrize("action", [["create"], ["resume", "quickstart"]])
def test_tpu_vm_refuses_folders_before_a_slice_is_made(
    tmp_path: pathlib.Path,
    hosts: dict[str, str],
    action: list[str],
    variable: str,
    value: str,
    message: str,
) -> None:
    for name in ("empty/inner", "strange", "other/t5"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "strange/a\nb").touch()
    (tmp_path / "other/t5/model.safetensors").touch()
    environment = {**hosts, "BUCKET": "gs://b", variable: value}
    result = run("tpu_vm.sh", *action, cwd=tmp_path, **environment)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert calls(hosts) == []


def test_tpu_vm_failure_is_passed_on(stand_in: dict[str, str]) -> None:
    assert run("tpu_vm.sh", "run", "quickstart", BREAK="1", **stand_in).returncode == 7


def test_gpu_slurm_submits_one_process_for_each_gpu(
    tmp_path: pathlib.Path, stand_in: dict[str, str]
) -> None:
    arguments = ("--nodes=2", "--gpus=4", "--runs=a b", "quickstart", "--", FLAG)
    result = run("gpu_slurm.sh", "--dry-run", *arguments, cwd=tmp_path, **stand_in)
    assert result.returncode == 0, result.stderr
    assert calls(stand_in) == [] and not (tmp_path / "a b").exists()
    workdir = f"{tmp_path}/a b/quickstart"
    make, submit = commands(result.stdout)
    assert make == ["mkdir", "-p", f"{workdir}/logs"]
    assert submit[:-1] == [
        *("sbatch", "--job-name=l2s-quickstart", f"--chdir={ROOT}", "--nodes=2"),
        *("--ntasks-per-node=4", "--gpus-per-node=4", "--requeue", "--open-mode=append"),
        f"--output={workdir}/logs/slurm-%j.log",
    ]
    step = submit[-1].removeprefix("--wrap=")
    expected = [
        *("srun", "--kill-on-bad-exit=1", stand_in["PYTHON"], "-m", "l2s_jax.main"),
        *("--config=configs/quickstart.py", f"--workdir={workdir}", FLAG),
    ]
    assert shlex.split(step) == expected
    # Slurm gives it to sh.
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {step}"], capture_output=True, text=True, check=True
    )
    assert words.stdout.splitlines() == expected

    assert run("gpu_slurm.sh", *arguments, cwd=tmp_path, **stand_in).returncode == 0
    assert calls(stand_in) == [submit[1:]]
    assert (tmp_path / "a b/quickstart/logs").is_dir()
    result = run("gpu_slurm.sh", "--dry-run", "--cpus=6", "quickstart", **stand_in)
    *_, submit = commands(result.stdout)
    assert "--cpus-per-task=6" in submit
    assert shlex.split(submit[-1].removeprefix("--wrap="))[2] == "--cpus-per-task=6"


def test_gke_manifest_runs_a_config_on_every_host_of_the_slice() -> None:
    (jobset,) = yaml.safe_load_all((ROOT / "launch" / "gke.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    (slice_,) = jobset["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == x * y // chips
    # A pod that fails ends the job, and the JobSet starts it again.
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    # A training first ends its validation, and saves.
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert container["command"] == ["python", "-m", "l2s_jax.main"]
    values = dict(argument.split("=", 1) for argument in container["args"])
    assert (ROOT / values["--config"]).is_file()
    others = [value for name, value in values.items() if name != "--config"]
    assert len(others) == 4 and all(value.startswith("gs://BUCKET/") for value in others)


def test_dockerfile_makes_the_image_of_the_manifest() -> None:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    said = {keyword: rest for keyword, rest in steps}
    (jobset,) = yaml.safe_load_all((ROOT / "launch" / "gke.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (said["FROM"], said["WORKDIR"]) == ("python:3.11-slim", container["workingDir"])
    assert said["ARG"] == "JAX=jax[tpu]"
    installs = [shlex.split(rest) for keyword, rest in steps if keyword == "RUN"]
    assert [step[-1] for step in installs] == ["$JAX", ".[gs,s3,serve]"]
    assert all(step[:2] == ["pip", "install"] for step in installs)
    # What the image leaves out is nothing that a commit holds.
    ignored = (ROOT / ".dockerignore").read_text().split()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert not {path.split("/")[0] for path in listed.split()} & set(ignored)


def patched(base: Any, patch: Any) -> Any:
    """A strategic merge of Kubernetes: containers are told apart by their names."""
    if isinstance(patch, dict):
        merged = {name: patched(base.get(name), value) for name, value in patch.items()}
        return {**base, **merged} if base else merged
    if isinstance(patch, list):
        (one,) = patch
        return [patched(other, one) if other["name"] == one["name"] else other for other in base]
    return patch


SERVE = list(yaml.safe_load_all((ROOT / "launch" / "k8s-serve.yaml").read_text()))
GPU = yaml.safe_load((ROOT / "launch" / "k8s-serve-gpu.yaml").read_text())


@pytest.mark.parametrize("version", ["1.28", "1.37"])
@pytest.mark.parametrize("objects", [SERVE, [patched(SERVE[0], GPU)]], ids=["plain", "gpu"])
def test_manifest_of_the_server_is_what_kubernetes_takes(
    objects: list[dict[str, Any]], version: str
) -> None:
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)
    broken = copy.deepcopy(objects[0])
    broken["spec"]["template"]["spec"]["containers"][0]["port"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_manifest_of_the_server_fits_the_server() -> None:
    deployment, service, budget = SERVE
    assert [one["kind"] for one in SERVE] == ["Deployment", "Service", "PodDisruptionBudget"]
    spec, pod = deployment["spec"], deployment["spec"]["template"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert labels == spec["selector"]["matchLabels"] == service["spec"]["selector"]
    assert labels == budget["spec"]["selector"]["matchLabels"]
    assert spec["replicas"] == 2 > budget["spec"]["minAvailable"]
    # One that is ready ends only when another is.
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "l2s_jax.serve"]
    parser = make_parser("serve", "")
    flags = parser.parse_args(container["args"])
    (port,) = container["ports"]
    assert (flags.host, flags.port) == ("0.0.0.0", port["containerPort"])
    (outside,) = service["spec"]["ports"]
    assert outside["targetPort"] == port["name"]
    paths = {route.path for route in make_app(ServeService(Limits())).routes}
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    for probe in probes.values():
        assert probe["httpGet"]["port"] == port["name"] and probe["httpGet"]["path"] in paths
    assert probes["startup"]["httpGet"] == probes["readiness"]["httpGet"]
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 1800
    # To its end: what keeps connections away, the requests, and some seconds for the process.
    sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + flags.drain_s + 10
    # What is written is written to a volume: the rest is read only, and not root's.
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == {one["name"] for one in pod["volumes"]}
    environment = {one["name"]: one for one in container["env"]}
    assert mounts[environment["HOME"]["value"]] == mounts["/cache"]
    assert flags.compilation_cache.startswith("/cache/") and flags.model.startswith("/models/")
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    secret = environment["L2S_API_KEY"]["valueFrom"]["secretKeyRef"]
    header = (ROOT / "launch" / "k8s-serve.yaml").read_text().partition("apiVersion")[0]
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=KEY" in header
    name = deployment["metadata"]["name"]
    assert f"patch deployment {name} --patch-file launch/k8s-serve-gpu.yaml" in header
    assert patched(deployment, GPU)["spec"]["template"]["spec"]["containers"][0]["resources"] == {
        **container["resources"],
        "limits": {**container["resources"]["limits"], "nvidia.com/gpu": 1},
    }
