"""The GPU kit, rehearsed on a CPU with tiny models, as benchmarks/gpu.sh runs it."""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest
import xla

from benchmarks.gpu import __main__ as kit
from benchmarks.gpu import exact, part, quality, report, serve
from benchmarks.gpu.flags import CANDIDATES
from benchmarks.gpu.right_tables import COMPANY, LOGITS, PRODUCTS, RESPONSES, TABLES
from benchmarks.gpu.runs import Run

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*arguments, **environment):
    """The kit's command, with one device and not the many of the tests."""
    variables = {**os.environ, "XLA_FLAGS": xla.flags(), "PYTHON": sys.executable, **environment}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=1600)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit") / "gpu"
    finished = run("--rehearse", "--limit_s=1500", f"--output={folder}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


@pytest.fixture(scope="module")
def found(rehearsed):
    return json.loads((rehearsed / "gpu.json").read_text())


def test_every_part_ends_well(rehearsed, found):
    assert found["rehearsal"] and list(found["parts"]) == list(kit.LIMITS)
    for name, entry in found["parts"].items():
        log = (rehearsed / "logs" / f"{name}.log").read_text()
        assert entry["status"] == "ok", log
        assert entry["result"]["tables"], name
        assert entry["result"] == json.loads((rehearsed / f"{name}.json").read_text())


def test_all_tables_are_in_the_report(rehearsed, found):
    text = (rehearsed / "gpu.md").read_text()
    for entry in found["parts"].values():
        for table in entry["result"]["tables"]:
            assert f"### {table['title']}" in text
            assert "| " + " | ".join(table["columns"]) + " |" in text
            assert {len(row) for row in table["rows"]} <= {len(table["columns"])}
    assert "A rehearsal" in text and "![serve](serve.png)" in text
    assert (rehearsed / "serve.png").stat().st_size > 10_000


def test_the_parts_measured_what_they_say(found):
    results = {name: entry["result"] for name, entry in found["parts"].items()}
    assert min(results["facts"]["ceilings"].values()) > 0
    systems = {row["system"] for row in results["serve"]["rows"]}
    assert systems == {"l2s", "llm", "hf-llm"}
    assert {row["system"] for row in results["int8"]["rows"]} == {"slm", "slm-int8"}
    assert {row["system"] for row in results["exact"]["rows"]} == {"llm", "exact", "l2s"}
    assert {row["acceptance"] for row in results["exact"]["rows"]} == {0.8}
    steps = results["profile"]["steps"]
    for row in steps["XLA's own choices"]["rows"]:
        assert row["ms_per_step"] > 0 and row["operations_per_step"] > 10
        # 2 layers: 8 products with kernels each, 4 with the cache, and the head.
        products = [o for o in row["longest"] if "dot" in o["name"]]
        assert products and all(o["per_step"] == 1 for o in products)


def test_models_are_right_on_this_device(found):
    result = found["parts"]["right"]["result"]
    tables = {
        table["title"]: [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        for table in result["tables"]
    }
    assert list(tables) == list(TABLES) and result["skipped"] == {}
    assert [row["precision"] for row in tables[PRODUCTS]] == ["default", "highest"]
    models = ["T5 v1.0", "Flan-T5", "GPT-2", "GPT-NeoX", "Llama", "Qwen3"]
    assert [row["model"] for row in tables[LOGITS]] == models
    assert {row["search"] for row in tables[RESPONSES]} == {"greedy", "4 beams"}
    assert {row["dtype"] for row in tables[COMPANY]} == {"float32", "bfloat16"}
    assert len(tables[COMPANY]) == 8
    for title in (LOGITS, RESPONSES, COMPANY):
        assert [row["holds"] for row in tables[title]] == ["yes"] * len(tables[title])
    for row in tables[LOGITS]:
        # Numbers that were measured: none is what no rounding at all would give.
        assert 0 < row["float32: largest difference"] < 1e-5
        assert 1e-4 < row["bfloat16: rms error"] < 1.5 * row["rms of transformers"] < 1e-2
    assert all(0 < row["ended"] <= row["rows"] for row in tables[RESPONSES])
    assert {f"logits of {name}" for name in models} < set(result["seconds"])


def rows_by_title(entry):
    return {table["title"]: table["rows"] for table in entry["result"]["tables"]}


def test_a_training_step_stands_beside_pytorch(found):
    tables = rows_by_title(found["parts"]["train"])
    ours, theirs = tables["One training step"]
    assert [ours[2], theirs[2]] == ["l2s_jax", "transformers"]
    (row, _) = found["parts"]["train"]["result"]["pairs"]["tiny to tiny"]["rows"]
    assert row["step_ms"] == ours[3] > 0
    speed, utilization = tables["Goals of training"]
    assert speed[2] == pytest.approx(theirs[3] / ours[3])
    assert speed[3] == ("reached" if speed[2] >= 1.3 else "not reached")
    assert utilization[2:] == [None, "not measured"]  # a CPU has no published peak


def test_quality_is_that_of_the_seeds_reports(rehearsed, found):
    tables = rows_by_title(found["parts"]["quality"])
    rows = tables["Quality of each seed"]
    assert [row[:2] for row in rows] == [[0, name] for name in quality.NAMES.values()]
    path = rehearsed / "quality" / "seed0" / "report.json"
    report = json.loads(path.read_text())
    assert found["parts"]["quality"]["result"]["reports"] == {"0": report}
    for name, row in zip(quality.NAMES, rows, strict=True):
        assert row[3] == report["systems"][name]["quality"]["bleu"]
        assert row[6] == report["systems"][name]["latency"]["total_ms"]
    # The mean over one seed is that seed.
    means = tables["Quality, mean over the seeds that have ended"]
    assert [mean[2:9] for mean in means] == [pytest.approx(row[3:10]) for row in rows]
    steps = [row[2] for row in tables["Training of these models"]]
    assert steps == [quality.BRIEF["steps"]] * 3

    # A later call makes nothing again.
    made = path.stat().st_mtime_ns
    assert run("--rehearse", "--parts=quality", f"--output={rehearsed}").returncode == 0
    again = json.loads((rehearsed / "gpu.json").read_text())["parts"]["quality"]
    assert again["result"] == found["parts"]["quality"]["result"]
    assert path.stat().st_mtime_ns == made


def test_the_floor_is_at_the_rate_of_a_large_copy(found):
    rate = found["parts"]["facts"]["result"]["ceilings"]["copy_gb_per_s"]
    result = found["parts"]["serve"]["result"]
    for row, cells in zip(result["rows"], result["tables"][0]["rows"], strict=True):
        times = cells[result["tables"][0]["columns"].index("times the floor")]
        if row["system"] == "hf-llm":
            assert times is None
        else:
            floor = row["bytes_read_per_token"] / rate / 1e6
            assert times == pytest.approx(row["decode_ms_per_token"] / floor)


def test_parts_that_are_not_run_stay(rehearsed, found):
    before = found["parts"]["serve"]
    assert run("--rehearse", "--parts=facts", f"--output={rehearsed}").returncode == 0
    after = json.loads((rehearsed / "gpu.json").read_text())["parts"]
    assert list(after) == list(kit.LIMITS) and after["serve"] == before


def test_who_fails_and_who_is_slow_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    limits = {"nobody": 60.0, "right": 0.1, "facts": 60.0}
    monkeypatch.setattr(kit, "LIMITS", limits)
    assert kit.main(["--rehearse", f"--output={tmp_path}"]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["facts"]["status"] == "ok"
    assert parts["right"]["status"] == "stopped at its limit of 0.4 s"
    assert parts["nobody"]["status"].startswith("failed (1): ")
    assert "benchmarks.gpu.nobody" in parts["nobody"]["status"]
    text = (tmp_path / "gpu.md").read_text()
    assert "Stopped at its limit of 0.4 s." in text and "### Ceilings" in text


def test_time_that_is_over_is_said(tmp_path):
    assert kit.main(["--rehearse", "--limit_s=6", f"--output={tmp_path}"]) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {entry["status"] for entry in parts.values()} == {"not run: no time was left"}
    assert list(parts) == list(kit.LIMITS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "JAX runs on 'cpu' here, expected a GPU; --rehearse runs on a CPU"),
        (["--rehearse", "--parts=facts,all"], "no 'all', expected some of facts, right, serve"),
        (["--rehearse", "--output=README.md"], "--output=README.md: "),
        (["--rehearse", "--limit_s=0"], "'0': expected a number of seconds above 0"),
        (["--rehearse", "--limit_s=soon"], "'soon': expected a number of seconds above 0"),
        (["--rehearsal"], "--rehearsal"),
    ],
)
def test_bad_input(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    if arguments:
        with pytest.raises(SystemExit) as ended:
            kit.main(arguments)
        status, said = ended.value.code, capsys.readouterr().err
    else:  # as people start it
        finished = run()
        status, said = finished.returncode, finished.stderr
    assert status == 2
    (line,) = said.splitlines()
    assert line.startswith("error:") and message in line


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kit, "NEEDED", ("jax", "no_such_package", "no_such_folder.package"))
    with pytest.raises(SystemExit) as ended:
        kit.main(["--rehearse", f"--output={tmp_path}"])
    assert ended.value.code == 2
    assert "missing packages: no_such_package, no_such_folder.package;" in capsys.readouterr().err


@pytest.mark.parametrize("name", kit.LIMITS)
def test_a_part_by_itself_says_that_there_is_no_accelerator(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, f"--output={tmp_path / 'x.json'}"])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # as the part sets it
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: JAX sees no accelerator here")
    assert not list(tmp_path.iterdir())


