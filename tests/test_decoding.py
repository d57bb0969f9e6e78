"""Greedy decoding against full recomputation, and the loop on its own with fake steps."""

import dataclasses
import functools
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import xla
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.decoding.engine import GREEDY, advance, jitted_decode, start
from l2s_jax.decoding.loop import CHUNK, Loop, decoding_steps
from l2s_jax.models import serving
from l2s_jax.models.exact import Exact
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.products import Transposed
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.serving.generator import Generator
from l2s_jax.settings.search import Search

NEW = CHUNK + 3
NEVER = -1


CAUSAL = {
    "gpt2": GPT2Config(
        vocab_size=48,
        width=16,
        num_heads=2,
        feed_forward_width=32,
        num_layers=2,
        max_positions=600,
        dropout_rate=0.0,
    ),
    "llama": LlamaConfig(
        vocab_size=48,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        feed_forward_width=32,
        num_layers=2,
        rotary=Rotary(8),
    ),
}


@functools.cache
def case(name):
    if name in CAUSAL:
        tokens = {"pad_id": 0, "eos_id": 1, "tied_head": False}
        system = LanguageModel("slm", dataclasses.replace(CAUSAL[name], **tokens))
    else:
        system = small.make_system(name, num_decoder_layers=2)
    return system, *small.make_params(system), small.make_batch(system, rows=5)


def decode(system, trained, frozen, batch, active=None, max_new_tokens=NEW, **options):
    ids, mask = (batch[f"{system.prompt_name}_{part}"] for part in ("ids", "mask"))
    limits = np.full(len(ids), max_new_tokens)
    if active is not None:
        limits = np.where(active, limits, 0)
    return jax.device_get(
        jitted_decode(
            system, trained, frozen, ids, mask, limits, max_new_tokens=max_new_tokens, **options
        )
    )


def with_eos(system, eos_id):
    name = "config" if isinstance(system, LanguageModel) else "slm_config"
    changed = dataclasses.replace(getattr(system, name), eos_id=eos_id)
    return dataclasses.replace(system, **{name: changed})


@functools.cache
def recomputed(name):
    """Tokens [B, NEW] without eos: each from teacher-forced logits of all tokens before it."""
    system, trained, frozen, batch = case(name)
    logits = jax.jit(small.logits_of(system))
    tokens = np.zeros((5, NEW), np.int32)
    for position in range(NEW):
        filled = {**batch, "response_ids": tokens}
        tokens[:, position] = np.argmax(logits(trained, frozen, filled)[:, position], axis=-1)
    return tokens


@pytest.mark.parametrize("name", small.SYSTEMS)
def test_greedy_equals_recomputation_of_every_step(name):
    system, trained, frozen, batch = case(name)
    expected = recomputed(name)
    assert len(np.unique(expected, axis=0)) == 5 and len(np.unique(expected)) > 5

    endless = decode(system, trained, frozen, batch, end_ids=())
    np.testing.assert_array_equal(endless.tokens, expected)
    assert endless.lengths.tolist() == [NEW] * 5
    assert not endless.finished.any()

    # A token of a random model's output serves as its eos, so that rows end at different steps.
    ends = [int(token) for token in np.unique(expected) if 0 < (expected == token).any(1).sum() < 5]
    eos_id = max(ends, key=lambda token: (expected == token).any(1).sum())
    decoded = decode(with_eos(system, eos_id), trained, frozen, batch)
    for row, tokens in enumerate(expected.tolist()):
        length = tokens.index(eos_id) + 1 if eos_id in tokens else NEW
        assert decoded.lengths[row] == length
        assert decoded.finished[row] == (eos_id in tokens)
        assert decoded.tokens[row].tolist() == tokens[:length] + [0] * (NEW - length)
    assert decoded.finished.any() and not decoded.finished.all()


SCRIPT_EOS, SCRIPT_PAD = 9, 8


def run_script(script, *, max_new_tokens, eos_id=SCRIPT_EOS, active=None):
    """Decodes with a fake step that says script [B, >= tokens]; also gives the steps it took."""
    script = np.asarray(script, np.int32)
    length = decoding_steps(max_new_tokens) + 1
    script = np.pad(script, [(0, 0), (0, max(0, length - script.shape[1]))], constant_values=2)
    steps, inputs = [], []

    def step(params, token, index):
        jax.debug.callback(
            lambda i, t: (steps.append(int(i)), inputs.append(t.tolist())),
            index,
            token,
            ordered=True,
        )
        return jax.nn.one_hot(params[:, index + 1], 10), index + 1

    rows = len(script)
    limits = np.full(rows, max_new_tokens)
    if active is not None:
        limits = np.where(active, limits, 0)
    loop = Loop(step, (eos_id,), SCRIPT_PAD, max_new_tokens, GREEDY)
    decode = jax.jit(
        lambda script: loop.run(script, jax.nn.one_hot(script[:, 0], 10), jnp.int32(0), limits)
    )
    decoded = jax.device_get(decode(script))
    jax.effects_barrier()
    return decoded, steps, inputs


