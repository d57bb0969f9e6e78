"""Metrics against values computed by hand, brute force, and the libraries' single-example calls."""

import math
import sys
import types
from collections import Counter
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.bleu import _TOKENIZERS
from sacrebleu.tokenizers import tokenizer_spm

from l2s_jax.data.templates import Template
from l2s_jax.evaluation import comet, metrics, rouge
from l2s_jax.settings.evaluation import BLEU_TOKENIZERS, bleu_tokenizer
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

WORDS = st.sampled_from(["a", "dog", "runs", "Runs", "fast", "home", "."])
SENTENCE = st.lists(WORDS, min_size=1, max_size=9).map(" ".join)
OF_TEXT = tuple(name for name in metrics.METRICS if name != "comet")
CORPUS = st.lists(
    st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4)), min_size=1, max_size=5
)


def brute_force_bleu(predictions, references):
    """Corpus BLEU with exponential smoothing, written from its definition."""
    matched, total = [0] * 4, [0] * 4
    length = reference_length = 0
    for prediction, group in zip(predictions, references, strict=True):
        words, others = prediction.split(), [r.split() for r in group]
        length += len(words)
        reference_length += min((abs(len(o) - len(words)), len(o)) for o in others)[1]
        for n in range(1, 5):
            grams = [
                Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1))
                for x in (words, *others)
            ]
            total[n - 1] += sum(grams[0].values())
            matched[n - 1] += sum(min(c, max(o[g] for o in grams[1:])) for g, c in grams[0].items())
    if not any(matched) or not all(total):
        return 0.0
    logs, smooth = [], 1.0
    for hits, count in zip(matched, total, strict=True):
        if not hits:
            smooth *= 2
        logs.append(math.log(hits / count if hits else 1 / (smooth * count)))
    return 100 * min(1, math.exp(1 - reference_length / length)) * math.exp(sum(logs) / 4)


def evaluate(*arguments, **settings):
    return metrics.measure(*arguments, **settings).quality


@settings(max_examples=60, deadline=None)
@given(CORPUS)
def test_bleu_with_varying_numbers_of_references_equals_brute_force(corpus):
    predictions, references = zip(*corpus, strict=True)
    score = evaluate(["bleu"], predictions, references)["bleu"]
    assert score == pytest.approx(brute_force_bleu(predictions, references), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4))
def test_chrf_takes_the_best_reference_of_an_example(prediction, group):
    score = evaluate(["chrf"], [prediction], [group])["chrf"]
    best = max(CHRF().sentence_score(prediction, [r]).score for r in group)
    assert score == pytest.approx(best, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(CORPUS)
def test_repeating_a_reference_changes_no_metric(corpus):
    predictions, references = zip(*corpus, strict=True)
    repeated = [[*group, *group[: i % 3]] for i, group in enumerate(references)]
    first = evaluate(OF_TEXT, predictions, references)
    assert evaluate(OF_TEXT, predictions, repeated) == pytest.approx(first)
    assert all(0 <= value <= 100 + 1e-9 for value in first.values())


def test_bleu_is_cased_and_splits_punctuation_as_13a():
    reference = [["The dog runs home today."]]
    assert evaluate(["bleu"], ["The dog runs home today."], reference)["bleu"] == (
        pytest.approx(100)
    )
    assert evaluate(["bleu"], ["the dog runs home today."], reference)["bleu"] < 99
    assert evaluate(["bleu"], ["The dog runs home today ."], reference)["bleu"] == (
        pytest.approx(100)
    )


def test_rouge_by_hand():
    scores = evaluate(
        ["rouge1", "rouge2", "rougeL"], ["the cats sat down"], [["the cat lay down there"]]
    )
    # Stemmed overlap: the, cat, down; bigrams: the cat; the common subsequence has 3 words.
    assert scores["rouge1"] == pytest.approx(100 * 2 * 3 / (4 + 5))
    assert scores["rouge2"] == pytest.approx(100 * 2 * 1 / (3 + 4))
    assert scores["rougeL"] == pytest.approx(100 * 2 * 3 / (4 + 5))


def test_rouge_takes_the_best_reference_for_each_metric_and_averages_examples():
    predictions = ["a b c d", "x"]
    references = [["d c b a", "a b"], ["y"]]
    scores = evaluate(["rouge1", "rouge2"], predictions, references)
    assert scores["rouge1"] == pytest.approx((100 + 0) / 2)
    assert scores["rouge2"] == pytest.approx((100 * 2 * 1 / (3 + 1) + 0) / 2)


def test_rouge_lsum_forgives_the_order_of_sentences_and_rouge_l_does_not():
    prediction, reference = "One cat slept. Two dogs ran!", "Two dogs ran! One cat slept."
    scores = evaluate(["rougeL", "rougeLsum"], [prediction], [[reference]])
    assert scores["rougeLsum"] == pytest.approx(100)
    assert scores["rougeL"] == pytest.approx(50)
    lines = evaluate(["rougeLsum"], ["one cat slept\ntwo dogs ran"], [[reference]])
    assert lines["rougeLsum"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two", ["One.", "Two"]),
        ('He said "no." She left?  Yes!', ['He said "no."', "She left?", "Yes!"]),
        ("Pay 3.50 at a.b.c now", ["Pay 3.50 at a.b.c now"]),
        ("one\ntwo", ["one", "two"]),
        ("", [""]),
        ("彼は行った。「はい。」と 彼。", ["彼は行った。", "「はい。」", "と 彼。"]),
        ("वह गया। वह आया।", ["वह गया।", "वह आया।"]),
    ],
)
def test_sentences(text, lines):
    assert rouge.split_sentences(text).split("\n") == lines


