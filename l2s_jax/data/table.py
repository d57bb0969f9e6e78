"""Examples, and many of them in little memory."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar, overload

import numpy as np

from l2s_jax.data.ragged import Growing, GrowingRagged, Ragged, numbers
from l2s_jax.data.templates import Prompt, Span, spans_of

# Examples that are objects at one time, while a table is made or read.
_AT_ONCE = 4096
_CUT, _REPEATS = 1, 2

T = TypeVar("T")


class Example(NamedTuple):
    """A prompt, its response and all accepted responses, the first of which is `response`.

    cut: whether the response has no end, since whoever wrote it was stopped.
    """

    prompt: str
    response: str
    references: tuple[str, ...]
    cut: bool = False


class Indexed(Sequence[T]):
    """A sequence of what is `at` each place; a slice of it is a list."""

    @abc.abstractmethod
    def at(self, place: int) -> T:
        """What is at a place from 0 on."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return [self.at(i) for i in places] if isinstance(places, range) else self.at(places)


class ExampleTable(Indexed[Example]):
    """Examples as bytes, which lie in files where they are many; as objects each takes a kilobyte.

    Prompts come back with their spans.
    """

    def __init__(self, examples: Iterable[Example]):
        """Takes examples one by one, so that a generator's are never all there.

        Raises:
          OSError: there is no room for a file; it names the folder.
        """
        texts, spans = GrowingRagged(np.uint8), GrowingRagged(np.int32)
        ends, flags = Growing(np.int64), Growing(np.uint8)
        ends.append(np.zeros(1))
        number, kinds = 0, {}
        for chunk in chunks(examples, _AT_ONCE):
            rows = [_texts(example) for example in chunk]
            encoded = [text.encode(errors="surrogatepass") for row in rows for text in row]
            texts.append(np.frombuffer(b"".join(encoded), np.uint8), [*map(len, encoded)])
            counts = np.cumsum([*map(len, rows)])
            ends.append(number + counts)
            number += int(counts[-1])
            flags.append(np.array([_flags(example) for example in chunk]))
            placed = [_numbers(example.prompt, kinds) for example in chunk]
            spans.append(numbers(placed, np.int32), [*map(len, placed)])
        self._texts, self._spans = texts.done(), spans.done()
        self._ends, self._flags = ends.array(), flags.array()
        self._kinds = list(kinds)

    def __len__(self) -> int:
        return len(self._flags)

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self._some(start, min(start + _AT_ONCE, len(self)))

    def at(self, place: int) -> Example:
        """An example, made of its bytes."""
        return next(self._some(place, place + 1))

    def _some(self, start: int, stop: int) -> Iterator[Example]:
        """Examples `start` to `stop`, whose bytes are read at once."""
        ends = self._ends[start : stop + 1].tolist()
        texts = [
            text.decode(errors="surrogatepass") for text in _pieces(self._texts, ends[0], ends[-1])
        ]
        spans = [
            [self._span(*three) for three in np.frombuffer(some, np.int32).reshape(-1, 3).tolist()]
            for some in _pieces(self._spans, start, stop)
        ]
        for (first, end), own, flags in zip(
            itertools.pairwise(ends), spans, self._flags[start:stop].tolist(), strict=True
        ):
            prompt, response, *rest = texts[first - ends[0] : end - ends[0]]
            yield Example(
                Prompt(prompt, own),
                response,
                (response, *rest) if flags & _REPEATS else tuple(rest),
                bool(flags & _CUT),
            )

    def _span(self, kind: int, start: int, stop: int) -> Span:
        field, side = self._kinds[kind]
        return Span(field, start, stop, side)


def chunks(things: Iterable[T], size: int) -> Iterator[list[T]]:
    """All things, so many at a time."""
    remaining = iter(things)
    while chunk := list(itertools.islice(remaining, size)):
        yield chunk


def _pieces(ragged: Ragged, start: int, stop: int) -> list[bytes]:
    """The bytes of sequences `start` to `stop`."""
    size = ragged.values.itemsize
    offsets = ragged.offsets[start : stop + 1].tolist()
    whole = ragged.values[offsets[0] : offsets[-1]].tobytes()
    return [
        whole[size * (a - offsets[0]) : size * (b - offsets[0])]
        for a, b in itertools.pairwise(offsets)
    ]


def _texts(example: Example) -> tuple[str, ...]:
    return (example.prompt, example.response, *example.references[_repeats(example) :])


def _repeats(example: Example) -> bool:
    """Whether the first reference need not be kept."""
    return example.references[:1] == (example.response,)


def _flags(example: Example) -> int:
    return _CUT * example.cut + _REPEATS * _repeats(example)


def _numbers(prompt: str, kinds: dict[tuple[str, str], int]) -> list[int]:
    """Of each span of a prompt its kind, start and stop; a new kind is added to `kinds`."""
    return [
        number
        for span in spans_of(prompt)
        for number in (
            kinds.setdefault((span.field, span.side), len(kinds)),
            span.start,
            span.stop,
        )
    ]
