"""Settings: each within its range, all with an effect, and one line for what is not."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import re
import subprocess
import sys
from typing import Any
from unittest import mock

import hypothesis
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from l2s_jax.cluster.sharding import AXES
from l2s_jax.config import (
    buckets_of,
    default,
    label_tokens,
    mesh_sizes,
    model_config,
    naming_mesh,
    of_settings,
    settled,
    typed,
)
from l2s_jax.data.tasks import BLANK_ROWS, SOURCES, SPLITS
from l2s_jax.evaluation import metrics
from l2s_jax.experiment.workdir import read_config, write_config
from l2s_jax.models import t5_layers
from l2s_jax.models.families import CONFIGS, make_config
from l2s_jax.models.l2s import FUSIONS
from l2s_jax.models.serving import WEIGHTS
from l2s_jax.serving.loading import generator_settings
from l2s_jax.settings import rules
from l2s_jax.settings.declare import Section, flat, read, setting
from l2s_jax.settings.describe import describe
from l2s_jax.settings.geometry import FAMILIES, MODELS
from l2s_jax.settings.sections import Settings
from l2s_jax.settings.training import Lora, Train
from l2s_jax.tokenizers import sentencepiece
from l2s_jax.training import optim

UNTIMED = hypothesis.settings(deadline=None)
KEYS = {key.key: key for key in describe()}
OF_T5 = sorted(flat(Settings()))


def put(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`values` with another one at a dotted key."""
    *path, name = key.split(".")
    inner = values
    for part in path:
        inner = inner[part]
    inner[name] = value
    return values


def usable() -> ConfigDict:
    """A config that a run could use."""
    config = default()
    config.task.splits.update(train="a", validation="b", test="c")
    config.tokenizer.train_vocab_size = 100
    config.llm.train.steps = 5
    return config


def test_every_key_is_described():
    values = default().to_dict()
    assert set(OF_T5) <= set(KEYS)
    assert set(KEYS) - set(OF_T5) == {
        f"{name}.model.{key}"
        for name in ("llm", "slm")
        for key in ("num_layers", "max_positions", "num_kv_heads")
    }
    for name, key in KEYS.items():
        assert key.meaning.endswith((".", ")")) and key.allowed and key.type, name
        if name in OF_T5:
            assert put(values, name, key.default) == default().to_dict()
    assert KEYS["llm.model.num_layers"].meaning == "Layers. (gpt2, gpt_neox, llama)"
    assert KEYS["l2s.train.steps"].default == 1000 and KEYS["llm.train.steps"].default == 0
    assert [key.key for key in describe(Lora(), "slm.lora.")] == [
        "slm.lora.rank",
        "slm.lora.alpha",
        "slm.lora.pattern",
    ]


def test_choices_are_those_that_the_code_offers():
    for key, choices in {
        "evaluation.metrics": metrics.METRICS,
        "evaluation.split": SPLITS,
        "task.source": SOURCES,
        "task.blank_rows": BLANK_ROWS,
        "l2s.fusion": FUSIONS,
        "decoding.weights": WEIGHTS,
        "l2s.train.optimizer": tuple(optim.OPTIMIZERS),
        "l2s.train.schedule": tuple(optim.SCHEDULES),
        "tokenizer.model_type": sentencepiece.MODEL_TYPES,
        "llm.model.activation": tuple(t5_layers.ACTIVATIONS),
        "llm.model.family": tuple(CONFIGS),
    }.items():
        assert KEYS[key].allowed.endswith(f" of {choices}"), key
    slices = {"slices", "process_is_granule"}
    assert set(flat(Settings().mesh)) - slices == set(AXES)
    for section in ("labels", "features", "decoding"):
        assert set(flat(getattr(Settings(), section).mesh)) == set(AXES)


@pytest.mark.parametrize("family", FAMILIES)
def test_geometries_are_those_of_the_families(family):
    geometry = model_config(family).to_dict()
    assert geometry == flat(MODELS[family]())
    made = make_config(geometry.pop("family"), vocab_size=64, pad_id=0, eos_id=1, **geometry)
    assert {name: getattr(made, name) for name in geometry} == geometry


