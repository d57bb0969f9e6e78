"""Responses as they come, what ends them, and the few programs that all requests share."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import glob
import itertools
import re
import resource
from typing import ClassVar

import jax
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from l2s_jax.decoding.loop import CHUNK, decoding_steps
from l2s_jax.models.systems import LanguageModel
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.text import Offsets, ResponseText
from l2s_jax.settings.search import Search
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

TEXTS = ["the quick brown fox", "jumps över the lazy dog", "naïve café", "日本語 한국어", "🙂🙃"]
NEW = 21


class Bytes:
    """A byte-level tokenizer, as GPT-2's: most characters of TEXTS are several tokens."""

    pad_id, eos_id, end_ids = 0, 1, (1,)
    is_chat = False
    fingerprint = identity = "bytes"

    def __init__(self):
        hub = HubTokenizer(models.BPE())
        hub.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        hub.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        hub.train_from_iterator(
            ["the the fox fox"],
            trainers.BpeTrainer(
                vocab_size=264, initial_alphabet=alphabet, special_tokens=["<pad>", "<eos>"]
            ),
        )
        self.hub, self.vocab_size = hub, hub.get_vocab_size()
        self.pieces = [hub.id_to_token(id) for id in range(self.vocab_size)]

    def encode_prompts(self, texts):
        return [[*self.hub.encode(text).ids, self.eos_id] for text in texts]

    encode_responses = encode_prompts

    def decode(self, ids):
        return self.hub.decode(list(ids), skip_special_tokens=True)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    pieces = train_sentencepiece(
        TEXTS * 3,
        vocab_size=130,
        directory=str(tmp_path_factory.mktemp("tokenizer")),
        model_type="bpe",
    )
    return {"pieces": pieces, "bytes": Bytes()}


