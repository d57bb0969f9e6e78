"""The report's files: exact numbers in JSON, a readable page, a plot whose labels never collide."""

import copy
import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from matplotlib.offsetbox import AnnotationBbox
from matplotlib.transforms import Bbox

from l2s_jax.evaluation import report as reporting

KEYS = ("llm", "slm", "l2s", "l2s_mismatched")
FILES = ["quality_latency.png", "quality_latency.svg", "report.json", "report.md"]


def latency(batch_size, decode_ms, encode_ms):
    return {
        "batch_size": batch_size, "prompt_tokens": 16, "new_tokens": 32, "encode_ms": encode_ms,
        "prefill_ms": 0.5, "decode_ms_per_token": decode_ms, "compile_s": 7.84,
        "total_ms": encode_ms + 0.5 + 32 * decode_ms,
    }  # fmt: skip


def make_report(quality=(35.512345678901234, 28.4, 35.1, 0.7), metric="bleu"):
    decode, encode = (4.1, 0.95, 0.96, 0.96), (3.2, 0.4, 3.3, 3.3)
    systems = {
        key: {
            "description": f"the {key} | system",
            "params": 48_123_456,
            "params_read_per_token": 4_012_345,
            "quality": {"chrf": 50.0, metric: quality[i]},
            "cut_share": 0.0123,
            "latency": latency(1, decode[i], encode[i]),
            "latency_batch": latency(16, 3 * decode[i], 8 * encode[i]),
        }
        for i, key in enumerate(KEYS)
    }
    return {
        "task": {
            "name": "multi30k_en_de", "split": "test", "examples": 1000, "metric": metric,
            "metric_signatures": {metric: "nrefs:1|case:mixed"}, "labels": "llm",
        },
        "systems": systems,
        "l2s_vs_llm": reporting.compare(systems, metric),
        "environment": {
            "device": "a CPU", "dtype": "float32", "encoder_dtype": "bfloat16",
            "versions": {"jax": "0.10", "flax": "0.12"},
        },
    }  # fmt: skip


def with_differences(report):
    found = {"low": -1.25, "high": 0.5, "p": 0.15284, "test": "how"}
    report["significance"] = {
        "l2s_vs_llm": {"bleu": {"difference": -0.412, **found}},
        "l2s_mismatched_vs_l2s": {
            "bleu": {"difference": 34.4, **found},
            "chrf": {"difference": 0.0, **found, "p": 0.00099},
        },
    }
    return report