def test_the_loop_stops_after_the_chunk_in_which_the_last_row_ends():
    script = np.full((2, 4 * CHUNK), 2)
    script[0, 1] = script[1, CHUNK + 2] = SCRIPT_EOS
    decoded, steps, inputs = run_script(script, max_new_tokens=4 * CHUNK)
    assert steps == list(range(2 * CHUNK))
    assert decoded.lengths.tolist() == [2, CHUNK + 3]
    assert decoded.finished.tolist() == [True, True]
    assert inputs[:3] == [[2, 2], [SCRIPT_EOS, 2], [SCRIPT_PAD, 2]]
    assert (decoded.tokens[0, 2:] == SCRIPT_PAD).all()
    assert (decoded.tokens[1, CHUNK + 3 :] == SCRIPT_PAD).all()


def test_all_rows_ending_in_the_first_chunk_take_one_chunk():
    script = np.full((2, 4 * CHUNK), SCRIPT_EOS)
    script[:, 0] = 2
    decoded, steps, _ = run_script(script, max_new_tokens=4 * CHUNK)
    assert steps == list(range(CHUNK))
    assert decoded.lengths.tolist() == [2, 2]


def test_all_rows_ending_with_the_first_token_take_no_step():
    script = np.full((2, 4 * CHUNK), SCRIPT_EOS)
    decoded, steps, _ = run_script(script, max_new_tokens=4 * CHUNK)
    assert steps == []
    assert decoded.lengths.tolist() == [1, 1]
    assert decoded.finished.all()