def test_exact_match_strips_and_accepts_any_reference():
    predictions = [" yes \n", "Yes", "no", ""]
    references = [["yes"], ["yes"], ["nein", "no "], ["", "x"]]
    assert evaluate(["exact_match"], predictions, references) == {"exact_match": 75.0}


def test_empty_text_scores_zero_without_failing():
    scores = evaluate(OF_TEXT, ["", "..."], [["a dog"], ["", "!"]])
    assert scores == dict.fromkeys(OF_TEXT, 0.0)


def test_only_what_was_asked_for_in_that_order():
    names = ["exact_match", "rougeL", "bleu"]
    scores = evaluate(names, ["a"], [["a"]])
    assert list(scores) == names and all(type(value) is float for value in scores.values())
    assert list(metrics.signatures(names)) == names


def test_signatures_equal_those_of_a_scored_metric():
    predictions, references = ["a b", "c"], [["a b"], ["c", "d"]]
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        metric.corpus_score(predictions, [["a b", "c"], [None, "d"]])
        assert metrics.signatures([name], references)[name] == str(metric.get_signature())
    assert "nrefs:1|case:mixed|" in metrics.signatures(["bleu"], [["a"], ["b"]])["bleu"]
    assert "nrefs" not in metrics.signatures(["bleu"])["bleu"]
    assert "stemmer:porter" in metrics.signatures(["rouge2"])["rouge2"]


@pytest.mark.parametrize(
    ("names", "predictions", "references", "part"),
    [
        (["blue"], ["a"], [["a"]], "'blue'"),
        (["bleu"], [], [], "no predictions"),
        (["bleu"], ["a", "b"], [["a"]], "2 predictions"),
        (["bleu"], ["a", "b"], [["a"], []], "prediction 1 are []"),
        (["bleu"], ["a"], ["a"], "prediction 0 are 'a'"),
    ],
)
def test_bad_input_is_named_in_one_line(names, predictions, references, part):
    with pytest.raises(ValueError, match="expected") as error:
        evaluate(names, predictions, references)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_one_string_is_no_list_of_texts():
    for names, predictions, argument in (("bleu", ["a"], "names"), (["bleu"], "a", "predictions")):
        with pytest.raises(TypeError, match=f"{argument}: expected a sequence of strings"):
            evaluate(names, predictions, [["a"]])


# Equal to the reference, and another sentence.
SENTENCES = {
    "ja": ("彼は昨日、東京へ行きました。", "猫が窓の外を見ている"),
    "zh": ("他昨天去了北京。", "猫正在看窗外"),
    "ko": ("그는 어제 서울에 갔습니다.", "고양이가 창밖을 보고 있다"),
    "hi": ("वह कल दिल्ली गया था।", "बिल्ली खिड़की से बाहर देख रही है"),
    "ru": ("Вчера он уехал в Москву.", "Кошка смотрит из окна"),
    "ar": ("ذهب إلى القاهرة أمس.", "القطة تنظر من النافذة"),
    "th": ("เขาไปกรุงเทพเมื่อวานนี้", "แมวมองออกไปนอกหน้าต่าง"),
    "el": ("Χθες πήγε στην Αθήνα.", "Σήμερα βρέχει πολύ"),
    "he": ("הוא נסע אתמול לחיפה.", "החתול מביט מהחלון"),
}


@pytest.mark.parametrize("language", SENTENCES)
def test_rouge_of_scripts_without_latin_letters_is_never_a_silent_zero(language):
    text, other = SENTENCES[language]
    names = [name for name in metrics.METRICS if name.startswith("rouge")]
    scores = evaluate(names, [text, other], [[text], [text]])
    for name in names:
        assert 50 <= scores[name] < 75, name
    same = evaluate(names, [text], [[text]])
    assert same == pytest.approx(dict.fromkeys(names, 100.0))
    for name in names:
        assert "tok:lowercase-all-scripts" in metrics.signatures([name], [[text]])[name]
        assert "tok:lowercase-a-z0-9" in metrics.signatures([name], [["a π"]])[name]


