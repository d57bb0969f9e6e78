"""An L2S model as `l2s_jax.load` gives it: it answers prompts, and can be saved and published."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from l2s_jax import hub
from l2s_jax.checkpoints.writing import MAX_SHARD_SIZE
from l2s_jax.files import atomic_directory, exists, is_folder, listed_names, write_text
from l2s_jax.serving import bundle
from l2s_jax.serving.generator import Generator

_PLACE = '"this directory"'  # in a card: what to load


class Model(Generator):
    """A Generator that knows the folder it is from.

    Attributes:
      directory: the folder.
    """

    def __init__(self, directory: str, *arguments: Any, **settings: Any):
        """`arguments` and `settings` as of Generator."""
        super().__init__(*arguments, **settings)
        self.directory = directory

    def save_pretrained(
        self,
        directory: str,
        *,
        include_llm: bool | str = False,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        """Writes a copy of the model that `l2s_jax.load` reads.

        Args:
          directory: a new or an empty folder.
          include_llm: with what encodes of the LLM inside, instead of a reference to where it is;
            "whole": with all of the LLM, for exact decoding.
          max_shard_size: bytes, or as "5GB", from which on weights are in several files.

        Raises:
          ValueError: there is something in the folder, or it can't be written.
        """
        directory = os.path.expanduser(directory)
        if exists(directory) and (not is_folder(directory) or listed_names(directory)):
            raise ValueError(f"{directory}: exists already; expected a new directory")
        try:
            with atomic_directory(directory) as temporary:
                sizes = {"max_shard_size": max_shard_size}
                bundle.copy(self.directory, temporary, include_llm=include_llm, **sizes)
        except OSError as error:
            raise ValueError(f"{directory}: cannot be written: {error.strerror}") from None

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        include_llm: bool | str | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> str:
        """Publishes the model, so that `l2s_jax.load(name)` loads it anywhere.

        Args:
          name: "org/name" of the repository, which is made if need be.
          private: whether a new repository is for its owners only.
          include_llm: as of `save_pretrained`; None: unless the LLM is on the hub itself.
          max_shard_size: as of `save_pretrained`.

        Returns:
          "org/name@commit".

        Raises:
          ValueError: the hub refuses it, or can't be reached.
        """
        if include_llm is None:
            include_llm = not hub.is_name(bundle.llm_path(self.directory))
        hub.check_name(name)
        with tempfile.TemporaryDirectory() as root:
            folder = os.path.join(root, "model")
            sizes = {"max_shard_size": max_shard_size}
            bundle.copy(self.directory, folder, include_llm=include_llm, **sizes)
            card = os.path.join(folder, bundle.CARD)
            if os.path.exists(card):
                with open(card, encoding="utf-8") as file:
                    write_text(card, file.read().replace(_PLACE, f'"{name}"'))
            return hub.push(folder, name, private=private)
