"""The stage of a tokenizer that is trained on the train split's own text."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from typing import Any, cast

from ml_collections import ConfigDict

from l2s_jax import __version__
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.stage import RecordedStage
from l2s_jax.files import is_file, is_folder, listed_names
from l2s_jax.hub import PARTS, cached
from l2s_jax.tokenizers import Tokenizer, for_chat, load_tokenizer
from l2s_jax.tokenizers.sentencepiece import MODEL_FILE, train_sentencepiece

log = logging.getLogger(__name__)

# To be raised where the same files are read as another tokenizer.
_READING = 2


class TokenizerStage(RecordedStage):
    """A tokenizer: one that is trained here, or the one in a model's directory, or another's."""

    def __init__(
        self,
        context: Context,
        name: str,
        settings: ConfigDict,
        *,
        path: str,
        otherwise: TokenizerStage | None = None,
    ):
        """`path`: a directory with a tokenizer, "" for none; `otherwise`: the one to use then."""
        super().__init__(context, name)
        self._settings, self._path, self._otherwise = settings, path, otherwise

    def is_used(self) -> bool:
        """Whether one is trained."""
        return bool(self._settings.train_vocab_size)

    @property
    def source(self) -> TokenizerStage:
        """The stage whose tokenizer this is."""
        return self if self.is_used() or not self._otherwise else self._otherwise

    def inputs(self) -> dict[str, Any]:
        """The text and how it is learnt."""
        data = {"train": self.context.content("train")}
        return {"data": data, "seed": self.context.config.seed, **self._settings.to_dict()}

    def is_made(self) -> bool:
        """Whether the model's file is there."""
        return is_file(os.path.join(self.record.directory, MODEL_FILE))

    def progress(self) -> str:
        """It is made in one go."""
        return ""

    def make(self) -> None:
        """Trains it, in one process for all."""
        from l2s_jax.cluster import distributed

        def train() -> None:
            log.info("%s: training %d pieces", self.name, self._settings.train_vocab_size)
            size = self._settings.train_vocab_size
            with self.record.filling(MODEL_FILE) as folder:
                try:
                    train_sentencepiece(
                        (t for e in self.context.examples("train") for t in (e.prompt, e.response)),
                        vocab_size=size,
                        model_type=self._settings.model_type,
                        directory=folder,
                        seed=self.context.config.seed,
                    )
                except ValueError as error:
                    section = self.name.replace("_", ".")
                    raise ValueError(f"config.{section}.train_vocab_size={size}: {error}") from None

        distributed.on_primary(train)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for chats where the task has some and the checkpoint says how.

        Raises:
          ValueError: it differs from the one in the directory of the model, or the LLM's has no
            chat template.
        """
        if self._otherwise and not self.is_used() and not self._path:
            return self._otherwise.tokenizer
        if self.is_used():
            return self._read()
        files = _files(self._path)
        if self.context.mode == "look" and files:
            return cast(Tokenizer, _Known(self._read, lambda *of: self._known(files, *of)))
        read = self._read()
        if self.context.mode == "make":
            self._remember(read, files)
        return read

    def _remember(self, read: Tokenizer, files: Sequence[str]) -> None:
        """Keeps its hashes for those who look at the workdir."""
        from l2s_jax.cluster import distributed

        if distributed.is_primary():
            for kind in ("fingerprint", "identity"):
                self.context.hashes.remember(self._what(kind), files, getattr(read, kind))

    def _known(self, files: Sequence[str], kind: str, compute: Callable[[], str]) -> str:
        return self.context.hashes.of(self._what(kind), files, compute)

    def _what(self, kind: str) -> list[Any]:
        """What a hash of a checkpoint's tokenizer is remembered by: all that it comes from."""
        chat = self.context.config.task.chat.to_dict()
        code = [__version__, _READING, *map(version, ("tokenizers", "transformers"))]
        return ["tokenizer", kind, self._path, chat, code]

    def _read(self) -> Tokenizer:
        plain, chat = self._plain, self.context.config.task.chat
        if not chat.user:
            return plain
        # What older versions have made is measured as it is.
        new = self.context.mode == "make"
        try:
            for_chats = for_chat(plain, chat.system, chat.options.to_dict(), repeatable=new)
        except ValueError as error:
            raise ValueError(f"config.task.chat: {self._path or self.name}: {error}") from None
        if not for_chats and not self._otherwise:
            raise ValueError(
                f"config.task.chat.user={chat.user!r}: {self._path or self.name} has no chat "
                "template; expected config.task.prompt instead"
            )
        return for_chats or plain

    @functools.cached_property
    def _plain(self) -> Tokenizer:
        if not self.is_used():
            return load_tokenizer(self._path)
        trained = load_tokenizer(self.made())
        if self._path and load_tokenizer(self._path).fingerprint != trained.fingerprint:
            raise ValueError(
                f"config.llm.path={self._path!r}: its tokenizer differs from the one trained here; "
                "expected config.tokenizer.train_vocab_size=0, or the LLM of the same run"
            )
        return trained


class _Known:
    """A checkpoint's tokenizer whose hashes may be remembered; it is read when more is asked of it.

    To read one takes seconds, most of them the import of transformers: a look does without.
    """

    def __init__(
        self, read: Callable[[], Tokenizer], known: Callable[[str, Callable[[], str]], str]
    ):
        self._read, self._known = functools.cache(read), known

    @property
    def fingerprint(self) -> str:
        """As the tokenizer's."""
        return self._known("fingerprint", lambda: self._read().fingerprint)

    @property
    def identity(self) -> str:
        """As the tokenizer's."""
        return self._known("identity", lambda: self._read().identity)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._read(), name)


def _files(path: str) -> list[str]:
    """What a tokenizer at a path, or of a name on the hub, is read from, as far as it is here."""
    there = cached(path, "tokenizer") if path else None
    if not there:
        return []
    folder, own = (there, []) if is_folder(there) else (os.path.dirname(there), [there])
    names = [n for n in listed_names(folder) if any(fnmatch(n, p) for p in PARTS["tokenizer"])]
    return sorted({*own, *(os.path.join(folder, name) for name in names)})


def check_one_tokenizer(
    config: ConfigDict, llm: Tokenizer, slm: Tokenizer, setting: str, otherwise: str
) -> None:
    """Checks that LLM and SLM write with the same tokens, as `setting` needs it.

    Raises:
      ValueError: they don't; `otherwise` is what else can be set.
    """
    if (llm.fingerprint, llm.eos_id) == (slm.fingerprint, slm.eos_id):
        return
    what = "ends responses with another token than"
    if llm.fingerprint != slm.fingerprint:
        what = "makes other tokens than"
    raise ValueError(
        f"{setting}: the tokenizer of config.slm.path={config.slm.path!r} {what} the LLM's, which "
        f"reads what the SLM writes; expected an SLM with the LLM's tokenizer, or {otherwise}"
    )