def test_a_config_needs_no_jax():
    code = (
        "import sys, l2s_jax.config as c; c.settled(c.default()); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_has_no_other_keys():
    config = default()
    for section in (config, config.l2s.train, config.decoding.search, model_config("gpt2")):
        with pytest.raises(AttributeError, match="stepz"):
            section.stepz = 3
        with pytest.raises(KeyError, match="stepz"):
            section.update(stepz=3)
    config.task.splits.update(train="a")
    with pytest.raises(ValueError, match=r"model.family='rwkv': expected one of \('t5', 'gpt2'"):
        model_config("rwkv")


values_of_any_kind = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["llm", "float16", "int8", "gpt2", 10**400, -1, 0, 1, ("bleu",), ((8, 8),)]),
    st.lists(st.integers(-1, 9) | st.text(max_size=2), max_size=3),
    st.lists(st.tuples(st.text(max_size=3), st.integers(-1, 9)), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.lists(st.none() | st.dictionaries(st.text(max_size=3), st.integers()), max_size=2),
)


@UNTIMED
@given(key=st.sampled_from(OF_T5), value=values_of_any_kind)
def test_a_value_is_taken_or_refused_in_a_line_that_names_it(key, value):
    values = put(default().to_dict(), key, value)
    try:
        settings = read(Settings, values, "config")
    except ValueError as error:
        line = str(error)
        # A value that fits may still not go with another one, of which the line is then about.
        section = key.rpartition(".")[0]
        assert line.startswith((f"config.{key}={value!r}", f"config.{section}".rstrip("."))), line
        assert "expected" in line or "float16" in line or "no such setting" in line
        assert "\n" not in line
        return
    found = flat(settings)[key]
    assert type(found) is type(KEYS[key].default)
    # One stop text may be given by itself, and lists become tuples.
    assert found in (value, (value,)) or json.dumps(found) == json.dumps(value)
    assert typed(of_settings(settings)) == settings