def table_rows(page, first_cell):
    lines = [line for line in page.splitlines() if line.startswith(f"| {first_cell} ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_all_files_are_written_and_no_other(tmp_path):
    directory = tmp_path / "new" / "run"
    reporting.write_report(make_report(), str(directory))
    reporting.write_report(make_report(), str(directory))
    assert sorted(path.name for path in directory.iterdir()) == FILES
    assert imread(directory / "quality_latency.png").shape[:2] == (1125, 2000)
    assert "<svg" in (directory / "quality_latency.svg").read_text()


def test_same_report_same_bytes(tmp_path):
    for name in ("a", "b"):
        reporting.write_report(make_report(), str(tmp_path / name))
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_json_keeps_numbers_in_full_and_turns_what_is_not_finite_into_null(tmp_path):
    report = make_report()
    report["systems"]["slm"]["quality"]["bleu"] = np.float32(28.4)
    report["systems"]["slm"]["params"] = np.int64(2**40 + 1)
    report["systems"]["slm"]["quality"]["chrf"] = math.nan
    report["systems"]["slm"]["latency"]["encode_ms"] = None
    reporting.write_report(report, str(tmp_path))
    text = (tmp_path / "report.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["systems"]["slm"]["quality"] == {"chrf": None, "bleu": float(np.float32(28.4))}
    assert read["systems"]["slm"]["params"] == 2**40 + 1
    for key in ("llm", "l2s", "l2s_mismatched"):
        assert read["systems"][key] == report["systems"][key]
    assert read["l2s_vs_llm"] == report["l2s_vs_llm"]


def test_compare():
    systems = make_report()["systems"]
    ratios = reporting.compare(systems, "bleu")
    assert ratios == pytest.approx({
        "quality_ratio": 35.1 / 35.512345678901234,
        "speedup": (3.2 + 0.5 + 32 * 4.1) / (3.3 + 0.5 + 32 * 0.96),
        "decode_speedup": 4.1 / 0.96,
        "speedup_batch": (25.6 + 0.5 + 96 * 4.1) / (26.4 + 0.5 + 96 * 0.96),
    })  # fmt: skip
    systems["llm"]["quality"]["bleu"] = 0.0
    assert math.isnan(reporting.compare(systems, "bleu")["quality_ratio"])


def test_page_states_the_finding_and_rounds(tmp_path):
    reporting.write_report(make_report(), str(tmp_path))
    page = (tmp_path / "report.md").read_text()
    assert (
        "**L2S keeps 98.8% of the LLM's BLEU at 3.91× the speed (35.1 against 35.5); the SLM alone "  # noqa: RUF001
        "reaches 28.4, 6.7 points below L2S; fed another prompt's representations, L2S collapses "
        "to 0.7.**"
    ) in page
    assert "![Quality against latency of each system](quality_latency.png)" in page
    main, first, larger = table_rows(page, "L2S")
    assert main == ["L2S", "48.1M", "4.01M", "35.1", "50.0", "1.2%", "0.96", "34.5", "3.91×"]  # noqa: RUF001
    assert first == ["L2S", "16", "32", "3.30", "0.50", "0.96", "34.5", "3.91×", "7.8"]  # noqa: RUF001
    assert larger == ["L2S", "16", "32", "26.4", "0.50", "2.88", "119", "3.53×", "7.8"]  # noqa: RUF001
    assert "- **L2S**: the l2s | system" in page and "responses that the LLM generated" in page
    assert "- BLEU: `nrefs:1|case:mixed`" in page
    assert "Products are in float32, the LLM of L2S in bfloat16." in page
    assert table_rows(page, "versions")[0][1] == "jax 0.10, flax 0.12"


def test_a_token_that_takes_no_time_is_said_to_be_noise(tmp_path):
    report = make_report()
    report["systems"]["l2s"]["latency"]["decode_ms_per_token"] = 0.0
    report["l2s_vs_llm"] = reporting.compare(report["systems"], "bleu")
    reporting.write_report(report, str(tmp_path))
    page = (tmp_path / "report.md").read_text()
    assert "What L2S takes for a token is lost in noise" in page
    assert "decodes a token" not in page and "A whole request is 3.91 times as fast" in page


def test_page_has_the_differences_and_what_chance_says_of_them(tmp_path):
    reporting.write_report(with_differences(make_report()), str(tmp_path))
    page = (tmp_path / "report.md").read_text()
    assert table_rows(page, "L2S less LLM") == [
        ["L2S less LLM", "BLEU", "-0.4", "-1.2 to +0.5", "0.153"]
    ]
    rows = table_rows(page, "L2S, mismatched less L2S")
    assert [row[1:3] + row[4:] for row in rows] == [
        ["BLEU", "+34.4", "0.153"],
        ["chrF", "+0.0", "below 0.001"],
    ]
    assert "*p* is how likely a difference of this size is" in page


def test_a_report_of_before_the_tests_of_differences_is_whole(tmp_path):
    reporting.write_report(make_report(), str(tmp_path))
    page = (tmp_path / "report.md").read_text()
    assert "*p*" not in page and "## Differences" not in page


def test_every_table_is_rectangular(tmp_path):
    report = with_differences(make_report())
    report["environment"]["note"] = "a | b\nc"
    del report["systems"]["slm"]["quality"]["chrf"]
    reporting.write_report(report, str(tmp_path))
    blocks = re.findall(r"(?:^\|.*\n?)+", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert len(blocks) == 5
    for block in blocks:
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.parametrize(
    ("quality", "parts"),
    [
        ((30.0, 31.0, 30.3, 1.0), ["reaches 101.0%", "0.7 points above L2S"]),
        ((30.0, 20.0, 30.0, 29.0), ["keeps 100.0%", "does not collapse but reaches 29.0"]),
        ((0.0, 0.0, 0.0, 0.0), ["scores no BLEU", "does not collapse but reaches 0.0"]),
    ],
)
def test_the_finding_stays_true_when_the_result_is_not_the_hoped_for(tmp_path, quality, parts):
    reporting.write_report(make_report(quality), str(tmp_path))
    page = (tmp_path / "report.md").read_text()
    assert all(part in page for part in parts)


def leaf_paths(value, prefix=()):
    for key in value:
        yield (*prefix, key)
        if isinstance(value[key], dict) and key not in ("versions", "metric_signatures"):
            yield from leaf_paths(value[key], (*prefix, key))


OPTIONAL = {("systems", key, "quality", "chrf") for key in KEYS}
OPTIONAL.add(("environment", "versions"))
REQUIRED = [path for path in leaf_paths(make_report()) if path not in OPTIONAL]


@pytest.mark.parametrize("path", REQUIRED, ids=".".join)
def test_every_missing_key_is_named(tmp_path, path):
    report = copy.deepcopy(make_report())
    parent = report
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    with pytest.raises(ValueError, match=re.escape(f"missing key report.{'.'.join(path)}:")) as e:
        reporting.write_report(report, str(tmp_path / "out"))
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("systems", "slm", "quality", "bleu"), math.nan),
        (("systems", "slm", "quality", "chrf"), "high"),
        (("systems", "l2s", "latency", "total_ms"), 0.0),
        (("systems", "l2s", "latency_batch", "total_ms"), None),
        (("systems", "llm", "params"), True),
        (("systems", "llm", "quality"), [1.0]),
        (("l2s_vs_llm", "speedup"), "fast"),
        (("task", "examples"), None),
        (("environment", "device"), object),
        (("significance",), [1]),
        (("significance", "l2s_vs_llm"), None),
        (("significance", "l2s_vs_llm", "bleu", "p"), math.nan),
        (("significance", "l2s_vs_llm", "bleu", "difference"), "more"),
    ],
)
def test_unusable_values_are_named(tmp_path, path, value):
    report = with_differences(make_report())
    parent = report
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(f"report.{'.'.join(path)} is ")) as error:
        reporting.write_report(report, str(tmp_path / "out"))
    assert "expected" in str(error.value) and not (tmp_path / "out").exists()


