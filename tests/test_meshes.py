"""On any mesh the same losses, parameters and texts, and no more moved than a mesh is for.

Pairs of families learn and answer on eight devices as on one, through `update.make_step` and
`Generator`. What the compiler sends between devices is read from its programs.
"""

from __future__ import annotations

import collections
import functools
import re
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
import small
from flax.traverse_util import flatten_dict

from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster import sharding
from l2s_jax.cluster.sharding import RULES
from l2s_jax.decoding.engine import GREEDY, jitted_decode, start
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.models.t5 import T5Config
from l2s_jax.plan.hlo import collectives
from l2s_jax.serving.generator import Generator
from l2s_jax.settings.search import Search
from l2s_jax.training import optim, update

DEVICES = 8
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}
PAIRS = (("t5", "t5"), ("t5", "gpt2"), ("llama", "llama"))
ROWS, PROMPT, RESPONSE, STEPS = 16, 8, 6, 20
NEW = 9
DROPOUT = 0.1
BEAM = Search(num_beams=2)

every_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)
every_mesh = pytest.mark.parametrize("mesh", MESHES)


@pytest.fixture(autouse=True, scope="module")
def eight_devices():
    if jax.device_count() != DEVICES:
        pytest.skip(f"needs {DEVICES} devices")


def model(family, width, vocab_size):
    """One layer of which a mesh of eight divides every axis."""
    shared = {
        "vocab_size": vocab_size,
        "width": width,
        "num_heads": 8,
        "feed_forward_width": 2 * width,
        "dropout_rate": DROPOUT,
        "pad_id": 0,
        "eos_id": 1,
    }
    if family == "t5":
        layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
        return T5Config(**shared, **layers, head_width=4, num_buckets=8, max_distance=16)
    if family == "gpt2":
        return GPT2Config(**shared, num_layers=1, max_positions=32)
    return LlamaConfig(**shared, num_layers=1, num_kv_heads=8, head_width=4, rotary=Rotary(4))


@functools.cache
def make(pair):
    """(system, trained, frozen), random; two families have two vocabularies."""
    shared = pair == ("t5", "t5")
    llm = model(pair[0], 40, small.VOCABULARY)
    slm = model(pair[1], 32, small.VOCABULARY + (0 if shared else 8))
    encoder, frozen = pretrained.abstract_encoder(llm)
    system = LlmToSlm(encoder, slm, 32, shared_vocabulary=shared)
    trained = jax.eval_shape(system.init, jax.random.key(0))
    return system, small.random_like(trained), small.random_like(frozen, seed=1)


def mesh_of(name):
    return small.mesh_of(*MESHES.get(name, (1, 1, 1)))


CONFIG = small.make_train_config(STEPS, batch_size=ROWS, learning_rate=1e-2, dropout_rate=DROPOUT)


class Run(NamedTuple):
    """What a training gave; `text` is its compiled step."""

    state: update.TrainState
    losses: np.ndarray
    text: str


@functools.cache
def trained_on(pair, name) -> Run:
    """STEPS steps on a mesh, as loop.fit takes them; on one device where it has no such name."""
    system, params, frozen = make(pair)
    mesh = mesh_of(name)
    optimizer = optim.optimizer(CONFIG, params)
    shardings = update.state_shardings(params, optimizer, CONFIG, mesh)
    step = update.make_step(system, optimizer, CONFIG, 0, shardings)
    losses = []
    with jax.set_mesh(mesh):
        frozen = sharding.put_parameters(frozen, mesh)
        state = jax.jit(lambda p: update.init_state(p, optimizer, CONFIG), out_shardings=shardings)(
            params
        )
        batch = sharding.put_batch(small.make_batch(system, ROWS, PROMPT, RESPONSE), mesh)
        step = step.lower(state, frozen, batch).compile()
        for _ in range(STEPS):
            state, metrics = step(state, frozen, batch)
            losses.append(metrics["loss"])
    return Run(state, np.array(jax.device_get(losses)), step.as_text())


class Recorder:
    """A jitted function that keeps the text of what it ran, and where the outputs lay."""

    def __init__(self, function):
        self.function, self.texts, self.shardings = function, [], []

    def __call__(self, system, *arrays, **settings):
        program = self.function.lower(system, *arrays, **settings).compile()
        outputs = program(*arrays)
        self.texts.append(program.as_text())
        self.shardings.append(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), outputs
            )
        )
        return outputs