@pytest.mark.parametrize("max_new_tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_any_number_of_new_tokens(max_new_tokens):
    script = np.arange(3 * CHUNK)[None] % 7
    decoded, _, _ = run_script(script, max_new_tokens=max_new_tokens)
    assert decoded.tokens.tolist() == script[:, :max_new_tokens].tolist()
    assert decoded.lengths.tolist() == [max_new_tokens]
    assert decoded.finished.tolist() == [False]


@pytest.mark.parametrize(("end", "cut"), [(CHUNK, False), (CHUNK + 1, True)])
def test_an_eos_past_max_new_tokens_does_not_count(end, cut):
    script = np.full((1, 2 * CHUNK), 2)
    script[0, end] = SCRIPT_EOS
    decoded, _, _ = run_script(script, max_new_tokens=CHUNK + 1)
    assert decoded.tokens.shape == (1, CHUNK + 1)
    assert decoded.finished.tolist() == [not cut]
    assert decoded.lengths.tolist() == [CHUNK + 1]


def test_a_negative_eos_never_ends():
    script = np.full((2, 2 * CHUNK), SCRIPT_EOS)
    decoded, steps, _ = run_script(script, max_new_tokens=2 * CHUNK, eos_id=NEVER)
    assert len(steps) == 2 * CHUNK
    assert (decoded.tokens == SCRIPT_EOS).all()
    assert decoded.lengths.tolist() == [2 * CHUNK] * 2
    assert not decoded.finished.any()


@pytest.mark.parametrize("eos_id", [SCRIPT_EOS, SCRIPT_PAD, NEVER])
def test_inactive_rows_are_padding_and_are_not_waited_for(eos_id):
    script = np.full((3, 4 * CHUNK), 2)
    script[1, 3] = eos_id if eos_id >= 0 else 2
    decoded, steps, _ = run_script(
        script, max_new_tokens=2 * CHUNK, eos_id=eos_id, active=[False, True, False]
    )
    assert len(steps) == (CHUNK if eos_id >= 0 else 2 * CHUNK)
    assert decoded.lengths.tolist() == [0, 4 if eos_id >= 0 else 2 * CHUNK, 0]
    assert (decoded.tokens[[0, 2]] == SCRIPT_PAD).all()
    assert decoded.finished[[0, 2]].all()


def test_no_active_row_takes_no_step():
    decoded, steps, _ = run_script(np.full((2, CHUNK), 2), max_new_tokens=CHUNK, active=[False] * 2)
    assert steps == []
    assert (decoded.tokens == SCRIPT_PAD).all()


@pytest.mark.parametrize("name", ["slm", "add", "cross"])
def test_inactive_rows_change_nothing_for_the_others(name):
    system, trained, frozen, batch = case(name)
    whole = decode(system, trained, frozen, batch, end_ids=())
    active = np.array([True, False, True, False, True])
    some = decode(system, trained, frozen, batch, active=active, end_ids=())
    np.testing.assert_array_equal(some.tokens[active], whole.tokens[active])
    assert (some.tokens[~active] == 0).all()
    assert some.lengths.tolist() == [NEW, 0, NEW, 0, NEW]


LONGEST = 12
SEARCHES = {
    "greedy": GREEDY,
    "sampling": Search(
        temperature=1.2, top_k=30, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=2
    ),
    # Fond of what there is: of padding too, were it taken for a token.
    "beams": Search(num_beams=3, num_return=2, repetition_penalty=0.6, no_repeat_ngram_size=3),
}


@functools.cache
def generator(name, batch_size, prompt_lengths, max_new_tokens=6, mesh=None):
    system, trained, frozen, _ = case(name)
    return Generator(
        system,
        trained,
        frozen,
        small.NumberTokenizer(),
        small.NumberTokenizer(),
        prompt_lengths=prompt_lengths,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        mesh=mesh,
    )


@functools.cache
def alone(name, prompt, search="greedy", seed=0):
    model = generator(name, 1, (LONGEST,))
    return model.generate([prompt], search=SEARCHES[search], seeds=[seed])[0]


PROMPTS = [prompt for prompt, _ in small.random_pairs(12, LONGEST - 1, seed=5)]


def without_scores(output):
    return output._replace(score=None, others=tuple(map(without_scores, output.others)))


def scores_of(output):
    return [one.score for one in (output, *output.others) if one.score is not None]


@pytest.mark.parametrize("search", SEARCHES)
@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(["slm", "add", "cross", *CAUSAL]),
    rows=st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(0, 3)), min_size=1, max_size=10),
    shapes=st.sampled_from(
        [
            (1, (LONGEST,), 6),
            (1, (6, LONGEST), 6),
            (4, (LONGEST,), 6),
            (4, (6, LONGEST), 6),
            (4, (6, LONGEST), 11),
        ]
    ),
)
def test_an_output_depends_on_its_prompt_only(search, name, rows, shapes):
    prompts, seeds = zip(*rows, strict=True)
    outputs = generator(name, *shapes).generate(
        prompts, search=SEARCHES[search], seeds=seeds, max_new_tokens=6
    )
    expected = [alone(name, prompt, search, seed) for prompt, seed in rows]
    assert list(map(without_scores, outputs)) == list(map(without_scores, expected))
    for one, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(scores_of(one), scores_of(other), rtol=1e-5)
        assert len(scores_of(one)) == (2 if search == "beams" else 0)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["slm", "add", "cross", *CAUSAL])
def test_transposed_kernels_give_the_same(name, rows, monkeypatch):
    expected = generator(name, rows, (LONGEST,)).generate(PROMPTS)
    monkeypatch.setattr(serving, "LEAST_TRANSPOSED", 1)
    transposed = generator.__wrapped__(name, rows, (LONGEST,))
    leaves = jax.tree.leaves(transposed.trained, is_leaf=lambda leaf: isinstance(leaf, Transposed))
    assert any(isinstance(leaf, Transposed) for leaf in leaves)
    found = transposed.generate(PROMPTS)
    assert list(map(without_scores, found)) == list(map(without_scores, expected))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores_of(one), scores_of(other), rtol=1e-4)


def test_prompts_fill_each_bucket_and_leave_padding_in_it():
    lengths = {len(prompt.split()) + 1 for prompt in PROMPTS}
    assert lengths > {2, 6, 8, LONGEST}


def test_samples_differ_by_their_seeds_and_searches_by_what_they_find():
    for name in ("slm", "add", *CAUSAL):
        sampled = [alone(name, PROMPTS[0], "sampling", seed).text for seed in range(4)]
        assert len(set(sampled)) > 1
        found = [[alone(name, prompt, search) for prompt in PROMPTS] for search in SEARCHES]
        texts = {tuple(output.text for output in outputs) for outputs in found}
        assert len(texts) == len(SEARCHES)


def test_prompts_differ_in_their_outputs():
    assert len({alone("add", prompt).text for prompt in PROMPTS}) > len(PROMPTS) // 2


