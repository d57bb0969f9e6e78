"""A run that is killed at a call that changes a file continues, and ends as if it had not been.

A spread of the calls; `python tests/kills.py` takes all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import kills
import pytest

TESTS = Path(__file__).parent
# Of about 1,900 calls; a prime, so that it is not in step with what a checkpoint repeats.
EVERY = 157
# Where a process is killed for real, as shares of the calls.
PLACES = (0.12, 0.55)


def test_copies_are_what_a_kill_would_leave(tmp_path):
    """Of a process whose calls come one after another."""
    code = (
        "import os, sys; root = sys.argv[1]; os.mkdir(f'{root}/a')\n"
        "with open(f'{root}/a/b.tmp', 'wb', buffering=0) as file: file.write(b'12345678')\n"
        "os.replace(f'{root}/a/b.tmp', f'{root}/a/b'); os.remove(f'{root}/a/b')\n"
    )
    runs = kills.Runs(tmp_path)

    def run(name, **settings):
        root, log = tmp_path / name, tmp_path / f"{name}.txt"
        root.mkdir()
        settings = {"LD_PRELOAD": runs.library, "KILLS_ROOT": root, "KILLS_LOG": log} | settings
        environment = {**os.environ, **{key: str(value) for key, value in settings.items()}}
        status = subprocess.run([sys.executable, "-c", code, root], env=environment).returncode
        return status, [line.split()[1] for line in log.read_text().splitlines()]

    status, calls = run("whole", KILLS_COPIES=runs.copies)
    assert status == 0
    assert calls == ["mkdir", "open64", "write", "half-write", "rename", "unlink"]
    assert (runs.copies / "4/a/b.tmp").read_bytes() == b"1234"
    for number in range(1, len(calls) + 1):
        status, made = run(f"killed{number}", KILLS_AT=number)
        assert status == -9 and made == calls[:number]
        assert kills.state(tmp_path / f"killed{number}") == kills.state(runs.copies / str(number))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Runs have one device; this process has eight."""
    folder = tmp_path_factory.mktemp("kills")
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_kills; test_kills.main(sys.argv[1])"
    )
    environment = {**os.environ, **kills.ENVIRONMENT, "PYTHONPATH": str(TESTS.parent)}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(folder):
    """What the tests look at, in JSON: by number of a call, the stage and what is wrong then."""
    runs = kills.Runs(Path(folder))
    calls, expected = kills.record(runs, EVERY)
    found = {"calls": len(calls), "simulated": {}, "killed": {}}
    for number, stage in kills.distinct(runs, calls).items():
        runs.restore(number)
        found["simulated"][number] = stage, continued(runs, expected, stage)
    for place in PLACES:
        number = int(place * len(calls))
        status, made = runs.process(KILLS_AT=number)
        assert status == -9 and len(made) == number, (status, len(made), number)
        stage = kills.stages_of(made)[-1]
        found["killed"][number] = stage, continued(runs, expected, stage)
    print(json.dumps(found))
    os._exit(0)


def continued(runs, expected, until):
    try:
        runs.proceed(until)
        kills.compare(kills.results(runs.root), expected, until)
    except AssertionError as error:
        return str(error)
    return ""


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(programs):
    assert programs["calls"] > 1000
    stages = {stage for stage, _ in programs["simulated"].values()}
    assert {"llm", "slm", "l2s"} <= stages and len(programs["simulated"]) >= 8
    assert {number: wrong for number, (_, wrong) in programs["simulated"].items() if wrong} == {}


def test_a_process_that_is_killed_leaves_what_the_copies_say(programs):
    assert len(programs["killed"]) == len(PLACES)
    assert {number: wrong for number, (_, wrong) in programs["killed"].items() if wrong} == {}
