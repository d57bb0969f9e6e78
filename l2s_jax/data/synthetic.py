"""The bundled synthetic task: sentence pairs in two small artificial languages, Oru and Kesh.

Agreement, word sense and word order of the translation hang on chains of distant words, which take
an encoder of some depth; `docs/synthetic_task.md` holds the whole grammar. Importing this module
registers the TFDS dataset `l2s_synthetic`.
"""

import contextlib
import dataclasses
import io
import itertools
import logging
import random
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

log = logging.getLogger(__name__)

SPLIT_SIZES = {"test": 1_000, "validation": 1_000, "train": 30_000}
SEED = 20_240_216
# Chance that a phrase leans on another; that its host is the phrase drawn just before it.
LEANING, CHAINING = 0.8, 0.75

CLASSES = ("sun", "sea", "stone")
ROLES = ("agent", "patient", "recipient", "instrument", "place")

# The vowel of a role ends its nouns and adjectives and begins its particle. A particle ends in the
# consonant of a class, or in the consonant of a bond and the vowel of its host's role.
CASES = {
    "agent": "a",
    "patient": "u",
    "recipient": "i",
    "instrument": "e",
    "place": "o",
}
ENDINGS = {"sun": "n", "sea": "l", "stone": "r"}
# Bond -> how many steps a phrase is from the class of its host, around the cycle of CLASSES.
BONDS = {"y": 0, "v": 1}
TENSES = {"ehe": "present", "eso": "present", "ulu": "past", "uma": "past"}
MOODS = {"ek": "statement", "et": "question"}

# Oru noun stem -> its Kesh word, or its two words where it has two senses.
NOUNS = {
    "lip": ("feil", "grul"),
    "hal": ("fim", "stok"),
    "rom": ("thik", "veird"),
    "kap": ("beisk", "wem"),
    "sos": ("doisk", "greisk"),
    "tal": ("zusk", "fom"),
    "mok": ("wim",),
    "nah": ("vem",),
    "pih": ("brel",),
    "him": ("wok",),
    "tut": ("zil",),
    "pos": ("vil",),
    "rut": ("grerd",),
    "hun": ("dosk",),
    "pin": ("theil",),
    "nus": ("beil",),
}
# Oru adjective stem -> its Kesh stem, which takes the vowel of a class as its ending.
ADJECTIVES = {
    "hikash": "diss",
    "luhosh": "zond",
    "tatish": "filt",
    "homash": "geilt",
    "nukath": "bruss",
    "sipath": "fult",
}
# Oru verb -> its Kesh words for a patient of class sun, sea and stone.
VERBS = {
    "miraru": ("veix", "greift", "thoft"),
    "liriru": ("deft", "dift", "wift"),
    "naporu": ("vuft", "forx", "gert"),
    "niporu": ("vong", "grort", "bruft"),
    "piluru": ("zort", "zeix", "grux"),
    "laloru": ("steirt", "deirt", "zuft"),
    "koluru": ("zeing", "feft", "breft"),
    "mimaru": ("wuft", "feing", "bunx"),
    "raturu": ("weng", "beirt", "beift"),
    "pupiru": ("deng", "zeirt", "steng"),
    "lararu": ("weift", "greirt", "thort"),
    "pararu": ("wix", "brift", "grift"),
    "ranaru": ("vift", "breift", "vurt"),
    "mokuru": ("greft", "stirt", "thung"),
    "rikiru": ("stift", "brux", "brert"),
}
VOWELS = {"sun": "a", "sea": "o", "stone": "e"}
ARTICLES = {
    "agent": "l",
    "patient": "m",
    "recipient": "n",
    "instrument": "s",
    "place": "k",
}
AUXILIARIES = {"present": "est", "past": "und"}


@dataclasses.dataclass(frozen=True)
class NounPhrase:
    """An Oru noun phrase.

    A free phrase has a class of its own in `anchor` and no bond; a leaning phrase has the role of
    its host in `anchor`, and a bond.
    """

    role: str
    anchor: str
    noun: str
    adjective: str | None = None
    bond: str = ""


@dataclasses.dataclass(frozen=True)
class Sentence:
    """An Oru sentence; `phrases` in their spoken order, one per role, with no cycle of hosts."""

    time: str
    phrases: tuple[NounPhrase, ...]
    verb: str
    mood: str


def particle(phrase: NounPhrase) -> str:
    """Returns the Oru particle of a phrase: its role, then its class, or its bond and host."""
    return CASES[phrase.role] + phrase.bond + (ENDINGS | CASES)[phrase.anchor]


def source_text(sentence: Sentence) -> str:
    """Writes a sentence in Oru."""
    words = [sentence.time]
    for phrase in sentence.phrases:
        case = CASES[phrase.role]
        words += [phrase.adjective + case] if phrase.adjective else []
        words += [phrase.noun + case, particle(phrase)]
    return " ".join([*words, sentence.verb, sentence.mood])