def test_words_of_all_scripts_by_hand():
    tokens = rouge._AllScripts().tokenize
    assert tokens("Вчера, он ушёл!") == ["вчера", "он", "ушёл"]
    assert tokens("東京Tower へ2024年") == ["東", "京", "tower", "へ", "2024", "年"]
    assert tokens("दिल्ली गया।") == ["दिल्ली", "गया"]
    assert tokens("ก็ดี") == ["ก็", "ดี"]
    assert tokens("서울에 갔습니다.") == ["서울에", "갔습니다"]
    scores = evaluate(["rouge1"], ["кот сел дом"], [["кот встал"]])
    assert scores["rouge1"] == pytest.approx(100 * 2 * 1 / (3 + 2))


LATIN = st.text(
    st.characters(max_codepoint=0x24F, categories=["Lu", "Ll", "Nd", "P", "Zs"])
    | st.sampled_from("aeioubcd \u0301\u0308.,!?")
).filter(lambda text: "\xb5" not in text)


@settings(max_examples=200, deadline=None)
@given(LATIN)
def test_words_of_latin_text_are_those_of_the_published_scorer(text):
    assert rouge._AllScripts().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(LATIN, LATIN), min_size=1, max_size=4))
def test_scores_of_latin_text_are_those_of_the_published_scorer(pairs):
    names = ["rouge1", "rouge2", "rougeL"]
    predictions, references = zip(*pairs, strict=True)
    found = evaluate(names, predictions, [[r] for r in references])
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in pairs]
    for name in names:
        expected = 100 * sum(score[name].fmeasure for score in scores) / len(pairs)
        assert found[name] == pytest.approx(expected)


def test_a_stray_letter_of_another_script_changes_no_score_of_english():
    pair = ["the π of it"], [["the φ of it"]]
    assert evaluate(["rouge1"], *pair)["rouge1"] == 100


@pytest.mark.parametrize(
    ("setting", "language", "expected"),
    [
        ("auto", "", "13a"),
        ("auto", "de", "13a"),
        ("auto", "zh-Hans", "zh"),
        ("auto", "zho_Hant", "zh"),
        ("auto", "ja", "ja-mecab"),
        ("auto", "kor", "ko-mecab"),
        ("auto", "th", "flores200"),
        ("char", "ja", "char"),
    ],
)
def test_the_tokenizer_of_bleu_is_that_of_the_language(setting, language, expected):
    assert bleu_tokenizer(setting, language) == expected


def test_tokenizers_are_those_of_sacrebleu():
    # "spm" is an old name of flores101.
    assert set(BLEU_TOKENIZERS) - {"auto"} == set(_TOKENIZERS) - {"spm"}


@pytest.mark.parametrize("tokenizer", ["zh", "char", "intl"])
def test_bleu_is_sacrebleus_with_that_tokenizer(tokenizer):
    text, near = SENTENCES["zh"][0], "他昨天到了北京。"
    theirs = BLEU(tokenize=tokenizer)
    expected = theirs.corpus_score([near], [[text]]).score
    found = evaluate(["bleu"], [near], [[text]], tokenizer=tokenizer)
    assert found["bleu"] == pytest.approx(expected)
    signature = metrics.signatures(["bleu"], [[text]], tokenizer=tokenizer)["bleu"]
    assert signature == str(theirs.get_signature()) and f"tok:{tokenizer}" in signature
    same = evaluate(["bleu"], [text], [[text]], tokenizer="zh")
    assert same["bleu"] == pytest.approx(100)


def test_a_tokenizer_without_its_package_or_model_is_one_line(tmp_path, monkeypatch):
    def refused(tokenizer, *parts):
        with pytest.raises(ValueError) as error:
            metrics.check(["bleu"], tokenizer=tokenizer, comet_folder="")
        line = str(error.value)
        assert line.startswith(f"config.evaluation.bleu_tokenizer: {tokenizer!r} cannot be used: ")
        assert all(part in line for part in parts) and "\n" not in line

    for kind in ("ja", "ko"):
        module = f"sacrebleu.tokenizers.tokenizer_{kind}_mecab"
        with mock.patch(f"{module}.MeCab", None):
            refused(f"{kind}-mecab", f"pip install sacrebleu[{kind}]", "char")
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    for failure in (OSError("no route to host"), SystemExit(1)):
        with mock.patch.object(tokenizer_spm, "download_file", side_effect=failure):
            refused("flores200", str(failure))
    model = tmp_path / "models" / "flores200sacrebleuspm"
    model.parent.mkdir()
    model.write_bytes(b"half a model")
    refused("flores200")
    metrics.check(["chrf"], tokenizer="flores200", comet_folder="")


