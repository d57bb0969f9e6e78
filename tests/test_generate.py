"""Text in, text out."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.config import default
from l2s_jax.data.tasks import load_task
from l2s_jax.decoding.engine import GREEDY, others
from l2s_jax.evaluation.control import Control
from l2s_jax.models.cache import CausalCache, KeyValue, take_hypotheses
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.serving import generate_file
from l2s_jax.serving import output as outputs
from l2s_jax.serving.generator import Generator
from l2s_jax.settings.search import Search
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "sleeps",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    directory = tmp_path_factory.mktemp("tokenizer")
    return train_sentencepiece(texts, vocab_size=60, directory=str(directory), model_type="bpe")


@pytest.fixture(scope="module")
def systems(tokenizer):
    """name -> (system, trained, frozen), with random parameters."""
    config = small.t5_config(vocab_size=60)
    llm, l2s = LanguageModel("llm", config), LlmToSlm(config, config, projector_width=16)
    llm_params = llm.init(jax.random.key(0))
    frozen = small.encoder_only(llm_params["llm"])
    return {"llm": (llm, llm_params, {}), "l2s": (l2s, l2s.init(jax.random.key(1)), frozen)}


def generator(loaded, tokenizer, *, lengths=(8, 16), batch_size=4):
    return Generator(
        *loaded,
        tokenizer,
        tokenizer,
        prompt_lengths=lengths,
        max_new_tokens=6,
        batch_size=batch_size,
    )


SEARCHES = [
    GREEDY,
    Search(temperature=1.0, min_p=0.05, repetition_penalty=1.3),
    Search(num_beams=2, no_repeat_ngram_size=2),
]


@pytest.mark.parametrize("name", ["llm", "l2s"])
@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), max_size=9),
    search=st.sampled_from(SEARCHES),
)
def test_outputs_do_not_depend_on_company_order_or_bucket(
    name, systems, tokenizer, prompts, search
):
    prompts = [" ".join(words) for words in prompts]

    def rounded(outputs):
        """A score's last bits may differ between programs."""
        return [o._replace(score=o.score and pytest.approx(o.score, rel=1e-5)) for o in outputs]

    model, seeds = generator(systems[name], tokenizer), range(len(prompts))
    together = model.generate(prompts, search=search)
    alone = generator(systems[name], tokenizer, lengths=(16,), batch_size=1)
    assert together == rounded(
        alone.generate([prompt], search=search, seeds=[seed])[0]
        for seed, prompt in enumerate(prompts)
    )
    backwards = model.generate(prompts[::-1], search=search, seeds=seeds[::-1])
    assert backwards == rounded(together[::-1])
    assert all((output.score is not None) == (search.num_beams > 1) for output in together)


def test_cut_outputs_are_marked_and_have_max_new_tokens(systems, tokenizer):
    outputs = generator(systems["llm"], tokenizer).generate([" ".join(WORDS[i:]) for i in range(9)])
    assert all(output.tokens == 6 for output in outputs if output.cut)
    assert all(output.tokens <= 6 for output in outputs)