def generator(pair, name, **settings: Any) -> Generator:
    """The model that was trained on a mesh, there."""
    system, _, frozen = make(pair)
    tokenizer = small.NumberTokenizer()
    return Generator(
        *(system, sharding.gather(trained_on(pair, name).state.params), frozen),
        *(tokenizer, tokenizer),
        prompt_lengths=(PROMPT,),
        max_new_tokens=NEW,
        batch_size=ROWS,
        mesh=mesh_of(name),
        **settings,
    )


# Not all rows of the batch are used.
PROMPTS = [prompt for prompt, _ in small.random_pairs(ROWS - 3, PROMPT - 1)]


@functools.cache
def answered_on(pair, name, search=GREEDY):
    """(outputs, text of the one program) of the model that was trained on a mesh, there."""
    with mock.patch("l2s_jax.serving.generator.jitted_decode", Recorder(jitted_decode)) as recorder:
        outputs = generator(pair, name, search=search).generate(PROMPTS)
    (text,) = recorder.texts
    return outputs, text


def size_of(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def gathered(text):
    """Shapes of what all-gathers give, as tuples."""
    found = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return [tuple(map(int, shape.split(","))) for shape in found]


def is_split(leaf, *ways):
    """Whether each device holds one part of an array that is split in so many along each axis."""
    shape = tuple(size // way for size, way in zip(leaf.shape, ways, strict=True))
    return leaf.sharding.shard_shape(leaf.shape) == shape


@every_mesh
@every_pair
def test_training_is_the_same_on_every_mesh(pair, mesh):
    expected, found = trained_on(pair, None), trained_on(pair, mesh)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert found.losses[-1] < found.losses[0] - 1
    # A softmax does not see what is added to all of its inputs, as a key's bias is: its gradient is
    # of rounding, which Adam scales up to steps like any other's.
    kept = [
        {
            path: leaf
            for path, leaf in flatten_dict(run.state.params, sep="/").items()
            if not path.endswith("key/bias")
        }
        for run in (found, expected)
    ]
    small.assert_same(*kept, rtol=1e-4, atol=2e-5)


@every_mesh
@every_pair
def test_what_it_says_is_the_same_on_every_mesh(pair, mesh):
    expected, _ = answered_on(pair, None)
    found, _ = answered_on(pair, mesh)
    assert found == expected
    assert len({output.text for output in expected}) > len(expected) / 2


@every_mesh
@every_pair
def test_the_state_lies_where_the_rules_say(pair, mesh):
    state, sizes = trained_on(pair, mesh).state, mesh_of(mesh).shape
    moments = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, dict))
    moments = [tree for tree in moments if isinstance(tree, dict)]
    assert len(moments) == 2
    for tree in (state.params, *moments):
        for path, leaf in flatten_dict(tree, sep="/").items():
            (spec,) = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
            ways = [sizes[axis] if axis else 1 for axis in spec]
            assert is_split(leaf, *ways, *[1] * (leaf.ndim - len(ways))), path


@every_mesh
@every_pair
def test_training_moves_no_more_than_its_mesh_is_for(pair, mesh):
    _, params, frozen = make(pair)
    moved = collectives(trained_on(pair, mesh).text)
    total = collections.Counter()
    for one in moved:
        total[one.kind] += one.bytes * one.times
    if mesh == "data":
        # The gradient, of a table in as many parts as it has uses, and three sums to report.
        assert set(total) == {"all-reduce"}
        table = params["slm"]["token_embedding"]["embedding"].nbytes
        assert size_of(params) <= total["all-reduce"] < size_of(params) + 3 * table
    elif mesh == "tensor":
        check_no_parameter(pair, trained_on(pair, mesh).text)
    else:
        # Each device gathers, of what `tensor` leaves to it, all that it multiplies with: forwards
        # and backwards.
        most = (2 * size_of(params) + size_of(frozen)) / mesh_of(mesh).shape["tensor"]
        assert 0 < total["all-gather"] <= most
    check_tables(pair, mesh, trained_on(pair, mesh).text)


@pytest.mark.parametrize("mesh", ["data", "fsdp", "mixed"])
@every_pair
def test_a_device_makes_the_dropout_masks_of_its_own_rows(pair, mesh):
    text, ways = trained_on(pair, mesh).text, ROWS // sharding.batch_ways(mesh_of(mesh))
    bits = "u32[{},1,32]".format
    assert bits(ways) in text and bits(ROWS) not in text