@UNTIMED
@given(st.data())
def test_what_is_out_of_range_is_refused_in_a_line_that_names_it(data):
    key = data.draw(st.sampled_from([k for k in OF_T5 if k.partition(".")[0] != "task"]))
    default_value = KEYS[key].default
    wrong = data.draw(
        {
            bool: st.integers() | st.text(),
            int: st.integers(max_value=-2) | st.floats() | st.booleans() | st.text(),
            float: st.sampled_from([math.nan, math.inf, -math.inf, "1", None, True]),
            str: st.integers() | st.none() | st.lists(st.text()),
            tuple: st.integers() | st.text() | st.lists(st.integers(max_value=-1), min_size=1),
        }[type(default_value)]
    )
    if key.endswith("search.stop"):
        wrong = [3]
    with pytest.raises(ValueError) as error:
        read(Settings, put(default().to_dict(), key, wrong), "config")
    assert str(error.value).startswith(f"config.{key}=")
    assert str(error.value).endswith(f"expected {KEYS[key].allowed}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "x.stepz: no such setting, did you mean 'steps'?"),
        ({"accumulation": 3}, "x.batch_size=64: expected a multiple of accumulation=3"),
        ({"select": "first"}, "x.select='first': expected one of ('best', 'quality', 'last')"),
        ({"schedule": "linear"}, "x.schedule='linear': expected one of ('cosine', 'inverse_sqrt'"),
        ({"label_smoothing": 1}, "x.label_smoothing=1: expected a number >= 0, below 1"),
        (
            {"trainable": ("a(",)},
            "x.trainable=('a(',): 'a(' is not a regular expression: missing )",
        ),
        ({"trainable": (3,)}, "x.trainable=(3,): 3 is no pattern, but a int; expected a tuple of"),
        ({"trainable": "a.*"}, "x.trainable='a.*': expected a tuple of patterns"),
        ({"learning_rate_scales": ("a", 2.0)}, "expected pairs of a pattern and a factor"),
        ({"learning_rate_scales": (("a", 1.0, 2.0),)}, "expected pairs of a pattern and a factor"),
        ({"learning_rate_scales": (("*", 1.0),)}, "'*' is not a regular expression"),
        ({"learning_rate_scales": (("a", "2"),)}, "the factor of 'a' is '2'; expected pairs"),
        ({"learning_rate_scales": (("a", -2.0),)}, "the factor of 'a' is -2.0"),
        ({"learning_rate_scales": (("a", math.nan),)}, "the factor of 'a' is nan"),
    ],
)
def test_impossible_trainings_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        read(Train, dataclasses.asdict(Train(steps=4)) | changes, "x")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l2s.lora.rank": -1}, "config.l2s.lora.rank=-1: expected an integer >= 0"),
        ({"l2s.lora.alpha": 0.0}, "config.l2s.lora.alpha=0.0: expected a number above 0"),
        ({"slm.lora.pattern": "("}, "config.slm.lora.pattern='(': '(' is not a regular expression"),
        (
            {"slm.lora.rank": 2},
            "config.slm.lora.rank=2 with train.parameter_scale=True: expected F",
        ),
        ({"llm.layer": 3.0}, "config.llm.layer=3: expected 0, the encoder of a T5"),
        (
            {"slm.model.family": "gpt2"},
            "config.slm.model.family='gpt2' with activation, head_width",
        ),
        (
            {"buckets": ((16, 16),)},
            "config.buckets=((16, 16),): expected the last to hold max_promp",
        ),
        ({"buckets": ((256, 9), (128, 256))}, "expected both sizes to ascend"),
        ({"buckets": ((128, 128), (128, 128))}, "expected both sizes to ascend"),
        ({"buckets": ()}, "config.buckets=(): expected pairs of prompt tokens and response tokens"),
        ({"evaluation.metrics": ()}, "config.evaluation.metrics=(): expected some of ('bleu'"),
        ({"evaluation.metrics": ("bleurt",)}, "config.evaluation.metrics=('bleurt',): expected"),
        ({"dtype": "float16"}, "config.dtype='float16': T5 overflows in it; use 'bfloat16' or"),
        ({"labels": "llm"}, "config.labels='llm': expected a section of settings"),
        ({"mesh.data": 0}, "config.mesh.data=0: expected an integer >= 1, or -1"),
        (
            {"task.prompt": "\ud83d {a}"},
            "config.task.prompt='\\ud83d {a}': expected a text of whole",
        ),
        ({"seed": True}, "config.seed=True: expected an integer >= 0"),
        *(
            (
                {f"{name}.batch_size": 10**6},
                f"config.{name}.batch_size=1000000: expected an integer",
            )
            for name in ("llm.train", "labels", "distillation", "decoding", "evaluation.latency")
        ),
        (
            {"max_prompt_tokens": 2**21},
            "config.max_prompt_tokens=2097152: expected an integer >= 1",
        ),
        ({"seed": 2**32}, "config.seed=4294967296: it does not fit into 32 bits; expected an i"),
        (
            {"evaluation.metrics": ("comet",)},
            "config.evaluation.comet='' with metrics=('comet',): expected the folder of a checkpo",
        ),
    ],
)
def test_values_that_no_run_could_use_are_refused(changes, message):
    values = default().to_dict()
    for key, value in changes.items():
        put(values, key, value)
    with pytest.raises(ValueError) as error:
        read(Settings, values, "config")
    assert str(error.value).startswith(message) or message in str(error.value)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("gpt2", {"num_heads": 7}, "m.width=512: expected a multiple of num_heads=7"),
        ("gpt_neox", {"width": 65}, "m.width=65: expected a multiple of num_heads=8"),
        ("gpt_neox", {"width": 32}, "m.width=32: expected at least 8 for each of num_heads=8"),
        ("llama", {"head_width": 7}, "m.head_width=7: expected an even integer >= 2"),
        ("t5", {"num_buckets": 256}, "m.max_distance=128: expected more than half of num_buckets="),
        ("llama", {"num_kv_heads": 3}, "m.num_heads=8: expected a multiple of num_kv_heads=3"),
    ],
)
def test_heads_that_do_not_divide_are_refused(section, changes, message):
    with pytest.raises(ValueError) as error:
        read(MODELS[section], model_config(section).to_dict() | changes, "m")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm.train.steps": 0}, "config.llm: expected a path (a Hugging Face directory) or train"),
        ({"tokenizer.train_vocab_size": 0}, "config.tokenizer.train_vocab_size=0: expected a size"),
        (
            {"l2s.fusion": "cross", "slm.model": model_config("gpt2").to_dict()},
            "config.l2s.fusion='cross' with config.slm.model.family='gpt2': it has no cross-atten",
        ),
        (
            {"llm.path": "x", "llm.layer": 2.0, "l2s.layers": ((2, 3),)},
            "config.llm.layer=2 with config.l2s.layers=((2, 3),): H is that of the layers there, ",
        ),
        (
            {"llm.tune.rank": 2, "l2s.lora.rank": 4, "l2s.train.parameter_scale": False},
            "config.llm.tune.rank=2 with config.l2s.lora.rank=4: the second stage trains the whole",
        ),
        (
            {"llm.tune.rank": 2},
            "config.llm.tune.rank=2 with config.l2s.train.parameter_scale=True: expected False",
        ),
        (
            {"decoding.batch_size": 2**16, "decoding.max_new_tokens": 2**10},
            "config.decoding.batch_size=65536: 75497472 tokens, expected at most 67108864",
        ),
        *(
            ({f"{name}.batch_size": 2**16, "max_prompt_tokens": 2**10, "buckets": ((2**10, 128),)},
             f"config.{name}.batch_size=65536: 75497472 tokens, expected at most 67108864")
            for name in ("llm.train", "slm.train", "l2s.train", "labels", "distillation")
        ),
        ({"task.splits": {}}, "config.task.splits has none: expected 'train' too"),
        (
            {"task.splits": {"train": "a", "validation": "b"}},
            "config.task.splits has train, validation: expected 'test' too",
        ),
    ],
)  # fmt: skip
def test_settings_that_leave_a_run_without_something_are_refused(changes, message):
    rules.check(typed(usable()))
    values = usable().to_dict()
    for key, value in changes.items():
        put(values, key, value)
    with pytest.raises(ValueError) as error:
        rules.check(read(Settings, values, "config"))
    assert str(error.value).startswith(message)