def test_mismatched_feeds_another_prompts_representations(systems, tokenizer):
    system, trained, frozen = systems["l2s"]
    prompts = ["the quick brown fox", "a lazy dog", "and sleeps over", "jumps"]
    loaded = generator((system, trained, frozen), tokenizer, lengths=(16,))
    own = loaded.generate(prompts)
    other = loaded.generate(prompts, mismatched=True)
    assert [o.text for o in own] != [o.text for o in other]
    assert Control(loaded).generate(prompts, description="", shared=False) == other
    # With one and the same prompt in every row, another prompt's representations are one's own.
    same = ["a lazy dog"] * 4
    assert loaded.generate(same, mismatched=True) == loaded.generate(same)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_control_gives_no_prompt_its_own_representations(
    batch_size, systems, tokenizer, monkeypatch
):
    decode, batches = Generator._decode, []

    def noted(self, batch, *more):
        batches.append(batch)
        return decode(self, batch, *more)

    loaded = generator(systems["l2s"], tokenizer, lengths=(16,), batch_size=batch_size)
    # A row for each reference; a space more is no other token.
    prompts = ["a lazy dog", "a quick fox", "a lazy dog", "a  lazy dog", "then sleeps"]
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "_decode", noted)
        found = Control(loaded).generate(prompts, description="", shared=False)
    answered = []
    for ids, mask, limits, _ in batches:
        assert len({row.tobytes() for row in ids * mask}) > 1
        chosen = np.asarray(jax.jit(others)(ids, mask))
        for row, other in enumerate(chosen):
            expected = (
                next(
                    before
                    for before in [(row - back) % len(ids) for back in range(1, len(ids))]
                    if (ids[before] * mask[before]).tolist() != (ids[row] * mask[row]).tolist()
                )
                if limits[row]
                else other
            )
            assert other == expected
        answered += [ids[row] for row in np.flatnonzero(limits)]
    # All of them where a batch holds them.
    assert len(answered) == {1: 3, 3: 4, 8: 5}[batch_size]
    pairs = generator(systems["l2s"], tokenizer, batch_size=2)
    for prompt, output in zip(prompts, found, strict=True):
        left = [other for other in prompts if other.split() != prompt.split()]
        # In a batch that is not full, some rows have H of padding.
        fed = pairs.generate([prompt], mismatched=True)
        assert output in fed + [pairs.generate([o, prompt], mismatched=True)[1] for o in left]


def test_a_control_of_one_prompt_alone_says_so(systems, tokenizer, caplog):
    loaded = generator(systems["l2s"], tokenizer)
    prompts = ["a lazy dog"] * 9
    outputs = Control(loaded).generate(prompts, description="the control", shared=False)
    assert outputs != loaded.generate(prompts)
    assert "the control: there is one prompt" in caplog.text


@pytest.mark.parametrize(
    ("kind", "longest", "new_tokens", "message"),
    [
        ("slm", 16, 4, None),
        ("slm", 16, 5, "slm: the model has 20 positions, prompt and response need 21: lower max_"),
        ("l2s into gpt2", 16, 4, None),
        ("l2s into gpt2", 17, 4, "slm: the model has 20 positions, prompt and response need 21"),
        # An LLM that only encodes has no response to make room for.
        ("l2s from gpt2", 20, 50, None),
        ("l2s from gpt2", 21, 50, "llm: the model has 20 positions, prompts need 21: lower the"),
    ],
)
def test_a_model_must_have_a_position_for_every_token(
    tokenizer, kind, longest, new_tokens, message
):
    gpt2 = GPT2Config(
        vocab_size=60, width=16, num_heads=2, num_layers=1, max_positions=20, pad_id=0, eos_id=1
    )
    t5 = small.t5_config(vocab_size=60)
    system = {
        "slm": LanguageModel("slm", gpt2),
        "l2s into gpt2": LlmToSlm(t5, gpt2, projector_width=16),
        "l2s from gpt2": LlmToSlm(gpt2, t5, projector_width=16),
    }[kind]
    arguments = {"prompt_lengths": (8, longest), "max_new_tokens": new_tokens, "batch_size": 2}
    allowed = (
        contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)
    )
    # The limit is a matter of the configs alone.
    with mock.patch.object(type(system), "to_serve", return_value=({}, {})), allowed:
        Generator(system, {}, {}, tokenizer, tokenizer, **arguments)


