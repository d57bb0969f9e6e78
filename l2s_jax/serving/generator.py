"""Text in, text out: tokenize, group by length, decode in one compiled program, put in order."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from l2s_jax.cluster import distributed, sharding
from l2s_jax.cluster.ahead import one_ahead
from l2s_jax.data.text import asked
from l2s_jax.decoding.beam import Hypotheses
from l2s_jax.decoding.drafted import ExactState
from l2s_jax.decoding.engine import GREEDY, advance, jitted_decode, start
from l2s_jax.decoding.loop import CHUNK, Decoded
from l2s_jax.models.exact import Exact
from l2s_jax.models.serving import lay_out_all
from l2s_jax.models.systems import Params, System
from l2s_jax.serving.batching import Batch, Progress, batches, buckets, check_lengths, search_of
from l2s_jax.serving.bundle_config import generation_of
from l2s_jax.serving.output import Drafts, Output, drafts_of, in_order, output_of_text, outputs_of
from l2s_jax.serving.text import ResponseText
from l2s_jax.settings.search import Search
from l2s_jax.tokenizers.tokenizer import Tokenizer


class Generator:
    """Answers prompts with one system. Results do not depend on batch company or padding.

    Batches have one of a few fixed shapes: the number of rows, of prompt tokens and of new tokens
    are each rounded up to a bucket, and every combination is compiled once. On a mesh, rows are
    split over it, and the parameters as for training. A mesh of several processes makes every call
    one that they all make, alike.
    """

    def __init__(
        self,
        system: System | Exact,
        trained: Params,
        frozen: Params,
        prompt_tokenizer: Tokenizer,
        response_tokenizer: Tokenizer,
        *,
        prompt_lengths: Sequence[int],
        max_new_tokens: int,
        batch_size: int,
        search: Search | Mapping[str, Any] = GREEDY,
        weights: str = "float",
        mesh: Mesh | None = None,
        served: bool = False,
    ):
        """`prompt_lengths`: what prompts are padded to, ascending; longer ones are truncated.

        A call that truncates prompts warns of their number. `max_new_tokens` and `search` hold for
        calls that name none; no call may have more new tokens. `weights` is one of
        models.serving.WEIGHTS. `mesh`: None is one device. `served`: the parameters are those that
        other generators on the mesh hold, and are taken as they are. An Exact system decodes
        exactly, whatever `search.exact` says, and no other does.

        Raises:
          ValueError: a setting does not fit, the mesh does not divide the batch_size, a length or a
            parameter, a model has too few positions for the longest prompts and responses, or the
            search is not one of the system's.
        """
        own = generation_of(prompt_lengths, max_new_tokens, batch_size, search, weights)
        check_lengths(system, own.prompt_lengths[-1], own.max_new_tokens)
        self.system = system
        self.mesh = mesh or sharding.one_device()
        sharding.check_rows(own.batch_size, self.mesh, "batch_size")
        sharding.check_lengths(own.prompt_lengths, self.mesh, "prompt_lengths")
        held = (trained, frozen) if served else system.to_serve(trained, frozen, weights)
        self.trained, self.frozen = (
            lay_out_all(sharding.put_parameters(params, self.mesh), self.mesh) for params in held
        )
        self.prompt_tokenizer = prompt_tokenizer
        self.response_tokenizer = response_tokenizer
        self.end_ids = response_tokenizer.end_ids
        self.max_new_tokens = own.max_new_tokens
        self.batch_size = own.batch_size
        self.prompt_lengths = own.prompt_lengths
        self.search = self._search(own.search)
        # (rows, prompt tokens, kind of program) that have been compiled.
        self._ready: set[tuple[int, int, Any]] = set()

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Numbers of rows that programs are compiled for, which the mesh splits."""
        return buckets(sharding.batch_ways(self.mesh), self.batch_size, 4)

    @property
    def new_token_buckets(self) -> tuple[int, ...]:
        """Numbers of new tokens that programs are compiled for."""
        return buckets(2 * CHUNK, self.max_new_tokens, 2)

    def warm_up(self, *, stream: bool = False) -> int:
        """Compiles every shape of `generate`, or `stream`, by the default search; their number."""
        in_chunks = stream or self.search.stop
        rows_of = self.row_buckets[:1] if stream else self.row_buckets
        shapes = list(itertools.product(rows_of, self.prompt_lengths, self.new_token_buckets))
        for rows, length, capacity in tqdm(shapes, desc="compiling", file=sys.stderr):
            ids, mask = np.zeros((rows, length), np.int32), np.ones((rows, length), bool)
            # Two tokens take one chunk; rows that may have none take nothing at all.
            limits = np.full(rows, 2 if in_chunks else 0, np.int32)
            batch = Batch(ids, mask, limits, np.zeros(rows, np.uint32))
            self._ready.add((rows, length, (capacity, self.search, stream)))
            if in_chunks:
                list(self._chunks(batch, capacity, self.search, False, lambda: []))
            else:
                jax.block_until_ready(self._decode(batch, capacity, self.search, False))
        return len(shapes)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        search: Search | None = None,
        max_new_tokens: int | None = None,
        seeds: Sequence[int] | None = None,
        description: str = "",
        mismatched: bool = False,
        shared: bool = False,
    ) -> list[Output]:
        """One output per prompt, in order.

        Args:
          prompts: texts, as a whole: `Task.render_prompt` has been applied.
          search: how tokens are chosen.
          max_new_tokens: the most that a response may have.
          seeds: of each prompt, for sampling: the same seed, the same text, whatever the other
            prompts are; without them, the prompts' places 0, 1, 2, ...
          description: names a progress bar on stderr; without it there is none.
          mismatched: every prompt is decoded with the encoded prompt of another in its batch.
          shared: all processes of a job make the same call. Each answers its share of the batches,
            process 0 gets all outputs, and the others none; on a mesh of all of them, they answer
            each batch together, and all get all.

        Raises:
          TypeError: `prompts` is one string, or holds something else than strings.
          ValueError: max_new_tokens is above the generator's, the numbers of seeds and prompts
            differ, a seed does not fit in 32 bits, or the search is not one of the system's.
        """
        return in_order(
            lambda part: self.answered(
                prompts,
                search=search,
                max_new_tokens=max_new_tokens,
                seeds=seeds,
                description=description,
                mismatched=mismatched,
                part=part,
            ),
            shared and not self.mesh.is_multi_process,
        )

    def answered(
        self,
        prompts: Sequence[str],
        *,
        search: Search | None = None,
        max_new_tokens: int | None = None,
        seeds: Sequence[int] | None = None,
        description: str = "",
        mismatched: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[list[int], list[Output]]]:
        """(places of prompts, their outputs) of each batch, in order of the prompts' lengths.

        While the host takes the outputs of a batch, the devices decode the next one.

        Args:
          prompts, search, max_new_tokens, seeds, description, mismatched: as of `generate`.
          part: (i, n), to answer every n-th batch, from the i-th on: a process's share of a job.
        """
        search = self._search(search)
        limit, capacity = self.limits(max_new_tokens)
        prompts, seeds = asked(prompts, seeds)
        silent = not description or not distributed.is_primary()
        decode = self._decode_until if search.stop else self._decode
        given = self._batches(prompts, limit, seeds, mismatched, (capacity, search, False))

        def dispatched() -> Iterator[tuple[np.ndarray, Any]]:
            decoded = None
            for indices, batch in itertools.islice(given, part[0], None, part[1]):
                jax.block_until_ready(decoded)  # one batch at a time is on the devices
                decoded = decode(batch, capacity, search, mismatched)
                yield indices, decoded

        total = len(prompts) // part[1]
        with tqdm(total=total, desc=description, disable=silent, file=sys.stderr) as bar:
            for indices, decoded in one_ahead(dispatched()):
                if not search.stop:
                    decoded = outputs_of(sharding.gather(decoded), self.response_tokenizer)
                bar.update(len(indices))
                yield indices.tolist(), list(itertools.islice(decoded, len(indices)))

    def stream(
        self,
        prompt: str,
        *,
        search: Search | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """The response in pieces, as they are decoded: together, the text that `generate` gives.

        A piece ends between characters, never within one. Arguments and errors as of `generate`;
        a beam search cannot be streamed.
        """
        search = self._search(search)
        if search.num_beams > 1:
            raise ValueError(
                f"num_beams={search.num_beams}: expected 1, a beam search has no response before "
                "its end"
            )
        limit, capacity = self.limits(max_new_tokens)
        prompts, seeds = asked([prompt], [seed], "prompt")
        ((_, batch),) = self._batches(prompts, limit, seeds, False, (capacity, search, True))
        text = ResponseText(self.response_tokenizer, search.stop)
        for decoded in self._chunks(batch, capacity, search, False, lambda: [text.stopped]):
            tokens = decoded.tokens[: decoded.lengths[0], 0]
            if piece := text.extend(tokens, last=bool(decoded.done[0])):
                yield piece

    def _search(self, search: Search | None) -> Search:
        """The search of a call, as the system decodes."""
        longest = self.prompt_lengths[-1], self.max_new_tokens
        return search_of(self.system, search or self.search, *longest)

    def limits(self, max_new_tokens: int | None) -> tuple[int, int]:
        """(the most new tokens of a call, of the program that it runs).

        Raises:
          ValueError: more than the generator's.
        """
        if max_new_tokens is None:
            max_new_tokens = self.max_new_tokens
        if not 1 <= max_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens={max_new_tokens}: expected 1 to {self.max_new_tokens}, for which "
                "this generator was made"
            )
        return max_new_tokens, next(b for b in self.new_token_buckets if b >= max_new_tokens)

    def _batches(
        self,
        prompts: Sequence[str],
        limit: int,
        seeds: Sequence[int],
        mismatched: bool,
        kind: Any,
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        """(indices of the prompts in the first rows, batch); `kind` is that of their programs."""

        def rows(count: int, length: int) -> int:
            fits = [rows for rows in self.row_buckets if rows >= count]
            ready = [rows for rows in fits if (rows, length, kind) in self._ready]
            # For the rest after whole batches, no program is compiled.
            chosen = (ready if ready and len(prompts) > self.batch_size else fits)[0]
            self._ready.add((chosen, length, kind))
            return chosen

        return batches(
            prompts,
            seeds,
            self.system.name,
            self.prompt_tokenizer,
            prompt_lengths=self.prompt_lengths,
            limit=limit,
            # A batch of one row has no other row to be mismatched with.
            batch_size=max(self.batch_size, 2) if mismatched else self.batch_size,
            rows=None if mismatched else rows,
        )

    def _decode(
        self, batch: Batch, capacity: int, search: Search, mismatched: bool
    ) -> Decoded | Hypotheses:
        with jax.set_mesh(self.mesh):
            return jitted_decode(
                self.system,
                self.trained,
                self.frozen,
                *self._put(batch),
                max_new_tokens=capacity,
                search=search,
                mismatched=mismatched,
                end_ids=self.end_ids,
            )

    def _put(self, batch: Batch) -> Batch:
        """The batch on the devices, split by rows."""
        return sharding.put(batch, sharding.batch_sharding(self.mesh))

    def _chunks(
        self,
        batch: Batch,
        capacity: int,
        search: Search,
        mismatched: bool,
        ended: Callable[[], Sequence[bool]],
    ) -> Iterator[Progress]:
        """What has been decoded after each chunk; `ended` says which of the first rows have said
        enough.
        """
        search = dataclasses.replace(search, stop=())
        settings = {"max_new_tokens": capacity, "search": search, "end_ids": self.end_ids}
        weights = (self.trained, self.frozen)
        with jax.set_mesh(self.mesh):
            state = start(
                self.system, *weights, *self._put(batch), mismatched=mismatched, **settings
            )
        while True:
            is_exact = isinstance(state, ExactState)
            drafts = (state.blocks, state.tested, state.passed) if is_exact else ()
            progress = Progress(*sharding.gather((state.tokens, state.lengths, state.done, drafts)))
            yield progress
            told = ended()
            stopped = np.zeros(len(batch.limits), bool)
            stopped[: len(told)] = told
            if (progress.done | stopped).all():
                return
            # Not around the loop: it would hold while the caller has the progress.
            with jax.set_mesh(self.mesh):
                state = advance(self.system, *weights, state, stopped, **settings)

    def _decode_until(
        self, batch: Batch, capacity: int, search: Search, mismatched: bool
    ) -> Sequence[Output]:
        """The output of each row, decoded in chunks until it holds one of search.stop."""
        texts = [ResponseText(self.response_tokenizer, search.stop) for _ in batch.limits]
        drafts: dict[int, Drafts] = {}
        for progress in self._chunks(
            batch, capacity, search, mismatched, lambda: [text.stopped for text in texts]
        ):
            for row, text in enumerate(texts):
                if not text.stopped:
                    tokens = progress.tokens[: progress.lengths[row], row]
                    text.extend(tokens, last=bool(progress.done[row]))
                    if progress.drafts:
                        drafts[row] = drafts_of(progress.drafts, row)
        return [
            output_of_text(text, self.end_ids, drafts.get(row)) for row, text in enumerate(texts)
        ]