@pytest.mark.parametrize("name", ["pieces", "bytes"])
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_pieces_make_up_the_text_and_end_between_characters(name, tokenizers, data):
    tokenizer = tokenizers[name]
    text = data.draw(
        st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4).map(" ".join)
        | st.text("the fox ö日🙂\n", max_size=20)
    )
    (ids,) = tokenizer.encode_responses([text])
    cuts = sorted({*data.draw(st.lists(st.integers(0, len(ids)))), len(ids)})
    response = ResponseText(tokenizer)
    pieces = [response.extend(np.array(ids[:cut], np.int32), last=cut == len(ids)) for cut in cuts]
    assert "".join(pieces) == response.text == tokenizer.decode(ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


class Hub:
    """What decodes as a tokenizer.json does."""

    def __init__(self, model, trainer, pre_tokenizer, decoder):
        self.hub = HubTokenizer(model)
        self.hub.pre_tokenizer, self.hub.decoder = pre_tokenizer, decoder
        self.hub.train_from_iterator([*TEXTS, "don't , x . !"] * 3, trainer)
        self.vocab_size = self.hub.get_vocab_size()
        self.pieces = [self.hub.id_to_token(id) for id in range(self.vocab_size)]

    def decode(self, ids):
        # Bytes were given to the trainer as special tokens, and are none.
        return self.hub.decode(list(ids), skip_special_tokens=False)


@functools.cache
def hub_tokenizers():
    """Decoders that put spaces by what stands beside a token, and bytes that may be no text."""
    byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
    fallback = [
        decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return {
        "words": Hub(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(
                vocab_size=120, special_tokens=["[UNK]"], show_progress=False
            ),
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(cleanup=True),
        ),
        "spaces": Hub(
            models.BPE(unk_token="<unk>"),
            trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>"]),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        ),
        "fallback": Hub(
            models.BPE(unk_token="<unk>", byte_fallback=True),
            trainers.BpeTrainer(vocab_size=380, special_tokens=["<unk>", *byte_names]),
            pre_tokenizers.Metaspace(),
            decoders.Sequence(fallback),
        ),
        "suffixes": Hub(
            models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
            trainers.BpeTrainer(
                vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>"
            ),
            pre_tokenizers.Whitespace(),
            decoders.BPEDecoder(),
        ),
    }


@pytest.mark.parametrize("name", ["pieces", "bytes", "words", "spaces", "fallback", "suffixes"])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_tokens_in_any_pieces_make_up_their_text(name, tokenizers, data):
    tokenizer = (tokenizers | hub_tokenizers())[name]
    ids = data.draw(st.lists(st.integers(2, tokenizer.vocab_size - 1), min_size=1, max_size=30))
    cuts = sorted({*data.draw(st.lists(st.integers(1, len(ids)))), len(ids)})
    response = ResponseText(tokenizer)
    pieces = [response.extend(np.array(ids[:cut], np.int32), last=cut == len(ids)) for cut in cuts]
    assert "".join(pieces) == response.text == tokenizer.decode(ids)


def byte_texts():
    """Texts with characters that are no pieces: their bytes are, and some lack a few of them."""
    pieces = hub_tokenizers()["fallback"].pieces

    def ids_of(text):
        return [pieces.index(f"<0x{byte:02X}>") for byte in text.encode()]

    letters = [[pieces.index(piece)] for piece in ("x", "a", "\N{LOWER ONE EIGHTH BLOCK}")]
    emoji = [ids_of(text) for text in ("\U0001f389", "\U0001f468\u200d\U0001f467", "\u00e9")]
    parts = [*letters, *emoji, *emoji, emoji[0][:2], emoji[0][3:]]
    return st.lists(st.sampled_from(parts), min_size=1, max_size=12).map(
        lambda chosen: [id for part in chosen for id in part]
    )


@settings(deadline=None, max_examples=300)
@given(ids=byte_texts(), size=st.integers(1, 8))
def test_characters_of_many_bytes_come_whole(ids, size):
    tokenizer = hub_tokenizers()["fallback"]
    response, offsets = ResponseText(tokenizer), Offsets(tokenizer)
    pieces = [
        response.extend(np.array(ids[:end], np.int32), last=end >= len(ids))
        for end in range(size, len(ids) + size, size)
    ]
    assert "".join(pieces) == response.text == tokenizer.decode(ids)
    begins = [len(tokenizer.decode(ids[:count])) for count in range(len(ids))]
    assert [offsets.add(id) for id in ids] == begins


@settings(deadline=None, max_examples=300)
@given(ids=byte_texts(), stop=st.sampled_from(["x", "a x", "\U0001f389", "\u00e9x"]))
def test_where_a_stop_text_is_does_not_depend_on_the_steps(ids, stop):
    def ended(size):
        response = ResponseText(hub_tokenizers()["fallback"], [stop])
        for end in range(size, len(ids) + size, size):
            response.extend(np.array(ids[:end], np.int32), last=end >= len(ids))
            if response.stopped:
                break
        return response.text, response.tokens, response.stopped

    assert len({str(ended(size)) for size in (1, 2, 3, 8, len(ids))}) == 1


@settings(deadline=None, max_examples=80)
@given(
    text=st.text("abc ", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    size=st.integers(1, 8),
)
def test_nothing_is_said_from_the_first_stop_on(text, stop, size, tokenizers):
    tokenizer = tokenizers["bytes"]
    ids = tokenizer.encode_responses([text])[0][:-1]
    response, said = ResponseText(tokenizer, stop), ""
    for end in range(size, len(ids) + size, size):
        said += response.extend(np.array(ids[:end], np.int32), last=end >= len(ids))
        if response.stopped:
            break
    # A token is a character: whatever the pieces are, the first with which there is a stop ends it.
    ends = [count for count in range(len(ids) + 1) if any(s in text[:count] for s in stop)]
    seen = text[: ends[0]] if ends else text
    expected = min((seen[: seen.find(s)] for s in stop if s in seen), key=len, default=text)
    assert said == response.text == expected
    assert response.stopped == bool(ends)
    assert len(response.tokens) == (ends[0] if ends else len(ids))


@pytest.fixture(scope="module")
def systems():
    """name -> (system, trained, frozen) that say bytes."""
    made = {}
    for name in ("llm", "add"):
        system = small.make_system(name, vocab_size=264)
        if name == "add":
            llm = dataclasses.replace(system.llm_config, vocab_size=264)
            system = dataclasses.replace(system, llm_config=llm)
        made[name] = (system, *small.make_params(system))
    return made


def generator(systems, name, tokenizer, **changes):
    arguments = {"prompt_lengths": (16, 32), "max_new_tokens": NEW, "batch_size": 4} | changes
    return Generator(*systems[name], tokenizer, tokenizer, **arguments)


SAMPLING = Search(temperature=1.0, top_k=40)


@pytest.mark.parametrize("search", [Search(), SAMPLING])
@pytest.mark.parametrize("name", ["llm", "add"])
def test_a_stream_is_what_generate_gives(name, search, systems, tokenizers):
    model = generator(systems, name, tokenizers["bytes"])
    outputs = model.generate(TEXTS, search=search, seeds=range(5))
    assert len({output.text for output in outputs}) > 2
    for seed, (prompt, output) in enumerate(zip(TEXTS, outputs, strict=True)):
        pieces = list(model.stream(prompt, search=search, seed=seed))
        assert "".join(pieces) == output.text
        assert len(pieces) > 1 or not output.text.strip()


@pytest.mark.parametrize("name", ["llm", "add"])
def test_a_stop_text_ends_a_response(name, systems, tokenizers):
    model = generator(systems, name, tokenizers["bytes"])
    seeds = range(5)
    whole = model.generate(TEXTS, search=SAMPLING, seeds=seeds)
    # A character that some of the responses have.
    counts = {c: sum(c in output.text for output in whole) for c in "".join(o.text for o in whole)}
    stop = max((c for c in counts if counts[c] < 5), key=counts.get)
    search = dataclasses.replace(SAMPLING, stop=stop)
    assert search.stop == (stop,)
    stopped = model.generate(TEXTS, search=search, seeds=seeds)
    for seed, (prompt, before, after) in enumerate(zip(TEXTS, whole, stopped, strict=True)):
        assert after.text == before.text.split(stop)[0]
        assert after.cut == (before.cut and stop not in before.text)
        assert "".join(model.stream(prompt, search=search, seed=seed)) == after.text
    assert [o.text for o in stopped] != [o.text for o in whole]


def test_beams_give_the_others_too(systems, tokenizers):
    search = Search(num_beams=4, num_return=3)
    model = generator(systems, "add", tokenizers["bytes"], search={"num_beams": 4, "num_return": 3})
    outputs = model.generate(TEXTS)
    for output in outputs:
        scores = [output.score, *(other.score for other in output.others)]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        assert all(other.others == () for other in output.others)
    assert model.search == search
    alone = generator(systems, "add", tokenizers["bytes"], batch_size=1, prompt_lengths=(32,))
    again = [alone.generate([prompt], search=search)[0] for prompt in TEXTS]
    assert [o.text for o in again] == [o.text for o in outputs]
    with pytest.raises(ValueError, match="num_beams=4: expected 1"):
        next(model.stream(TEXTS[0]))


PENALTIES = Search(
    temperature=0.9, top_p=0.95, repetition_penalty=1.3, no_repeat_ngram_size=3, min_new_tokens=5
)


@pytest.mark.parametrize(
    ("name", "search"), [("add", Search()), ("add", PENALTIES), ("llm", SAMPLING)]
)
@settings(deadline=None, max_examples=20)
@given(
    limit=st.integers(1, NEW),
    prompts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=6),
    batch_size=st.sampled_from([1, 3, 4]),
)
def test_fewer_new_tokens_are_a_beginning(
    name, search, limit, prompts, batch_size, systems, tokenizers
):
    model = generator(systems, name, tokenizers["bytes"], batch_size=batch_size)
    full = generator(systems, name, tokenizers["bytes"])
    outputs = model.generate(prompts, search=search, max_new_tokens=limit)
    for seed, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        (whole,) = full.generate([prompt], search=search, seeds=[seed])
        assert output.tokens == min(limit, whole.tokens)
        assert output.cut == (whole.cut or whole.tokens > limit)
        incomplete = "\N{REPLACEMENT CHARACTER}"
        assert whole.text.startswith(output.text.rstrip(incomplete))


@pytest.mark.parametrize("limit", [0, -1, NEW + 1])
def test_a_limit_that_was_not_compiled_for_is_refused(limit, systems, tokenizers):
    model = generator(systems, "llm", tokenizers["bytes"])
    with pytest.raises(ValueError, match=f"max_new_tokens={limit}: expected 1 to {NEW}"):
        model.generate(TEXTS, max_new_tokens=limit)
    with pytest.raises(ValueError, match="2 seeds: expected one per prompt, 5"):
        model.generate(TEXTS, seeds=[1, 2])
    with pytest.raises(ValueError, match="seeds -1 to 3: expected 0 to 4294967295"):
        model.generate(TEXTS, seeds=[-1, 0, 1, 2, 3])


@dataclasses.dataclass(frozen=True)
class Counted(LanguageModel):
    """Counts the programs that are compiled of it."""

    prefills: ClassVar[list] = []

    def prefill(self, *args):
        self.prefills.append(args[2].shape)
        return super().prefill(*args)


def host_events(directory, call):
    """name -> times that a profile of call() has a Python function or an execution of a program."""
    # A collection would call what other tests left to be called then.
    gc.collect()
    gc.disable()
    try:
        with jax.profiler.trace(directory):
            call()
    finally:
        gc.enable()
    (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(path).planes}
    names = (event.name for line in planes["/host:CPU"].lines for event in line.events)
    # Other events are the operations of a program, which has the host for its device.
    return collections.Counter(
        name for name in names if re.match(r"\$|PjitFunction\(|.*::ExecuteHelper", name)
    )


def test_the_host_executes_one_program_however_many_tokens_there_are(tmp_path):
    system, tokenizer = LanguageModel("llm", small.t5_config()), small.NumberTokenizer()
    tokenizer.end_ids = ()
    settings = {"prompt_lengths": (8,), "max_new_tokens": 400, "batch_size": 1}
    model = Generator(system, *small.make_params(system), tokenizer, tokenizer, **settings)

    def request(tokens):
        (output,) = model.generate(["5 6 7"], max_new_tokens=tokens)
        assert output.tokens == tokens

    def executions(events):
        return {name: count for name, count in events.items() if not name.startswith("$")}

    request(260)
    few, many = (
        host_events(str(tmp_path / str(tokens)), lambda tokens=tokens: request(tokens))
        for tokens in (260, 400)  # of one program
    )
    (helper,) = (name for name in many if name.endswith("::ExecuteHelperOnSingleDevice"))
    for events in (few, many):
        assert executions(events).keys() == {"PjitFunction(decode)", helper}
        assert events[helper] == 1
    assert executions(few) == executions(many)
    # Nor has Python anything to do for each of 140 tokens more.
    assert few.total() > 300
    assert (many - few).total() < 140, many - few

    list(model.stream("5 6 7"))
    events = host_events(str(tmp_path / "stream"), lambda: list(model.stream("5 6 7")))
    chunks = decoding_steps(400) // CHUNK
    assert events[helper] > chunks, "executions of several programs would not be seen"


def resident_kib():
    """Memory that this process has now; its peak may be that of an earlier test."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


def test_ten_thousand_requests_compile_no_more_than_the_buckets_and_hold_no_memory(compilations):
    config = small.t5_config(width=8, num_heads=1, head_width=8, feed_forward_width=8)
    system = Counted("llm", config)
    trained, _ = small.make_params(system)
    tokenizer = small.NumberTokenizer()
    settings = {"prompt_lengths": (8, 16), "max_new_tokens": 32}
    model = Generator(system, trained, {}, tokenizer, tokenizer, batch_size=4, **settings)
    stop = Search(stop=("23",))
    alone = Generator(
        system, trained, {}, tokenizer, tokenizer, batch_size=1, search=stop, **settings
    )
    random = np.random.default_rng(0)
    Counted.prefills.clear()
    compilations.clear()
    assert model.warm_up() == len(Counted.prefills) == 2 * 2 * 2
    assert len(compilations) == 8
    assert model.warm_up(stream=True) == 1 * 2 * 2
    assert len(Counted.prefills) == 8 + 4
    # A program for the prompt and the first token, and one for a chunk of the others.
    assert len(compilations) == 8 + 2 * 4
    # One row at a time, programs that stop at a text are those that stream.
    alone.warm_up()
    assert (len(Counted.prefills), len(compilations)) == (12, 16)
    for prompt in ("5 6 7", "5 6 7 8 9 10 11 12 13"):
        for limit in (2, 20):
            list(model.stream(prompt, max_new_tokens=limit))

    def prompt():
        return " ".join(map(str, random.integers(3, 48, random.integers(1, 16))))

    stopped = []

    def request(number):
        limit = int(random.integers(1, 33))
        if number % 40 == 0:
            pieces = model.stream(prompt(), max_new_tokens=limit)
            # Some callers leave before the end.
            list(itertools.islice(pieces, 1 if number % 80 else None))
        elif number % 40 == 20:
            (output,) = alone.generate([prompt()], max_new_tokens=limit)
            stopped.append(output.tokens < limit and not output.cut)
        else:
            model.generate([prompt() for _ in range(random.integers(1, 5))], max_new_tokens=limit)

    for number in range(2000):
        request(number)
    # Memory first: that collects what other tests have left, which would be missed later.
    resident, arrays = resident_kib(), len(jax.live_arrays())
    for number in range(2000, 10000):
        request(number)
    assert len(Counted.prefills) == 8 + 4
    assert len(compilations) == 8 + 2 * 4
    assert len(stopped) == 250 and any(stopped)
    grown = resident_kib() - resident
    assert len(jax.live_arrays()) == arrays
    assert grown < 8 * 1024, f"{grown} KiB more after 8000 more requests"