def plot_boxes(figure):
    """Pixel boxes of the labels by system, and of the markers."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    labels = {
        artist.get_gid(): artist.get_window_extent(renderer)
        for artist in axes.artists
        if isinstance(artist, AnnotationBbox)
    }
    radius = 7 * figure.dpi / 72
    markers = []
    for line in axes.lines:
        if line.get_marker() == "o":
            ((x, y),) = axes.transData.transform(line.get_xydata())
            markers.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
    return labels, markers


@settings(max_examples=25, deadline=None)
@given(
    quality=st.lists(st.sampled_from([0.0, 0.7, 30, 34, 35, 35.2, 99]), min_size=4, max_size=4),
    total_ms=st.lists(st.sampled_from([9.5, 10, 10.1, 12, 40, 3000]), min_size=3, max_size=3),
    metric=st.sampled_from(["bleu", "rougeLsum", "exact_match"]),
)
def test_labels_overlap_no_label_and_no_marker_and_stay_inside(quality, total_ms, metric):
    report = make_report(quality, metric)
    for key, value in zip(KEYS, (*total_ms, total_ms[-1]), strict=True):
        report["systems"][key]["latency"]["total_ms"] = value
    report["l2s_vs_llm"]["quality_ratio"] = 1.2
    figure = reporting.quality_latency_figure(report)
    labels, markers = plot_boxes(figure)
    assert sorted(labels) == sorted(KEYS) and len(markers) == 4
    for first, second in itertools.combinations(labels.values(), 2):
        assert not first.overlaps(second)
    for label in labels.values():
        assert not label.count_overlaps(markers)
        assert figure.bbox.containsx(label.x0) and figure.bbox.containsx(label.x1)
        assert figure.axes[0].bbox.y0 <= label.y0 and label.y1 <= figure.axes[0].bbox.y1
    for text in figure.texts:
        assert text.get_window_extent().x1 <= figure.bbox.x1


def test_plot_shows_the_numbers_of_the_report_and_no_legend():
    report = make_report()
    (axes,) = reporting.quality_latency_figure(report).axes
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    systems = report["systems"].values()
    assert points == [(s["latency"]["total_ms"], s["quality"]["bleu"]) for s in systems]
    assert axes.get_legend() is None and axes.get_xscale() == "linear"
    report["systems"]["llm"]["latency"]["total_ms"] = 5000.0
    assert reporting.quality_latency_figure(report).axes[0].get_xscale() == "log"


def test_text_with_markup_is_drawn_as_it_is(tmp_path):
    report = make_report()
    report["task"]["name"] = r"cost in $ and \frac{ $"
    reporting.write_report(report, str(tmp_path))
    assert (tmp_path / "quality_latency.png").exists()
