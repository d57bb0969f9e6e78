import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from l2s_jax.data import synthetic

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "synthetic_task.md").read_text()
DIGEST = "a98caed7582298603c100dff3f17eb48ca58374833a31fcb57a3dda32fae288c"


def document_table(first_column: str) -> list[list[str]]:
    lines = iter(DOCUMENT.splitlines())
    for line in lines:
        if re.match(rf"\| {first_column} +\|", line):
            rows = itertools.takewhile(lambda row: row.startswith("|"), lines)
            return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][1:]
    raise AssertionError(f"no table {first_column}")


ROLES = document_table("role")
CLASSES = document_table("class")
STEPS = {bond: int(steps) for bond, steps in document_table("bond")}
TIMES = {row[0]: row[2] for row in document_table("Oru time word")}
QUESTION = {word: mood == "question" for word, mood in document_table("Oru mood word")}
NOUNS = {row[0]: row[1:] for row in document_table("Oru noun")}
ADJECTIVES = dict(document_table("Oru adjective"))
VERBS = {row[0]: row[1:] for row in document_table("Oru verb")}
ROLE_OF = {row[1]: row[0] for row in ROLES}


def phrases_of(oru: str) -> dict[str, dict]:
    """Groups words by their role vowel, which needs no word order."""
    phrases = {role: {"adjective": "", "noun": ""} for role, _, _ in ROLES}
    for word in oru.split()[1:-2]:
        if word[:-1] in NOUNS:
            phrases[ROLE_OF[word[-1]]]["noun"] = word[:-1]
        elif word[:-1] in ADJECTIVES:
            phrases[ROLE_OF[word[-1]]]["adjective"] = word[:-1]
        else:
            phrases[ROLE_OF[word[0]]]["particle"] = word[1:]
    return {role: phrase for role, phrase in phrases.items() if phrase["noun"]}


def classes_of(phrases: dict[str, dict]) -> dict[str, int]:
    """The only assignment of classes that agrees with every particle, by trying all of them."""
    consonants = [row[1] for row in CLASSES]
    found = []
    for numbers in itertools.product(range(3), repeat=len(phrases)):
        classes = dict(zip(phrases, numbers, strict=True))
        if all(
            classes[role] == consonants.index(rest)
            if (rest := phrases[role]["particle"]) in consonants
            else (classes[role] - classes[ROLE_OF[rest[1]]] - STEPS[rest[0]]) % 3 == 0
            for role in phrases
        ):
            found.append(classes)
    assert len(found) == 1
    return found[0]


def translate(oru: str) -> str:
    """Follows the numbered rules of the document, with its tables."""
    words = oru.split()
    phrases = phrases_of(oru)
    classes = classes_of(phrases)
    sun, _, stone = range(3)
    vowels = [row[2] for row in CLASSES]
    kesh = []
    for role, _, consonant in ROLES:
        if role not in phrases:
            continue
        noun, adjective = phrases[role]["noun"], phrases[role]["adjective"]
        middle = [NOUNS[noun][classes["agent"] != sun]]
        if adjective:
            middle.append(ADJECTIVES[adjective] + vowels[classes[role]])
            if classes[role] != stone:
                middle.reverse()
        text = " ".join([consonant + vowels[classes[role]], *middle])
        if role == "patient" and classes["patient"] == stone:
            kesh.insert(0, text)
        else:
            kesh.append(text)
    verbs = f"{TIMES[words[0]]}{vowels[classes['agent']]} {VERBS[words[-2]][classes['patient']]}"
    return " ".join([verbs, *kesh] if QUESTION[words[-1]] else [*kesh, verbs])


def digest() -> str:
    pairs = [pair for split in synthetic.SPLIT_SIZES for pair in synthetic.sentence_pairs(split)]
    return hashlib.sha256(repr(pairs).encode()).hexdigest()


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[tuple[str, str]]]:
    return {split: list(synthetic.sentence_pairs(split)) for split in synthetic.SPLIT_SIZES}


def test_every_translation_follows_the_document(pairs):
    for source, target in [*pairs["test"], *pairs["validation"], *pairs["train"][:2000]]:
        assert translate(source) == target


def test_documented_examples_are_the_generators(pairs):
    examples = re.findall(r"^Oru:  (.+)\nKesh: (.+)$", DOCUMENT, re.MULTILINE)
    assert len(examples) == 10
    assert examples[6:] == pairs["test"][:4]
    for source, target in examples:
        assert translate(source) == target


@pytest.mark.parametrize("table", [NOUNS, ADJECTIVES, VERBS])
def test_the_documents_lexicon_is_complete(table):
    code = {16: synthetic.NOUNS, 6: synthetic.ADJECTIVES, 15: synthetic.VERBS}[len(table)]
    assert list(table) == list(code)


def chain(anchor: str, *, mood: str = "ek") -> synthetic.Sentence:
    """The agent leans on the instrument, this on the patient, this on the free place."""
    phrase = synthetic.NounPhrase
    return synthetic.Sentence(
        "ehe",
        (
            phrase("agent", "instrument", "lip", bond="y"),
            phrase("recipient", "sun", "kap", "luhosh"),
            phrase("instrument", "patient", "pos", bond="y"),
            phrase("patient", "place", "hun", "hikash", bond="y"),
            phrase("place", anchor, "tut"),
        ),
        "miraru",
        mood,
    )