# (turned off by, at this value; without effect then, changed to this; why).
WITHOUT_EFFECT = [
    ("task.source", "jsonl", "task.tfds_name", "mnist", "tensorflow-datasets"),
    ("tokenizer.train_vocab_size", 0, "tokenizer.model_type", "bpe", "no tokenizer is trained"),
    ("slm.tokenizer.train_vocab_size", 0, "slm.tokenizer.model_type", "bpe", "no tokenizer is"),
    ("llm.path", "x", "llm.model.width", 64, "the directory has a geometry of its own"),
    ("slm.path", "x", "slm.model.tied_head", False, "the directory has a geometry of its own"),
    *(
        (f"slm.cut.{key}", value, "slm.model.tied_head", False, "cut out of a checkpoint")
        for key, value in {
            "num_layers": 2,
            "layers": (0, 2),
            "num_encoder_layers": 2,
            "encoder_layers": (0, 2),
            "num_decoder_layers": 2,
            "decoder_layers": (0, 2),
            "feed_forward_width": 8,
        }.items()
    ),
    ("mesh.slices", 1, "mesh.process_is_granule", True, "all devices are of one slice"),
    ("llm.tune.rank", 0, "llm.tune.steps", 5, "the LLM stays frozen"),
    ("llm.train.steps", 0, "llm.train.learning_rate", 0.5, "the LLM is not trained"),
    ("llm.train.optimizer", "adafactor", "llm.train.adam_b2", 0.9, "only AdamW"),
    ("slm.train.optimizer", "adafactor", "slm.train.adam_b2", 0.9, "only AdamW"),
    ("l2s.train.optimizer", "adafactor", "l2s.train.adam_b2", 0.9, "only AdamW"),
    ("llm.train.schedule", "cosine", "llm.train.timescale", 9, "only inverse_sqrt"),
    ("slm.train.schedule", "constant", "slm.train.timescale", 9, "only inverse_sqrt"),
    ("l2s.train.schedule", "cosine", "l2s.train.timescale", 9, "only inverse_sqrt"),
    ("llm.train.select", "best", "llm.train.selection_examples", 9, "no checkpoint is chosen"),
    ("slm.train.select", "last", "slm.train.selection_examples", 9, "no checkpoint is chosen"),
    ("l2s.train.select", "best", "l2s.train.selection_examples", 9, "no checkpoint is chosen"),
    ("llm.train.steps", 0, "llm.lora.rank", 4, "the LLM is not trained"),
    ("llm.lora.rank", 0, "llm.lora.alpha", 8.0, "there is no LoRA"),
    ("slm.lora.rank", 0, "slm.lora.alpha", 8.0, "there is no LoRA"),
    ("l2s.lora.rank", 0, "l2s.lora.pattern", ".*query/kernel", "there is no LoRA"),
    ("evaluation.metrics", ("chrf",), "evaluation.bleu_tokenizer", "char", "there is no BLEU"),
    ("evaluation.metrics", ("bleu",), "evaluation.comet", "x", "there is no COMET"),
    ("task.chat.user", "", "task.chat.system", "be kind", "there is no chat"),
    ("l2s.fusion", "cross", "l2s.zero_start", True, "nothing but zeros"),
    ("features.cache", "", "features.mesh.tensor", 2, "no features are kept"),
    ("labels.source", "data", "labels.batch_size", 8, "the LLM does not answer"),
    ("labels.source", "data", "labels.search.num_beams", 4, "the LLM does not answer"),
    ("labels.source", "data", "labels.mesh.tensor", 2, "the LLM does not answer"),
    ("distillation.weight", 0.0, "distillation.top_k", 8, "nothing is learnt of distributions"),
    ("distillation.weight", 0.0, "distillation.temperature", 2.0, "nothing is learnt of"),
    ("distillation.weight", 0.0, "distillation.batch_size", 8, "nothing is learnt of"),
    ("distillation.weight", 1.0, "slm.train.label_smoothing", 0.1, "no part of the loss"),
    ("distillation.weight", 1.0, "l2s.train.label_smoothing", 0.1, "no part of the loss"),
]