def test_bleu_by_pieces_of_a_sentencepiece_model(tmp_path, monkeypatch):
    thai = SENTENCES["th"]
    train_sentencepiece(thai * 9, vocab_size=40, directory=str(tmp_path), model_type="bpe")
    model = tmp_path / "models" / "flores200sacrebleuspm"
    model.parent.mkdir()
    (tmp_path / "spiece.model").rename(model)
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    metrics.check(["bleu"], tokenizer="flores200", comet_folder="")
    scores = evaluate(["bleu"], [thai[0]], [[thai[0]]], tokenizer="flores200")
    assert scores["bleu"] == pytest.approx(100)
    assert "tok:flores200" in metrics.signatures(["bleu"], tokenizer="flores200")["bleu"]


def test_text_without_spaces_is_told_where_bleu_takes_it_for_one_word(caplog):
    for language in ("ja", "zh", "th"):
        metrics.warn_of_spaces([SENTENCES[language]], "13a")
        (message,) = caplog.messages
        assert "set config.task.language" in message and "ja-mecab" in message
        caplog.clear()
        metrics.warn_of_spaces([SENTENCES[language]], "char")
    for language in ("ru", "ko", "hi"):
        metrics.warn_of_spaces([SENTENCES[language]], "13a")
    metrics.warn_of_spaces([["He said 東京 to the others."]], "13a")
    assert not caplog.messages


class FakeComet(types.ModuleType):
    """Stands for unbabel-comet: a score of how many characters are in common."""

    loaded = ()

    def load_from_checkpoint(self, path):
        self.loaded += (path,)
        return self

    def predict(self, samples, *, batch_size, gpus, progress_bar):
        assert batch_size > 0 and gpus in (0, 1) and not progress_bar
        scores = [len({*s["mt"]} & {*s["ref"]}) / 10 + len(s["src"]) / 1000 for s in samples]
        return types.SimpleNamespace(scores=scores, system_score=sum(scores) / len(scores))


@pytest.fixture
def comet_folder(tmp_path, monkeypatch):
    folder = tmp_path / "wmt22-comet-da"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "hparams.yaml").write_text("class_identifier: regression_metric\n")
    (folder / "checkpoints" / "model.ckpt").write_bytes(b"")
    module = FakeComet("comet")
    module.__spec__ = types.SimpleNamespace(name="comet")
    monkeypatch.setitem(sys.modules, "comet", module)
    # The package needs it; asked for its GPUs alone.
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    return str(folder)


def test_comet_sees_source_prediction_and_first_reference(comet_folder):
    metrics.check(["comet"], tokenizer="13a", comet_folder=comet_folder)
    template = Template("{{x}} to German: {en}!", {}, "key")
    prompts = [template.render({"en": text}) for text in ("a dog", "")]
    sources = comet.sources_of(template.fields, prompts)
    assert sources == ["a dog", ""]
    predictions, references = ["abc", "x"], [["ab", "abc"], ["x"]]
    arguments = {"comet_folder": comet_folder, "sources": sources}
    scores = evaluate(["comet", "exact_match"], predictions, references, **arguments)
    assert scores == {"comet": pytest.approx(100 * (0.205 + 0.1) / 2), "exact_match": 100.0}
    evaluate(["comet"], predictions, references, **arguments)
    module = sys.modules["comet"]
    assert module.loaded == (f"{comet_folder}/checkpoints/model.ckpt",)
    with mock.patch("importlib.metadata.version", return_value="2.2.7"):
        signature = metrics.signatures(["comet"], references, comet_folder=comet_folder)["comet"]
    assert signature == "unbabel-comet|model:wmt22-comet-da|multi-ref:first|version:2.2.7"


def test_what_comet_needs_is_asked_for_before_any_work(comet_folder, tmp_path, monkeypatch):
    def refused(folder, part):
        with pytest.raises(ValueError, match="expected") as error:
            metrics.check(["bleu", "comet"], tokenizer="13a", comet_folder=folder)
        assert part in str(error.value) and "\n" not in str(error.value)

    refused(str(tmp_path / "none"), "there is no hparams.yaml")
    monkeypatch.delitem(sys.modules, "comet")
    with mock.patch("importlib.util.find_spec", return_value=None):
        refused(comet_folder, "unbabel-comet")
    with pytest.raises(ValueError, match=r"expected one field in prompts, .* found a, b"):
        comet.sources_of(["a", "b"], [])