def test_one_distant_particle_decides_agreement_sense_and_order():
    sources = [synthetic.source_text(chain(anchor)).split() for anchor in synthetic.CLASSES]
    assert all(
        [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y] == [len(a) - 3]
        for a, b in itertools.combinations(sources, 2)
    )
    assert [synthetic.target_text(chain(anchor)) for anchor in synthetic.CLASSES] == [
        "la feil ma dissa dosk na zonda beisk sa vil ka zil esta veix",
        "lo grul mo disso dosk na zonda wem so vil ko zil esto greift",
        "me dosk disse le grul na zonda wem se vil ke zil este thoft",
    ]


def test_the_last_word_moves_the_verb_group_and_nothing_else():
    statement = synthetic.target_text(chain("sun", mood="ek")).split()
    question = synthetic.target_text(chain("sun", mood="et")).split()
    assert question == statement[-2:] + statement[:-2]


def test_bonds_add_up_along_the_chain():
    for bonds in itertools.product(synthetic.BONDS, repeat=3):
        sentence = chain("sea")
        agent, recipient, instrument, patient, place = sentence.phrases
        leaning = [
            synthetic.NounPhrase(p.role, p.anchor, p.noun, p.adjective, bond)
            for p, bond in zip((agent, instrument, patient), bonds, strict=True)
        ]
        phrases = (leaning[0], recipient, leaning[1], leaning[2], place)
        sentence = synthetic.Sentence("ehe", phrases, "miraru", "ek")
        steps = bonds.count("v")
        assert synthetic.agreement_classes(sentence)["agent"] == synthetic.CLASSES[(1 + steps) % 3]


def test_the_order_of_oru_phrases_does_not_matter():
    rng = random.Random(3)
    for _ in range(50):
        sentence = synthetic.random_sentence(rng)
        shuffled = tuple(rng.sample(sentence.phrases, len(sentence.phrases)))
        other = synthetic.Sentence(sentence.time, shuffled, sentence.verb, sentence.mood)
        assert synthetic.target_text(sentence) == synthetic.target_text(other)


def test_chains_are_long_and_cover_the_classes_evenly(pairs):
    depths, classes = [0] * 5, [0] * 3
    for source, _ in pairs["test"]:
        phrases = phrases_of(source)
        for number in classes_of(phrases).values():
            classes[number] += 1
        for phrase in phrases.values():
            depth = 0
            while len(phrase["particle"]) == 2:
                phrase, depth = phrases[ROLE_OF[phrase["particle"][1]]], depth + 1
            depths[depth] += 1
    shares = [100 * depth / sum(depths) for depth in depths]
    documented = [float(cell) for cell in document_table("hosts")[0][1:]]
    assert shares == pytest.approx(documented, abs=2)
    assert [share / sum(classes) for share in classes] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_no_source_sentence_occurs_twice(pairs):
    sources = [source for split in pairs.values() for source, _ in split]
    assert {split: len(found) for split, found in pairs.items()} == synthetic.SPLIT_SIZES
    assert len(set(sources)) == len(sources) == 32_000


def test_the_languages_share_no_word_and_the_document_counts_them(pairs):
    everything = [pair for split in pairs.values() for pair in split]
    lengths = [[len(pair[side].split()) for pair in everything] for side in (0, 1)]
    source, target = ({w for pair in everything for w in pair[side].split()} for side in (0, 1))
    assert not source & target
    text = " ".join(DOCUMENT.split())
    (low, high), (low_kesh, high_kesh) = [(min(x), max(x)) for x in lengths]
    assert f"have {low} to {high} Oru words and {low_kesh} to {high_kesh} Kesh words" in text
    assert f"vocabularies of {len(source)} and {len(target)} words" in text


@pytest.mark.parametrize("hash_seed", ["0", "1234"])
def test_other_processes_and_hash_seeds_give_the_same_pairs(hash_seed):
    code = "from tests.test_synthetic import digest; print(digest())"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-1] == digest()


def test_the_data_set_is_the_one_of_its_version():
    # A deliberate change of the pairs needs a new VERSION of the builder and a new digest here.
    assert str(synthetic.L2sSynthetic.VERSION) == "1.0.0"
    assert digest() == DIGEST


def test_the_builder_writes_what_the_generator_yields(tmp_path, pairs, capfd):
    builder = tfds.builder("l2s_synthetic", data_dir=tmp_path)
    builder.download_and_prepare()
    told = capfd.readouterr()
    assert not told.out  # which is for the report
    assert "examples" not in told.err
    assert list(tmp_path.rglob("*train.array_record*"))
    for split, expected in pairs.items():
        rows = tfds.builder("l2s_synthetic", data_dir=tmp_path).as_data_source(split)
        assert len(rows) == len(expected)
        decoded = {
            (row["source"].decode(), row["target"].decode()) for row in itertools.islice(rows, 2000)
        }
        assert len(decoded) == min(len(expected), 2000)
        assert decoded <= set(expected)
    assert "tensorflow" not in sys.modules


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split 'dev' of l2s_synthetic: expected one of \['test'"):
        next(synthetic.sentence_pairs("dev"))
