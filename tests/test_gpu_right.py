"""The part *right* of the GPU kit: that it tells what is wrong. test_gpu_kit.py rehearses it."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks.gpu import part, right
from benchmarks.gpu.right_checks import Difference, differences, draw_prompts
from benchmarks.gpu.right_reference import Reference, model_configs
from benchmarks.gpu.right_tables import COMPANY, LOGITS, PARTED, PRODUCTS, RESPONSES
from l2s_jax.checkpoints.pretrained import load_hf
from l2s_jax.decoding.engine import jitted_decode

SIZE = right.REHEARSAL
MODELS = ["T5 v1.0", "Flan-T5", "GPT-2", "GPT-NeoX", "Llama", "Qwen3"]


def read(path):
    """(table by title: a dict per row, all else)."""
    content = json.loads(path.read_text())
    tables = {
        table["title"]: [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        for table in content["tables"]
    }
    return tables, content


def test_a_wrong_weight_is_a_failure(tmp_path, capsys):
    def wrong(directory):
        module, params = load_hf(directory)
        params["decoder"]["layers_0"]["cross_attention"]["value"]["kernel"][0] *= 3
        return module, params

    size = dataclasses.replace(SIZE, searched=("T5 v1.0",), in_company=())
    result = part.Result(str(tmp_path / "right.json"))
    failures = right.run(result, size, models=["T5 v1.0"], load=wrong)
    assert part.finish(result, failures) == 1
    assert capsys.readouterr().err.startswith("error: logits of T5 v1.0: float32 differs by ")
    tables, _ = read(tmp_path / "right.json")
    assert [row["holds"] for row in tables[LOGITS]] == ["no"]
    assert tables[LOGITS][0]["float32: largest difference"] > 1e-4
    assert [row["holds"] for row in tables[RESPONSES]] == ["no", "no"]
    faults = [row for row in tables[PARTED] if row["verdict"] == "fault"]
    assert len(faults) == sum(row["differ"] - row["ties"] for row in tables[RESPONSES]) > 0


def test_a_mask_that_is_not_looked_at_is_a_failure(tmp_path, capsys):
    def maskless(system, params, frozen, ids, mask, *args, **kwargs):
        return jitted_decode(system, params, frozen, ids, np.ones_like(mask), *args, **kwargs)

    size = dataclasses.replace(SIZE, searched=(), in_company=("Flan-T5",))
    result = part.Result(str(tmp_path / "right.json"))
    failures = right.run(result, size, models=["Flan-T5"], program=maskless)
    assert part.finish(result, failures) == 1
    assert "error: Flan-T5 in float32, padded on the left and alone" in capsys.readouterr().err
    tables, _ = read(tmp_path / "right.json")
    for row in tables[COMPANY]:
        padded = row["run"].startswith("padded")
        assert row["holds"] == ("no" if padded else "yes")
        # A token of padding more changes a logit by far more than rounding does.
        assert not padded or row["largest gap"] > row["tie up to"]


def test_a_check_that_fails_does_not_end_the_others(tmp_path):
    def unreadable(directory):
        raise ValueError(f"{directory}: nothing\nto read")

    result = part.Result(str(tmp_path / "right.json"))
    failures = right.run(result, SIZE, models=["GPT-2", "Llama"], load=unreadable)
    assert [failure.split(":")[0] for failure in failures] == [
        "checkpoint of GPT-2",
        "checkpoint of Llama",
    ]
    assert not any("\n" in failure for failure in failures)
    tables, content = read(tmp_path / "right.json")
    assert len(tables[PRODUCTS]) == 2 and "unreadable" in str(content["tracebacks"])


def test_what_there_is_no_time_for_is_named(tmp_path):
    result = part.Result(str(tmp_path / "right.json"))
    assert right.run(result, SIZE, limit_s=-1.0) == []
    _, content = read(tmp_path / "right.json")
    assert {f"checkpoint of {name}" for name in MODELS} < set(content["skipped"])


def test_where_two_outputs_part():
    one = np.array([[3, 1, 0], [2, 2, 2]])
    other = np.array([[3, 1, 0], [2, 0, 1]])
    logits = np.zeros((2, 3, 4), np.float32)
    logits[1, 1] = [0.5, 3.0, 2.0, -1.0]
    assert differences(one, one, logits) == []
    # The best is a token that neither says.
    assert differences(one, other, logits) == [Difference(row=1, step=1, margin=1.0, gap=2.5)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt2")
    return Reference(model_configs(SIZE)["GPT-2"], str(directory), "cpu")


def test_a_tie_of_beams_is_told_from_a_fault(reference):
    prompts = draw_prompts(SIZE, "left")
    row = prompts.row(2)
    tokens, _ = reference.generate(row, SIZE.new, num_beams=4, eos_id=1)
    settings = {"num_beams": 4, "eos_id": 1, "draws": 8}
    assert reference.may_say(row, tokens[0], rounding=1e-6, **settings)
    other = np.where(np.arange(SIZE.new) == 1, tokens[0] + 1, tokens[0])
    assert not reference.may_say(row, other, rounding=1e-6, **settings)
    # Logits that are moved enough let it say something else.
    moved, _ = reference.generate(row, SIZE.new, num_beams=4, eos_id=1, rounding=5.0)
    assert (moved != tokens).any()
    assert reference.may_say(row, moved[0], rounding=5.0, **(settings | {"draws": 1}))


def test_prompts_are_padded_as_asked():
    for side, last, first in (("left", True, False), ("right", False, True)):
        mask = draw_prompts(SIZE, side).mask
        lengths = mask.sum(1)
        assert len(set(lengths)) > 1 and lengths.min() >= SIZE.prompt // 2
        assert mask[:, -1].all() == last and mask[:, 0].all() == first
    both = draw_prompts(SIZE, "both").mask
    assert both[2::3].all() and not both[0::3].all() and not both[1::3].all()
    assert jax.tree.map(np.shape, draw_prompts(SIZE, "both")) == ((6, 8), (6, 8))