@pytest.mark.parametrize("name", ["slm", "add"])
def test_cut_says_that_no_eos_came(name):
    outputs = [alone(name, prompt) for prompt in PROMPTS]
    eos = str(small.NumberTokenizer.eos_id)
    for output in outputs:
        assert len(output.text.split()) == output.tokens <= 6
        assert output.cut == (eos not in output.text.split())
    assert any(output.cut for output in outputs)


def test_mismatched_takes_the_hidden_states_of_the_row_before():
    system, trained, frozen, batch = case("add")
    ids, mask = batch["llm_ids"], batch["llm_mask"]

    @jax.jit
    def first_logits(trained, frozen):
        hidden = system.encode(trained, frozen, ids, mask) * mask[..., None]
        other = hidden[jnp.array([4, 0, 1, 2, 3])]
        return system.prefill(trained, frozen, ids, mask, other, 0)[0]

    decoded = decode(system, trained, frozen, batch, mismatched=True, end_ids=())
    np.testing.assert_array_equal(
        decoded.tokens[:, 0], np.argmax(first_logits(trained, frozen), -1)
    )
    matched = decode(system, trained, frozen, batch, end_ids=())
    assert (decoded.tokens != matched.tokens).any(1).sum() >= 3


def test_mismatched_is_mismatched_in_batches_of_one_too():
    matched = [alone("add", prompt) for prompt in PROMPTS]
    assert generator("add", 1, (LONGEST,)).generate(PROMPTS, mismatched=True) != matched


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 1, 2)])
def test_mismatched_is_the_same_on_a_mesh(shape):
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[0]]
    expected = generator("add", 8, (16,)).generate(prompts, mismatched=True)
    mesh = small.mesh_of(*shape)
    assert generator("add", 8, (16,), mesh=mesh).generate(prompts, mismatched=True) == expected


@dataclasses.dataclass(frozen=True)
class Traced(LanguageModel):
    """Notes the batch size and prompt length of each tracing of a step."""

    traces: ClassVar[list] = []

    def step(self, trained, token, cache):
        self.traces.append(cache.prompt_mask.shape)
        return super().step(trained, token, cache)


def test_decoding_compiles_once_per_shape():
    Traced.traces.clear()
    system, trained, _, _ = case("slm")
    system = Traced("slm", system.config)
    settings = {"prompt_lengths": (6, LONGEST), "max_new_tokens": 6, "batch_size": 2}
    tokenizer = small.NumberTokenizer()
    make = functools.partial(Generator, system, trained, {}, tokenizer, tokenizer, **settings)
    short, long = ["5 6", "7", "8 9 10"], ["5 6 7 8 9 10 11", "12 13 14 15 16 17 18 19"]
    for prompts in (short, long, short + long):
        make().generate(prompts)
        seen = len(Traced.traces)
        make().generate([prompt.replace("5", "4") for prompt in prompts])
        assert len(Traced.traces) == seen
    # A batch that is not full is filled up: it takes the program of whole batches.
    assert set(Traced.traces) == {(2, 6), (2, LONGEST)}