# A process with each value of XLA_FLAGS, all from one that has imported JAX; how each ends.
FLAGS = """
import os, sys
import jax
for flags in sys.argv[1:]:
    if not (child := os.fork()):
        os.environ["XLA_FLAGS"] = flags
        jax.devices()
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_the_installed_xla_knows_the_flags_that_are_tried():
    # A flag that stands alone in the environment may take several values: each is tried by itself.
    flags = sorted({word for value in CANDIDATES.values() for word in value.split()})
    # What it does not know ends a process, so that the others could have failed.
    command = [sys.executable, "-c", FLAGS, *flags, "--xla_gpu_no_such_flag=1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    *known, unknown = map(int, finished.stdout.split())
    assert known == [0] * len(flags), finished.stderr
    assert unknown != 0


def test_published_figures_stand_beside_the_same_batch():
    row = {"system": "l2s", "batch_size": 64, "total_ms": 113.7}
    runs = [
        (Run("flan-t5-xl", "t5-base", (64,), (128,), ("l2s",)), row),
        (Run("flan-t5-xl", "t5-base", (63,), (128,), ("l2s",)), {**row, "batch_size": 63}),
        (Run("t5-large", "t5-small", (64,), (64,), ("l2s",)), row),
    ]
    expected = ["flan-t5-xl to t5-base", "l2s", 64, 113.7, 1137.0, pytest.approx(10)]
    assert serve.beside_tensorrt_llm(runs) == [expected]


def test_exact_decoding_stands_beside_the_llm_of_the_same_case():
    first = Run("t5-large", "t5-small", (1, 8), (64,), exact.OURS, acceptance=0.8)
    second = Run("t5-large", "t5-small", (1,), (64,), exact.OURS, acceptance=0.6)
    assert first.name != second.name and "--acceptance=0.6" in second.command("x.json", "float32")

    def row(system, batch_size, total_ms):
        case = {"batch_size": batch_size, "prompt_tokens": 128, "new_tokens": 64}
        return {"system": system, "total_ms": total_ms, **case}

    rows = [
        (first, row("llm", 1, 100.0)),
        (first, row("exact", 1, 40.0)),
        (first, row("exact", 8, 300.0)),  # the LLM of eight rows was not measured
        (second, row("exact", 1, 50.0)),
        (second, row("llm", 1, 75.0)),
    ]
    found = [(made[1], made[5], made[-1]) for made in exact.beside_llm(rows)]
    drafted = "LLM, drafted by L2S"
    assert found == [(0.8, "LLM", 1), (0.8, drafted, 2.5), (0.6, drafted, 1.5), (0.6, "LLM", 1)]


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("l2s_jax: XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("l2s_jax: its loss is nan", False),
    ],
)
def test_a_card_that_is_too_small_is_told_from_a_failure(problem, expected):
    assert part.too_large(problem) == expected


def test_a_result_is_whole_after_every_table(tmp_path):
    result = part.Result(str(tmp_path / "x.json"))
    result.table("A", ("x", "y"), [(1, float("nan"))])
    result.skip("B", "too large")
    result.table("A", ("x", "y"), [(2, None)], "again")
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "tables": [{"title": "A", "columns": ["x", "y"], "rows": [[2, None]], "note": "again"}],
        "skipped": {"B": "too large"},
    }
    entry = {"status": "ok", "seconds": 1.0, "result": {"tables": result._tables}}
    text = report.markdown({"facts": entry}, False, str(tmp_path))
    assert "| 2 |  |" in text and "| ---: | ---: |".replace(" ", "") in text.replace(" ", "")