@pytest.mark.parametrize(("by", "off", "key", "value", "why"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(by, off, key, value, why):
    values = usable().to_dict()
    put(put(values, by, off), key, value)
    line = (
        re.escape(f"config.{key}={value!r}: no effect with config.{by}={off!r}, ")
        + f".*{why}.*; expected its default, "
    )
    with pytest.raises(ValueError, match=line) as error:
        rules.settle(values)
    assert str(error.value).endswith(repr(KEYS[key].default))
    # It is no reason not to read what a run has left.
    assert flat(read(Settings, values, "config"))[key] == value
    assert rules.idle_keys(read(Settings, values, "config"))[key].by == by
    # What the command line turns off takes it along, unless it is given there too.
    settings = rules.settle(values, given=[by])
    assert flat(settings)[key] == KEYS[key].default and flat(settings)[by] == off
    with pytest.raises(ValueError, match=line):
        rules.settle(values, given=[by, key])


def test_the_mesh_of_labels_is_that_of_distributions_too():
    values = usable().to_dict()
    put(put(values, "labels.source", "data"), "labels.mesh.tensor", 2)
    put(values, "distillation.weight", 0.5)
    assert rules.settle(values).labels.mesh.tensor == 2
    put(values, "labels.batch_size", 8)
    with pytest.raises(ValueError, match=r"^config\.labels\.batch_size=8: no effect with"):
        rules.settle(values)


def test_every_rule_is_tried_and_is_about_keys_that_there_are():
    tried = {(by, key) for by, _, key, _, _ in WITHOUT_EFFECT}
    for rule in rules.IDLE:
        assert rule.by in KEYS
        keys = fnmatch.filter(KEYS, rule.keys)
        assert any(rule.by == by and key in keys for by, key in tried), rule


def test_all_that_is_without_effect_is_in_one_line():
    config = usable()
    config.llm.model = model_config("gpt2")
    config.llm.model.update(width=64, max_positions=99)
    config.llm.path = "x"
    with pytest.raises(ValueError) as error:
        settled(config)
    assert str(error.value) == (
        "config.llm.model.family='gpt2', config.llm.model.width=64, "
        "config.llm.model.max_positions=99: no effect with config.llm.path='x', the directory has "
        "a geometry of its own; expected their defaults, 't5', 512, 1024"
    )
    assert settled(config, given=["llm.path"]).llm.model == model_config()


def test_a_search_that_the_command_line_turns_off_takes_its_settings_along():
    config = usable()
    config.decoding.search.update(num_beams=4, length_penalty=0.6)
    assert settled(config) == config
    config.decoding.search.num_beams = 1
    with pytest.raises(ValueError, match=r"config\.decoding\.search\.length_penalty=0\.6 with num"):
        settled(config)
    found = settled(config, given=["decoding.search.num_beams"])
    assert found.decoding.search.length_penalty == 1
    with pytest.raises(ValueError, match=r"config\.decoding\.search\.length_penalty=0\.6 with num"):
        settled(config, ["decoding.search.num_beams", "decoding.search.length_penalty"])


def test_a_run_that_was_made_with_a_setting_without_effect_can_be_read(tmp_path):
    config = usable()
    config.l2s.train.update(optimizer="adafactor", adam_b2=0.9)
    write_config(str(tmp_path), config)
    assert read_config(str(tmp_path)) == config


@pytest.mark.parametrize(
    ("most", "buckets", "expected"),
    [
        ((128, 128), ((128, 128),), ((128, 128),)),
        ((64, 128), ((128, 128),), ((64, 128),)),
        ((64, 32), ((32, 16), (64, 16), (128, 16), (128, 32)), ((32, 16), (64, 16), (64, 32))),
        ((10, 10), ((16, 16), (20, 20), (24, 32)), ((10, 10),)),
    ],
)
def test_buckets_end_where_texts_are_cut(most, buckets, expected):
    config = default()
    config.max_prompt_tokens, config.max_response_tokens = most
    config.buckets = buckets
    assert settled(config).buckets == buckets
    assert buckets_of(config) == expected
    lengths = generator_settings(config)["prompt_lengths"]
    assert lengths == sorted({prompt for prompt, _ in expected}) and lengths[-1] == most[0]


@UNTIMED
@given(
    sizes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5),
    most=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_buckets_ascend_and_hold_the_longest(sizes, most):
    ends = [(1 + sum(a for a, _ in sizes[:i]), 1 + sum(b for _, b in sizes[:i])) for i in range(5)]
    buckets = tuple(dict.fromkeys([*ends, (most[0] + 100, most[1] + 100)]))
    config = default()
    config.update(buckets=buckets, max_prompt_tokens=most[0], max_response_tokens=most[1])
    typed(config)
    found = buckets_of(config)
    assert found[-1] == most and len(set(found)) == len(found)
    config.buckets = found
    assert typed(config).buckets == found
    # Whatever fits into one of the buckets fits into no wider one than before.
    for prompt, response in buckets:
        assert (min(prompt, most[0]), min(response, most[1])) in found


def test_labels_have_the_length_of_a_response():
    config = default()
    config.max_response_tokens = 50
    assert label_tokens(config) == 50
    config.labels.max_new_tokens = 20
    assert label_tokens(config) == 20


@pytest.mark.parametrize("section", ["labels", "features", "decoding"])
def test_a_stage_has_the_mesh_of_the_config_but_for_its_own(section):
    config = default()
    config.mesh.update(data=2, fsdp=-1, slices=2)
    slices = {"slices": 2, "process_is_granule": False}
    common = {"data": 2, "fsdp": -1, "sequence": 1, "tensor": 1, **slices}
    assert mesh_sizes(config, section) == mesh_sizes(config) == common
    config[section].mesh.update(fsdp=1, tensor=4)
    assert mesh_sizes(config, section) == {**common, "fsdp": 1, "tensor": 4}
    assert mesh_sizes(config) == common
    for name, message in ((section, f"config.{section}.mesh: wrong"), ("", "wrong")):
        with pytest.raises(ValueError) as error, naming_mesh(config, name):
            raise ValueError("wrong")
        assert str(error.value) == message


# Settings of which any finite number means something: why.
WITHOUT_RANGE = {
    "decoding.search.length_penalty": "below 0 it favours short hypotheses",
    "labels.search.length_penalty": "likewise",
}
# Where a setting may be this, whatever its range is: all of a kind, or those that are left.
SPECIAL = {
    **{f"mesh.{axis}": -1 for axis in AXES},
    **{f"{part}.search.temperature": 0.0 for part in ("decoding", "labels")},
}


@pytest.mark.parametrize("key", [k.key for k in describe() if k.type in ("int", "float")])
def test_every_number_has_a_range_and_is_refused_beyond_it(key):
    """Each limit of a range is tried from both sides."""
    described = KEYS[key]
    where, _, name = key.rpartition(".")
    section = next(
        kind
        for kind in ([*MODELS.values()] if where.endswith(".model") else [section_at(where)])
        if name in {field.name for field in dataclasses.fields(kind)}
    )
    allowed = {f.name: f for f in dataclasses.fields(section)}[name].metadata["allowed"]

    def fits(value):
        try:
            allowed.checked(name, value)
        except ValueError as error:
            assert str(error).endswith(f"expected {described.allowed}")
            return False
        return True

    limits = re.findall(
        r"(at least|>=|above|at most|below) (-?[\d.e-]+)(?: if)?", described.allowed
    )
    assert bool(limits) != (key in WITHOUT_RANGE), described.allowed
    step = 1 if described.type == "int" else 1e-6
    for word, limit in limits:
        limit = type(described.default)(limit)
        outward = -step if word in ("at least", ">=", "above") else step
        beyond = limit if word in ("above", "below") else limit + outward
        # A number such as 0 or -1 may lie beyond a range and mean something else.
        assert not fits(beyond) or beyond == SPECIAL.get(key, described.default), (word, limit)
        inside = limit - outward if word in ("above", "below") else limit
        if inside % 2 == 0 or "even" not in described.allowed:
            assert fits(inside), (word, limit)
    assert fits(described.default) and not fits(math.nan) and not fits(-math.inf)
    for huge in (2**32, 10**30) if described.type == "int" else (1e39, -1e39):
        assert not fits(huge), huge


def section_at(key):
    """The class of the section at a dotted key."""
    section = Settings()
    for part in key.split(".") if key else ():
        section = getattr(section, part)
    return type(section)


IN_A_FILE = {
    "config.decoding.search.beams = 4": "no such setting, 'beams', did you mean 'num_beams'?",
    "config.decoding.update(max_new_token=4)": "'max_new_token', did you mean 'max_new_tokens'?",
    "config.slm.lora.dropout = 0.1": "no such setting, 'dropout'; there are alpha, pattern, rank",
    "config.slm.lora.update(dropout=0.1)": "'dropout'; there are alpha, pattern, rank",
    "config.update({'l2s': {'fusionn': 3}})": "'fusionn', did you mean 'fusion'?",
    "config.seed = 1 / 0": "division by zero",
    "config.llm.train.stepz = 3": "no such setting, 'stepz', did you mean 'steps'?",
    "config.llm.train.update(\n        stepz=3\n    )": "'stepz', did you mean 'steps'?",
    "config['llm']['stepz'] = 3": "no such setting, 'stepz'",
    "config.llm.trian.steps = 3": "no such setting, 'trian', did you mean 'train'?",
    "config.llm.train.steps = 'many'": "config.llm.train.steps = 'many': expected int",
    "config.slm = 3": "config.slm = 3: expected ConfigDict",
    "config.labels = 'llm'": "config.labels is now config.labels.source",
    "config.update(\n        labels='llm'\n    )": "config.labels is now config.labels.source",
}


@pytest.mark.parametrize("code", IN_A_FILE)
def test_a_mistake_in_a_file_is_one_line_that_says_where(code, tmp_path, capsys):
    path = tiny.write_task(tmp_path)
    lines = path.read_text().replace("    return config", f"    {code}\n    return config")
    path.write_text(lines)
    number = lines.splitlines().index(f"    {code}".splitlines()[0]) + 1
    assert tiny.run(f"--config={path}", f"--workdir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {path}:{number}: config")
    assert error.endswith(f"{IN_A_FILE[code]}\n")


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ("import no_such_package", "config", ":1: import no_such_package: No module named 'no_su"),
        ("x = = 3", "config", ":1: x = = 3: invalid syntax"),
        ("", "None", "--config: get_config() gave no config but a NoneType, expected the config"),
        ("", "{'seed': 3}", "--config: get_config() gave no config but a dict, expected the conf"),
        ("", "ConfigDict({'sed': 3})", "config.sed: no such setting, did you mean 'seed'?"),
    ],
)
def test_a_file_that_makes_no_config_is_one_line(first, last, message, tmp_path, capsys):
    path = tiny.write_task(tmp_path)
    text = path.read_text().replace("    return config", f"    return {last}")
    path.write_text(f"{first}\n{text}")
    with mock.patch("l2s_jax.main.run") as run:
        assert tiny.run(f"--config={path}", f"--workdir={tmp_path / 'run'}") == 2
        run.assert_not_called()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize("mode", ["train", "evaluate", "generate", "plan"])