@every_mesh
@every_pair
def test_decoding_moves_no_more_than_its_mesh_is_for(pair, mesh):
    _, params, frozen = make(pair)
    _, text = answered_on(pair, mesh)
    moved = collectives(text)
    if mesh == "data":
        # But for whether all rows are done, which the condition of the loop over chunks adds up.
        assert not moved
    elif mesh == "tensor":
        check_no_parameter(pair, text)
    else:
        # Of the LLM once; of the SLM for the prompt, and once for a chunk of tokens.
        most = (2 * size_of(params) + size_of(frozen)) / mesh_of(mesh).shape["tensor"]
        assert 0 < sum(one.bytes for one in moved if one.kind == "all-gather") <= most
        # A cache is larger.
        assert not [shape for shape in gathered(text) if len(shape) > 3]
    check_tables(pair, mesh, text)


def check_no_parameter(pair, text):
    """None that is split is gathered, in either order of its axes."""
    _, *params = make(pair)
    split = {
        tuple(sorted(leaf.shape))
        for path, leaf in flatten_dict(dict(zip("ab", params, strict=True)), sep="/").items()
        if "relative_bias" not in path and leaf.ndim == 2
    }
    assert not split & {tuple(sorted(shape)) for shape in gathered(text)}


def check_tables(pair, mesh, text):
    """No vocabulary's table is gathered but by `fsdp`, and that only to multiply with it."""
    system, _, _ = make(pair)
    tensor = mesh_of(mesh).shape["tensor"]
    for config in (system.llm_config, system.slm_config):
        assert config.vocab_size not in (config.width, config.feed_forward_width)
        tables = [s for s in gathered(text) if len(s) == 2 and config.width in s]
        if tensor > 1 or config is system.llm_config:
            assert not [s for s in tables if config.vocab_size in s]


@pytest.mark.parametrize("pair", [PAIRS[1]], ids="-".join)
def test_beam_search_is_the_same_on_a_mesh_and_stays_by_rows(pair):
    found, text = answered_on(pair, "mixed", BEAM)
    for output, other in zip(found, answered_on(pair, None, BEAM)[0], strict=True):
        assert output._replace(score=None) == other._replace(score=None)
        assert output.score == pytest.approx(other.score, rel=1e-5)
    check_tables(pair, "mixed", text)
    vocabulary = make(pair)[0].slm_config.vocab_size
    # Each row's scores are gathered over `tensor`, no row over `data` and `fsdp`.
    scores = [shape for shape in gathered(text) if vocabulary in shape]
    assert scores and {shape[0] for shape in scores} == {ROWS // 4}


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2]], ids="-".join)
def test_a_stream_is_the_same_on_a_mesh_and_its_cache_is_split(pair):
    model = generator(pair, "mixed")
    assert is_split(model.trained["slm"]["token_embedding"]["embedding"], 2, 2)
    with mock.patch("l2s_jax.serving.generator.start", Recorder(start)) as recorder:
        pieces = list(model.stream(PROMPTS[0]))
    assert "".join(pieces) == answered_on(pair, "mixed")[0][0].text
    (state,) = recorder.shardings
    rows = 4  # one, filled up
    assert state.done.shape == (rows,)
    for leaf in jax.tree.leaves(state.cache):
        ways = [4, 2, 1, 1] if leaf.ndim == 4 else [4, *[1] * (leaf.ndim - 1)]
        assert is_split(leaf, *ways[: leaf.ndim])


def test_int8_weights_are_split_as_the_kernels_that_they_are():
    model = generator(PAIRS[0], "mixed", weights="int8")
    kernel = model.trained["slm"]["decoder"]["layers_0"]["attention"]["output"]["kernel"]
    assert kernel.qvalue.dtype == np.int8 and is_split(kernel.qvalue, 2, 2)
    assert is_split(kernel.scale, 1, 2)
    table = model.trained["slm"]["token_embedding"]["embedding"]
    assert is_split(table.qvalue, 2, 2) and is_split(table.scale, 2, 1)
    assert len(model.generate(PROMPTS[:1])) == 1


def test_an_llm_alone_says_the_same_on_a_mesh():
    config = model("llama", 32, small.VOCABULARY)
    system = LanguageModel("llm", config)
    params = small.random_like(jax.eval_shape(system.init, jax.random.key(0)))
    tokenizer = small.NumberTokenizer()
    settings = {"prompt_lengths": (PROMPT,), "max_new_tokens": NEW, "batch_size": 8}
    one, other = (
        Generator(system, params, {}, tokenizer, tokenizer, mesh=mesh_of(name), **settings)
        for name in (None, "fsdp")
    )
    with mock.patch("l2s_jax.serving.generator.jitted_decode", Recorder(jitted_decode)):
        assert one.generate(PROMPTS[:5]) == other.generate(PROMPTS[:5])