def test_a_call_tells_once_how_many_prompts_it_truncates(systems, caplog):
    loaded = generator(systems["l2s"], small.NumberTokenizer(), lengths=(4, 8), batch_size=2)

    def told():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    # With its eos, a prompt of 8 numbers has one token too many.
    long, fits = "3 4 5 6 7 8 9 10", "3 4 5 6 7 8 9"
    loaded.generate([long, fits, "3", long, long])
    assert told() == ["l2s: 3 of 5 prompts were longer than 8 tokens and lost text: 12% of text"]
    "".join(loaded.stream(long))
    assert told() == ["l2s: 1 of 1 prompts were longer than 8 tokens and lost text: 12% of text"]
    loaded.generate([fits, "3"])
    assert told() == []


def test_seeds_may_be_an_array(systems, tokenizer):
    loaded = generator(systems["llm"], tokenizer)
    settings = {"search": Search(temperature=1.0)}
    expected = loaded.generate(["the fox", "a dog"], seeds=[3, 4], **settings)
    assert loaded.generate(["the fox", "a dog"], seeds=np.array([3, 4]), **settings) == expected
    assert loaded.generate([], seeds=np.array([], int), **settings) == []
    with pytest.raises(ValueError, match="seeds -1 to 4: expected 0 to 4294967295"):
        loaded.generate(["the fox", "a dog"], seeds=np.array([-1, 4]), **settings)


def test_one_string_is_no_list_of_prompts(systems, tokenizer):
    loaded = generator(systems["llm"], tokenizer)
    with pytest.raises(TypeError, match=r"prompts: .* got one string: did you mean \['one'\]"):
        loaded.generate("one")
    with pytest.raises(TypeError, match="prompts: expected strings, number 1 is of type NoneType"):
        loaded.generate(["one", None])
    with pytest.raises(TypeError, match="prompt: expected strings, number 0 is of type list"):
        next(loaded.stream(["one"]))
    for seeds in ("12", 3):
        with pytest.raises(TypeError, match="seeds: expected a sequence of integers"):
            loaded.generate(["one", "two"], seeds=seeds)
    prompts = ["the fox", "a dog"]
    assert loaded.generate(iter(prompts)) == loaded.generate(prompts)


def test_half_a_character_is_a_replacement_character(systems, tokenizer):
    loaded = generator(systems["llm"], tokenizer)
    half, right = "the \ud83d fox", "the \ufffd fox"
    assert loaded.generate([half]) == loaded.generate([right])
    assert "".join(loaded.stream(half)) == "".join(loaded.stream(right))


def test_the_progress_bar_counts_what_has_been_decoded(systems, tokenizer):
    loaded, events = generator(systems["llm"], tokenizer, batch_size=2), []
    decode = loaded._decode
    with (
        mock.patch("l2s_jax.serving.generator.tqdm") as bar,
        mock.patch.object(
            loaded, "_decode", side_effect=lambda *a: events.append("decode") or decode(*a)
        ),
    ):
        bar.return_value.__enter__.return_value.update.side_effect = events.append
        loaded.generate(["the fox", "a dog", "jumps"], description="generating")
    # The second batch is begun once the first is there.
    assert events == ["decode", "decode", 2, 1]


def test_the_devices_are_at_a_batch_while_the_texts_of_the_one_before_are_made(systems, tokenizer):
    order = []
    generate = generator(systems["llm"], tokenizer, batch_size=2)
    decode, outputs_of = generate._decode, outputs.outputs_of

    def decoding(*arguments):
        order.append("decode")
        return decode(*arguments)

    def making(*arguments):
        order.append("texts")
        return outputs_of(*arguments)

    with (
        mock.patch.object(generate, "_decode", decoding),
        mock.patch("l2s_jax.serving.generator.outputs_of", making),
    ):
        found = generate.generate(WORDS[:6])
    assert order == ["decode", "decode", "texts", "decode", "texts", "texts"]
    assert found == [one for word in WORDS[:6] for one in generate.generate([word])]


