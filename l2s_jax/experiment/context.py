"""What all stages of an experiment share: config, workdir, examples, devices."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from l2s_jax.checkpoints.files import content_hash, hashed_files
from l2s_jax.config import buckets_of, compute_dtypes, make_mesh
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.data.tasks import load_task
from l2s_jax.data.templates import fields_of
from l2s_jax.data.tokens import Tokenization, Tokens
from l2s_jax.experiment.hashes import Hashes, examples_hash, hash_of_files, references_hash
from l2s_jax.experiment.splits import Split
from l2s_jax.experiment.workdir import fingerprint
from l2s_jax.hub import cached, find, is_name, reference
from l2s_jax.settings.evaluation import bleu_tokenizer
from l2s_jax.tokenizers import Tokenizer
from l2s_jax.tokenizers.tokenizer import warn_if_lossy

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from l2s_jax.training.compiled import CompiledSteps
    from l2s_jax.training.trackers import Trackers

log = logging.getLogger(__name__)

# Other versions of these may make other ids of the same files.
_TOKENIZING = ("sentencepiece", "tokenizers", "transformers")

# Of examples and responses to them: what these are worth, the more the better.
Score = Callable[[Sequence[Example], Sequence[str]], float]


class Context:
    """An experiment's surroundings. JAX is imported where devices are asked for, not before.

    Attributes:
      mode: "make": what is missing is made. "find": it is an error. "look": nothing is asked for.
      score: on the primary metric, for `train.select` "quality".
      shared: the folder of a comparison, of which this is a variant; "" otherwise.
      hashes: what the workdir remembers of the content of files.
      compiled: training steps that were compiled before; None: a run compiles its own.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        mode: str,
        score: Score | None = None,
        shared: str = "",
    ):
        self.config, self.workdir, self.mode, self.score = config, workdir, mode, score
        self.shared = shared
        self.compiled: CompiledSteps | None = None
        self.task = load_task(config.task)
        self.buckets = buckets_of(config)
        self.hashes = Hashes(workdir, keep=mode == "make")
        self._tokens: dict[str, Tokens] = {}
        self._said: set[str] = set()

    @functools.cached_property
    def trackers(self) -> Trackers:
        """What a run is followed by; process 0 alone tells them."""
        from l2s_jax.cluster import distributed
        from l2s_jax.training.trackers import Trackers

        names = self.config.trackers if distributed.is_primary() else ()
        return Trackers(names, self.workdir, self.config.to_dict())

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices of training."""
        return make_mesh(self.config)

    @functools.cached_property
    def feature_mesh(self) -> Mesh:
        """The devices of the LLM that fills the cache of features."""
        return make_mesh(self.config, "features")

    @functools.cached_property
    def decoding_mesh(self) -> Mesh:
        """The devices of evaluation."""
        from l2s_jax.cluster import sharding

        return sharding.decoding_mesh(make_mesh(self.config, "decoding"))

    @functools.cached_property
    def label_mesh(self) -> Mesh:
        """The devices of the LLM that answers the train split."""
        from l2s_jax.cluster import sharding

        return sharding.decoding_mesh(make_mesh(self.config, "labels"))

    @functools.cached_property
    def dtypes(self) -> tuple[Any, Any]:
        """(of all products, of those of the LLM where it encodes)."""
        return compute_dtypes(self.config.dtype, self.config.llm.encoder_dtype)

    @functools.cache  # noqa: B019  it lives as long as its process
    def examples(self, split: str) -> Split:
        """All examples of a split."""
        return self._split(split, lambda: self.task.examples(split))

    def first(self, split: str, limit: int) -> Split:
        """The first `limit` examples of a split; all of them where it is 0."""
        examples = self.examples(split)
        if not limit:
            return examples
        return self._split(split, lambda: list(itertools.islice(examples, limit)), limit)

    def _split(self, split: str, read: Callable[[], Sequence[Example]], limit: int = 0) -> Split:
        return Split(lambda: self.identity(split, limit=limit), read)

    def identity(self, split: str, *, responses: bool = True, limit: int = 0) -> dict[str, Any]:
        """What decides a split's examples, or their prompts alone, as `Split.identity` has it."""
        content = self.content(split, responses=responses, limit=limit)
        # Beside its text, a prompt has places where it may be cut.
        return {"data": content, "task": self.task.settings(split)}

    def validation(self) -> Split:
        """The examples by which checkpoints are compared, with the data's own responses."""
        return self.first("validation", self.config.evaluation.validation_examples)

    def tokenized(
        self, examples: Sequence[Example], prompts: Tokenizer, responses: Tokenizer
    ) -> TokenizedExamples:
        """Token ids of examples, by the tokenizers of their prompts and responses.

        Those of a split are kept in the workdir, where something may be made.
        """
        config = self.config
        how = Tokenization(prompts, responses, config.max_prompt_tokens, config.max_response_tokens)
        return TokenizedExamples(
            examples,
            prompt_tokenizer=prompts,
            response_tokenizer=responses,
            max_prompt_tokens=how.max_prompt_tokens,
            max_response_tokens=how.max_response_tokens,
            keep_cut=config.task.cut_responses == "keep",
            tokens=self._kept(examples, how) if isinstance(examples, Split) else None,
        )

    def _kept(self, examples: Split, how: Tokenization) -> Tokens | None:
        if self.mode != "make":
            return None
        # Imported here: its libraries take a while.
        from l2s_jax.experiment import token_files

        identity = {
            "version": token_files.VERSION,
            "libraries": {name: importlib.metadata.version(name) for name in _TOKENIZING},
            "examples": examples.identity(),
            "prompt_tokenizer": how.prompt_tokenizer.identity,
            "response_tokenizer": how.response_tokenizer.identity,
            "max_prompt_tokens": how.max_prompt_tokens,
            "max_response_tokens": how.max_response_tokens,
        }
        name = fingerprint(identity)[:16]
        if name not in self._tokens:
            folder = os.path.join(self.shared or self.workdir, "tokens", name)
            self._tokens[name] = token_files.kept(folder, identity, examples, how)
        return self._tokens[name]

    def tell_of_losses(
        self, name: str, data: TokenizedExamples, examples: Sequence[Example]
    ) -> None:
        """Says what the text of examples, which are `data`, loses on its way to the model `name`.

        What tokenizers change is said where texts are read: not where their tokens are found.
        """
        is_read = not isinstance(examples, Split) or examples.is_read
        if is_read and self.is_first("losses"):
            fields = (fields_of(example.prompt) for example in examples)
            warn_if_lossy(data.prompt_tokenizer, fields, "prompts")
            warn_if_lossy(data.response_tokenizer, (e.response for e in examples), "responses")
        for line in data.loss.describe(data.max_prompt_tokens):
            log.warning("%s: %s", name, line)

    def selection(self, train: ConfigDict) -> dict[str, Any]:
        """Inputs of a training whose checkpoint is chosen by what the system says."""
        if train.select != "quality":
            return {}
        config, metric = self.config, self.config.evaluation.metrics[0]
        limit = config.evaluation.validation_examples
        how = {
            "metric": metric,
            "max_new_tokens": config.decoding.max_new_tokens,
            "references": self.references("validation", limit=limit),
        }
        if metric == "comet":
            how["comet"] = config.evaluation.comet
        if metric == "bleu":
            setting = config.evaluation.bleu_tokenizer
            how["bleu_tokenizer"] = bleu_tokenizer(setting, config.task.language)
        return {"selection": how}

    @functools.cache  # noqa: B019  one process may ask alone, once all have
    def content(self, split: str, *, responses: bool = True, limit: int = 0) -> str | None:
        """Hash of a split's prompts, and responses, as read; None where that is not known.

        Process 0 reads them for all of a job. Unless something may be made, data is not known that
        is gone, or that TFDS has, which takes minutes to read.
        """
        what = [self.task.settings(split), split, responses, limit]
        return self._known(
            split, what, lambda: examples_hash(self.first(split, limit), responses=responses)
        )

    @functools.cache  # noqa: B019  one process may ask alone, once all have
    def references(self, split: str, *, limit: int = 0) -> str | None:
        """Hash of the references of a split's examples, known as `content` is."""
        what = ["references", self.task.settings(split), split, limit]
        return self._known(split, what, lambda: references_hash(self.first(split, limit)))

    @functools.cache  # noqa: B019  one process may ask alone, once all have
    def repeats(self, split: str, *, limit: int = 0) -> bool | None:
        """Whether a split has a prompt more than once, known as `content` is."""
        what = ["repeats", self.task.settings(split), split, limit]

        def compute() -> str:
            prompts = [example.prompt for example in self.first(split, limit)]
            return str(len(set(prompts)) < len(prompts))

        known = self._known(split, what, compute)
        return None if known is None else known == str(True)

    def count(self, split: str) -> int:
        """How many examples a split has.

        Nothing is written for it: whoever asks first may yet refuse the config.

        Raises:
          ValueError: the data is not there, or not as the task wants it.
        """
        what = ["count", self.task.settings(split), split]
        return int(
            self._known(split, what, lambda: str(len(self.examples(split))), write=False) or 0
        )

    def _known(
        self, split: str, what: list[Any], compute: Callable[[], str], *, write: bool = True
    ) -> str | None:
        """What `compute` makes of a split, as `Hashes.of` remembers it."""

        def known() -> str | None:
            files = self.task.files(split, prepare=self.mode == "make")
            if not files and self.mode != "make":
                return None
            try:
                return self.hashes.of(what, files, compute, write=write)
            except ValueError as error:
                if self.mode == "make":
                    raise
                if self.is_first(split):
                    log.warning("the %s split is taken to be the one of the run: %s", split, error)
                return None

        if self.mode == "look":
            return known()
        from l2s_jax.cluster import distributed

        return distributed.on_primary(known)

    def files_hash(self, what: str, files: Callable[[], Sequence[str]]) -> str:
        """Hash of the content of files, in their order, which process 0 lists and reads for all."""
        from l2s_jax.cluster import distributed

        def of_all() -> str:
            paths = files()
            return self.hashes.of(what, paths, lambda: hash_of_files(paths))

        return distributed.on_primary(of_all)

    @functools.cache  # noqa: B019  one process may ask alone, once all have
    def checkpoint(self, directory: str) -> str | None:
        """Hash of the model in a directory, as `content_hash` gives it.

        Process 0 reads it for all of a job: others need not have the whole of a large model. None
        of a name on the hub that isn't on this machine, where nothing may be asked for.
        """

        def hashed(path: str) -> str:
            there = find(path)
            files = hashed_files(there)
            return self.hashes.of(["checkpoint", there], files, lambda: content_hash(there))

        if self.mode == "look":
            there = cached(directory) if is_name(directory) else directory
            return None if there is None else hashed(there)
        from l2s_jax.cluster import distributed

        return distributed.on_primary(lambda: hashed(directory))

    def sources(self) -> dict[str, str]:
        """Names and commits of the config's checkpoints that are on the hub."""
        paths = {name: self.config[name].path for name in ("llm", "slm")}
        return {name: reference(path) for name, path in paths.items() if path and is_name(path)}

    def is_first(self, what: str) -> bool:
        """Whether nobody has asked about this before: some things are said once."""
        first = what not in self._said
        self._said.add(what)
        return first