def agreement_classes(sentence: Sentence) -> dict[str, str]:
    """Returns the class of each phrase, by role, as its chain of hosts and bonds gives it."""
    phrases = {phrase.role: phrase for phrase in sentence.phrases}

    def index(phrase: NounPhrase) -> int:
        if not phrase.bond:
            return CLASSES.index(phrase.anchor)
        return (index(phrases[phrase.anchor]) + BONDS[phrase.bond]) % len(CLASSES)

    return {role: CLASSES[index(phrase)] for role, phrase in phrases.items()}


def target_text(sentence: Sentence) -> str:
    """Translates a sentence into Kesh."""
    classes = agreement_classes(sentence)
    phrases = {phrase.role: phrase for phrase in sentence.phrases}

    def noun_phrase(role: str) -> list[str]:
        phrase, vowel = phrases[role], VOWELS[classes[role]]
        senses = NOUNS[phrase.noun]
        noun = senses[0] if classes["agent"] == "sun" else senses[-1]
        adjective = [ADJECTIVES[phrase.adjective] + vowel] if phrase.adjective else []
        after = classes[role] == "stone"
        return [ARTICLES[role] + vowel, *([noun, *adjective] if after else [*adjective, noun])]

    patient_first = classes["patient"] == "stone"
    order = ("patient", *(role for role in ROLES if role != "patient")) if patient_first else ROLES
    blocks = [noun_phrase(role) for role in order if role in phrases]
    auxiliary = AUXILIARIES[TENSES[sentence.time]] + VOWELS[classes["agent"]]
    verb = VERBS[sentence.verb][CLASSES.index(classes["patient"])]
    question = MOODS[sentence.mood] == "question"
    blocks = [[auxiliary, verb], *blocks] if question else [*blocks, [auxiliary, verb]]
    return " ".join(itertools.chain.from_iterable(blocks))


def random_sentence(rng: random.Random) -> Sentence:
    """Draws a sentence.

    Uses only `rng.random()`, whose sequence for a seed Python keeps from version to version.
    """

    def choose(items):
        return items[int(rng.random() * len(items))]

    def shuffled(items):
        return sorted(items, key=lambda _: rng.random())

    roles = ROLES if rng.random() < 0.5 else ROLES[:-1]
    phrases = []
    for role in shuffled(roles):
        anchor, bond = choose(CLASSES), ""
        if phrases and rng.random() < LEANING:
            anchor = (phrases[-1] if rng.random() < CHAINING else choose(phrases)).role
            bond = choose(tuple(BONDS))
        adjective = choose(tuple(ADJECTIVES)) if rng.random() < 0.25 else None
        phrases.append(NounPhrase(role, anchor, choose(tuple(NOUNS)), adjective, bond))
    return Sentence(
        choose(tuple(TENSES)), tuple(shuffled(phrases)), choose(tuple(VERBS)), choose(tuple(MOODS))
    )


def sentence_pairs(split: str) -> Iterator[tuple[str, str]]:
    """Yields the (Oru, Kesh) pairs of a split: always the same ones, no Oru sentence twice.

    Raises:
      ValueError: no such split.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"split {split!r} of l2s_synthetic: expected one of {list(SPLIT_SIZES)}")
    rng = random.Random(SEED)
    seen = set()

    def distinct() -> Iterator[Sentence]:
        while True:
            sentence = random_sentence(rng)
            text = source_text(sentence)
            if text not in seen:
                seen.add(text)
                yield sentence

    names = list(SPLIT_SIZES)
    start = sum(SPLIT_SIZES[name] for name in names[: names.index(split)])
    for sentence in itertools.islice(distinct(), start, start + SPLIT_SIZES[split]):
        yield source_text(sentence), target_text(sentence)


class L2sSynthetic(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the task: ArrayRecord files, written and read without TensorFlow."""

    name = "l2s_synthetic"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    # TFDS looks for recorded checksums of downloads beside this file. There are none, and looking
    # imports importlib_resources, which TFDS uses without requiring it.
    code_path = None

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)

    def download_and_prepare(self, **kwargs):
        """As TFDS's, but tells of it in one line: it takes seconds, and downloads nothing."""
        log.info("writing the dataset %s to %s", self.name, self.data_dir)
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                super().download_and_prepare(**kwargs)
        finally:
            tfds.enable_progress_bar()

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Translation from Oru to Kesh, two small artificial languages.",
            features=tfds.features.FeaturesDict(
                {"source": tfds.features.Text(), "target": tfds.features.Text()}
            ),
            supervised_keys=("source", "target"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLIT_SIZES}

    def _generate_examples(self, split: str):
        for index, (source, target) in enumerate(sentence_pairs(split)):
            yield index, {"source": source, "target": target}