def test_a_config_is_checked_before_anything_else_is_done(mode, tmp_path, capsys):
    path = tiny.write_task(tmp_path)
    command = [f"--config={path}", f"--workdir={tmp_path / 'run'}", f"--mode={mode}"]
    with mock.patch("l2s_jax.main.run") as run:
        assert tiny.run(*command, "--config.labels.batch_size=8") == 2
        assert tiny.run(*command, "--config.l2s.train.dropout_rate=2") == 2
        run.assert_not_called()
        assert tiny.run(*command, "--config.llm.path=x", "--config.llm.train.steps=0") == 0
    first, second = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert "config.labels.batch_size=8: no effect with config.labels.source='data'" in first
    assert "config.l2s.train.dropout_rate=2.0: expected a number >= 0, below 1" in second
    (config, *_), _ = run.call_args
    assert config.llm.model == model_config()
    assert config.llm.train.to_dict() == dataclasses.asdict(Train())


def test_a_section_is_declared_with_its_ranges():
    @dataclasses.dataclass(frozen=True)
    class Latency(Section):
        batch_size: int = setting(8, "The larger batch.", at_least=1)
        share: float = setting(0.5, "A share.", above=0, at_most=1)

    assert Latency(share=1).share == 1.0 and isinstance(Latency(share=1).share, float)
    for wrong, message in (
        ({"batch_size": 0}, "batch_size=0: expected an integer >= 1"),
        ({"share": 0}, "share=0: expected a number above 0, at most 1"),
        ({"share": None}, "share=None: expected a number above 0, at most 1"),
    ):
        with pytest.raises(ValueError) as error:
            Latency(**wrong)
        assert str(error.value) == message
    with pytest.raises(dataclasses.FrozenInstanceError):
        Latency().batch_size = 3