def test_a_response_ends_with_the_token_that_completes_a_stop_text(systems, tokenizer):
    loaded, prompt = generator(systems["llm"], tokenizer), ["the quick brown fox"]
    cut = [loaded.generate(prompt, max_new_tokens=count)[0].text for count in range(1, 7)]
    stop = cut[-1][2:5]
    (stopped,) = loaded.generate(prompt, search=Search(stop=(stop,)))
    assert stopped.text == cut[-1].split(stop)[0] != cut[-1]
    # All six tokens come in the chunk after the first token.
    assert stopped.tokens == 1 + next(i for i, text in enumerate(cut) if stop in text) < 6


def test_beams_take_each_others_responses_and_leave_the_prompt():
    random, parents = np.random.default_rng(0), np.array([[1, 1, 0], [2, 0, 2]])
    slots = random.standard_normal((6, 2, 7, 3)).astype(np.float32)
    mask = np.ones((6, 4), bool)
    layers = (KeyValue(slots, slots + 1),)
    positions = np.zeros((6, 4), np.int32)
    cache = CausalCache(jnp.int32(0), mask, positions, positions[:, 0], layers)
    (taken,) = take_hypotheses(cache, jnp.asarray(parents)).layers
    rows = (parents + np.array([[0], [3]])).reshape(-1)
    for got, had in ((taken.key, slots), (taken.value, slots + 1)):
        np.testing.assert_array_equal(got[:, :, :4], had[:, :, :4])
        np.testing.assert_array_equal(got[:, :, 4:], had[rows, :, 4:])


def test_a_beam_search_of_one_token_has_no_slots_for_responses():
    config = GPT2Config(
        vocab_size=48, width=16, num_heads=2, num_layers=1, max_positions=20, pad_id=0, eos_id=1
    )
    system = LanguageModel("slm", config)
    numbers = small.NumberTokenizer()
    settings = {"prompt_lengths": (8,), "max_new_tokens": 1, "batch_size": 2}
    params = small.make_params(system)[0]
    loaded = Generator(system, params, {}, numbers, numbers, **settings)
    (greedy,) = loaded.generate(["3 4 5"])
    (best,) = loaded.generate(["3 4 5"], search=Search(num_beams=3, num_return=2))
    assert (best.text, best.tokens) == (greedy.text, 1) and len(best.others) == 1


@pytest.mark.parametrize("process", [0, 1])
def test_of_a_file_that_all_see_each_process_reads_its_own_prompts(process, tmp_path, monkeypatch):
    path = tmp_path / "in.txt"
    path.write_text("a\nb\n\nc\nd\n")
    config = tasks_config()
    task = load_task(config.task)
    everything = [({"text": text}, not text) for text in ("a", "b", "", "c", "d")]
    given = {0: "a", 1: "b", 3: "c", 4: "d"}
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    kept = everything if process == 0 else []
    for seen in (True, False):
        exchange = lambda value: [value, value if seen else None]  # noqa: B023, E731
        monkeypatch.setattr(generate_file.distributed, "exchange", exchange)
        # What another process gives is what it would give here.
        read = []
        monkeypatch.setattr(
            generate_file.distributed,
            "on_primary",
            lambda act: read.append(0) or list(given.items()) if process else act(),  # noqa: B023
        )
        for on_mesh in (False, True):
            mesh = mock.Mock(is_multi_process=on_mesh)
            monkeypatch.setattr(generate_file, "_decoding_mesh", lambda config: mesh)  # noqa: B023
            asked = generate_file._asked(str(path), task, "text", config)
            apart = seen and not on_mesh
            own = {place: text for place, text in given.items() if place % 2 == process}
            assert asked == (kept, own if apart else given, apart)
        assert len(read) == (2 if process and not seen else 0)
    assert not generate_file._is_seen_by_all(str(tmp_path / "none.txt"))
    assert not generate_file._is_seen_by_all("-")


def tasks_config():
    config = default()
    config.task.update(name="toy", source="jsonl", prompt="{text}", response="text")
    config.task.update(splits={"test": "test.jsonl"}, blank_rows="skip")
    return config