def computations_per_token(hlo):
    """Lines of the optimized HLO that run inside a while loop, whatever calls them."""
    bodies, name = {}, None
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = header[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    reached, waiting = set(), re.findall(r" while\(.*?body=%?([\w.-]+)", hlo)
    assert waiting
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            for line in bodies[name]:
                waiting += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", line)
                for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                    waiting += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return [line for name in reached for line in bodies[name]]


def merged(shapes):
    """[B, N, ...] and [B * N, ...], as the compiler may have it in its products."""
    return shapes | {(shape[0] * shape[1], *shape[2:]) for shape in shapes}


def factors(lines):
    """(how it is read, shape) of each factor of the products with an axis for rows or heads."""
    assigned = (re.match(r"\s*(?:ROOT )?%([\w.-]+) = f32\[([\d,]+)\]", line) for line in lines)
    shapes = {match[1]: tuple(map(int, match[2].split(","))) for match in assigned if match}
    for line in lines:
        if names := re.search(r" dot\(%([\w.-]+), %([\w.-]+)\), lhs_batch", line):
            axes = re.findall(r"contracting_dims=\{(\d)\}", line)
            for name, axis, which in zip(names.groups(), axes, ("first", "second"), strict=True):
                shape = shapes[name]
                yield f"{which} by {'rows' if int(axis) == len(shape) - 1 else 'columns'}", shape


# As users compile programs, not as the tests do.
COMPILATION = {"xla_backend_optimization_level": 3} | xla.AS_USERS_HAVE_IT


def arguments_of(name, rows, new):
    """(system, arguments of `decode` after it, the cache's shapes as a tree)."""
    if name in CAUSAL:
        config = CAUSAL[name]
        system, frozen = LanguageModel("slm", config), {}
        trained = jax.eval_shape(system.init, jax.random.key(0))
    else:
        system, trained, frozen, _ = case(name)
    prompt = 7
    arguments = (
        trained,
        frozen,
        jnp.zeros((rows, prompt), jnp.int32),
        jnp.ones((rows, prompt), bool),
        jnp.full(rows, new),
    )
    hidden = jax.eval_shape(system.encode, *arguments[:4])
    prefill = functools.partial(system.prefill, max_steps=decoding_steps(new))
    return system, arguments, jax.eval_shape(prefill, *arguments[:4], hidden)[1]


def shapes_of(cache):
    """(the shapes of its keys and values, the same as a product's turned factor has them)."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(cache) if leaf.ndim == 4}
    return shapes, {(*shape[:2], *shape[:1:-1]) for shape in shapes}


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def made_by(opcode, shapes, lines):
    sizes = "|".join(",".join(map(str, shape)) for shape in merged(shapes))
    made = re.compile(rf" f32\[(?:{sizes})\]\S* {opcode}\(")
    return [line.strip() for line in lines if made.search(line)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["slm", "add", "cross", *CAUSAL])
def test_the_cache_is_updated_in_place(name, rows):
    new = 500
    system, arguments, cache = arguments_of(name, rows, new)
    compiled = jitted_decode.lower(system, *arguments, max_new_tokens=new).compile(COMPILATION)
    shapes, transposed = shapes_of(cache)
    lines = computations_per_token(compiled.as_text())

    assert made_by("dynamic-update-slice", shapes, lines)
    # Nor is it turned for a product, alone or within a fusion.
    assert not made_by("copy", shapes | transposed, lines)
    read = {reading for reading, shape in factors(lines) if shape in merged(shapes)}
    assert read == {"first by rows", "second by columns"}
    # Nor is there a second one to alternate with.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.9 * bytes_of(cache)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["slm", "add", "cross", *CAUSAL])
def test_a_chunk_of_a_stream_updates_the_cache_that_it_is_given(name, rows):
    new = 500
    system, arguments, cache = arguments_of(name, rows, new)
    settings = {"max_new_tokens": new, "search": GREEDY}
    state = jax.eval_shape(functools.partial(start, system, **settings), *arguments)
    ended = jnp.zeros(rows, bool)
    lowered = advance.lower(system, *arguments[:2], state, ended, **settings)
    compiled = lowered.compile(COMPILATION)
    shapes, transposed = shapes_of(cache)
    hlo = compiled.as_text()

    assert made_by("dynamic-update-slice", shapes, computations_per_token(hlo))
    # Neither at a step, nor before the first or after the last of a chunk.
    assert not made_by("copy", shapes | transposed, hlo.splitlines())
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_of(state.cache) == bytes_of(cache)
    assert memory.temp_size_in_bytes < 0.5 * bytes_of(cache)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("families", ["t5", "llama"])
def test_exact_decoding_updates_both_caches_in_place(families, rows):
    new, search = 500, Search(exact=True)
    if families == "t5":
        l2s, trained, _, _ = case("add")
        llm = LanguageModel("llm", small.t5_config(width=24, num_encoder_layers=2, head_width=8))
    else:
        llm = LanguageModel("llm", CAUSAL["llama"])
        l2s = LlmToSlm(CAUSAL["llama"], CAUSAL["llama"], projector_width=16)
        trained = jax.eval_shape(l2s.init, jax.random.key(0))
    system = Exact(l2s, llm)
    whole = jax.eval_shape(llm.init, jax.random.key(0))["llm"]
    prompts = jnp.zeros((rows, 7), jnp.int32), jnp.ones((rows, 7), bool)
    arguments = trained, whole, *prompts, jnp.full(rows, new)
    settings = {"max_new_tokens": new, "search": search}
    state = jax.eval_shape(functools.partial(start, system, **settings), *arguments)
    compiled = jitted_decode.lower(system, *arguments, **settings).compile(COMPILATION)
    # But for those of the prompt, which nothing is written to.
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.cache) if leaf.ndim == 4}
    shapes = {shape for shape in shapes if shape[2] > new}
    turned = {(*shape[:2], *shape[:1:-1]) for shape in shapes}
    lines = computations_per_token(compiled.as_text())

    writing = "dynamic-update-slice" if rows == 1 else "scatter"
    assert made_by(writing, shapes, lines)
    assert not made_by("copy", shapes | turned, lines)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.9 * bytes_of(state.cache)
