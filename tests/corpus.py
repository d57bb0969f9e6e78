"""Damaged files, made systematically of small valid ones, and what a reader may make of them.

A reader gives one line that names the file, as a ValueError or an OSError, or the right result. It
takes no memory to speak of beyond the file's size, and it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from l2s_jax.messages import one_line

# Beyond these a reader has gone after a number in a file that nothing there stands for.
SECONDS, MEGABYTES = 30, 200
LONGEST_LINE = 1000
# What stands in the place of a value, as JSON's text.
HOSTILE = {
    "null": "null",
    "true": "true",
    "text": '"x"',
    "empty text": '""',
    "list": "[]",
    "nested list": "[[[]]]",
    "object": "{}",
    "-1": "-1",
    "0": "0",
    "10^6": "1000000",
    "10^9": "1000000000",
    "2^31": "2147483648",
    "30 digits": "9" * 30,
    "5,000 digits": "9" * 5000,
    "fraction": "0.5",
    "infinity": "1e400",
    "-Infinity": "-Infinity",
    "NaN": "NaN",
    "escape sequence": '"\\u001b[31mred\\u0007"',
    "half a character": '"\\ud83d"',
}
_MARK = "@@ the value @@"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A damaged file: what was done to it, and what is in it.

    key: of JSON, the last name on the way to the value that was replaced.
    value: and what it was replaced by, a name in HOSTILE.
    """

    name: str
    content: bytes
    key: str = ""
    value: str = ""


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values within a JSON value; of a list's the first and the last."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from _places(item, (*path, key))
    elif isinstance(value, list):
        for place in sorted({0, len(value) - 1} if value else ()):
            yield (*path, place)
            yield from _places(value[place], (*path, place))


def _replaced(value: Any, path: tuple, new: Any) -> Any:
    first, *rest = path
    copy = value.copy()
    copy[first] = _replaced(value[first], tuple(rest), new) if rest else new
    return copy


def _removed(value: Any, path: tuple) -> Any:
    first, *rest = path
    copy = value.copy()
    if rest:
        copy[first] = _removed(value[first], tuple(rest))
    else:
        del copy[first]
    return copy


def json_values(value: Any, hostile: dict[str, str] | None = None) -> Iterator[Variant]:
    """Each key removed, and each value replaced by each hostile one."""
    for path in _places(value):
        where = ".".join(map(str, path))
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        yield Variant(f"without {where}", json.dumps(_removed(value, path)).encode(), key, "")
        marked = json.dumps(_replaced(value, path, _MARK))
        for name, text in (HOSTILE if hostile is None else hostile).items():
            content = marked.replace(json.dumps(_MARK), text)
            yield Variant(f"{where}: {name}", content.encode(), key, name)


def json_texts(content: bytes) -> Iterator[Variant]:
    """A JSON file that is no longer one, or is one of another kind."""
    yield from cut(content)
    whole = content.decode().strip()
    first = next(iter(json.loads(whole)))
    again = f'{{{json.dumps(first)}: "another", {whole.removeprefix("{")}'
    deep = 100_000
    texts = {
        "a byte order mark": "\ufeff" + whole,
        "a key twice": again,
        "nested lists": "[" * deep,
        "nested lists, whole": "[" * deep + "]" * deep,
        "nested objects": '{"a":' * deep,
        "a value that nests": f"{{{json.dumps(first)}: {'[' * deep}{']' * deep}}}",
        "more after it": whole + "}",
        "a list": f"[{whole}]",
        "null": "null",
        "a number": "1",
        "a number of 5,000 digits": "9" * 5000,
        "a NUL": whole + "\0",
        "spaces": "   ",
    }
    for name, text in texts.items():
        yield Variant(name, text.encode())
    yield Variant("UTF-16", whole.encode("utf-16"))
    yield Variant("binary", bytes(range(256)) * 4)
    yield Variant("no UTF-8", whole.replace('"', '"\udcff', 1).encode(errors="surrogateescape"))


def cut(content: bytes) -> Iterator[Variant]:
    """A file that ends early."""
    size = len(content)
    for end in sorted({0, 1, size // 4, size // 2, 3 * size // 4, size - 1}):
        yield Variant(f"cut to {end} of {size} bytes", content[:end])


def flips(content: bytes, count: int, start: int = 0, stop: int | None = None) -> Iterator[Variant]:
    """One bit turned, at `count` places that are evenly apart."""
    stop = len(content) if stop is None else stop
    for number in range(count):
        place = start + number * (stop - start) // count
        changed = bytearray(content)
        changed[place] ^= 1 << (number * 3 % 8)
        yield Variant(f"bit {number * 3 % 8} of byte {place} turned", bytes(changed))


def safetensors_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: `header` is its JSON or what to write in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def safetensors_parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors_variants(content: bytes) -> Iterator[Variant]:
    """Headers that lie about lengths, places, shapes, types and names; cut and turned bytes."""
    header, data = safetensors_parts(content)
    names = [name for name in header if name != "__metadata__"]
    first, second = names[:2]
    lengths = (0, 1, 2, 7, len(content) - 9, len(content), 10**6, 10**9, 2**31, 2**53, 2**63 - 1)
    for length in (*lengths, 2**64 - 1):
        yield Variant(f"header of {length} bytes", safetensors_file(header, data, length))

    def with_tensor(name: str, **changes: Any) -> bytes:
        return safetensors_file(header | {name: header[name] | changes}, data)

    start, end = header[first]["data_offsets"]
    shape, size = header[first]["shape"], len(data)
    for offsets in (
        [end, start], [start, size + 4], [start + 4, end + 4], [start, end - 4], [0, 0], [-4, end],
        [start, 2**63], [2**64 - 4, 2**64], [size, size], [start], [], "0", None,
        [float(start), end + 0.5], header[second]["data_offsets"],
    ):  # fmt: skip
        yield Variant(f"{first} at {offsets}", with_tensor(first, data_offsets=offsets))
    for other in (
        [], [0], [1], [-1, *shape], [*shape, 2], [2**32, 2**32], [2**63, 2], [2**62, 4, *shape],
        [10**30], [1e9], ["4"], None, "x", {}, [[4]], shape[::-1] if shape[1:] else [1, *shape],
    ):  # fmt: skip
        if other != shape:
            yield Variant(f"{first} of shape {other}", with_tensor(first, shape=other))
    for dtype in ("F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "x", "", 4, None):
        yield Variant(f"{first} of {dtype}", with_tensor(first, dtype=dtype))
    for name in ("", "a\x1b[31mb", "a\nb\rc", "x" * 100_000, "a\x00b", "\u202egpj", "../../x"):
        renamed = {name if key == first else key: value for key, value in header.items()}
        yield Variant(f"{first} named {name[:20]!r}", safetensors_file(renamed, data))
    yield Variant(f"no {first}", safetensors_file({k: v for k, v in header.items() if k != first}))
    yield Variant("a gap", safetensors_file(header, b"\0" * 8 + data))
    yield Variant("more data", safetensors_file(header, data + b"\0" * 8))
    for metadata in (1, "x", {"format": 1}, {"a": {}}, {"format": "\x1b[0m"}, {"sha256": "0"}):
        named = header | {"__metadata__": metadata}
        yield Variant(f"metadata {metadata!r}", safetensors_file(named, data))
    for variant in json_texts(json.dumps(header).encode()):
        yield dataclasses.replace(
            variant, name=f"header: {variant.name}", content=safetensors_file(variant.content, data)
        )
    for bits in (0x7FC00000, 0x7F800000, 0xFF800000):
        broken = data[:start] + struct.pack("<I", bits) + data[start + 4 :]
        yield Variant(f"a number of {bits:x}", safetensors_file(header, broken))
    yield from cut(content)
    yield from flips(content, 16, 0, 8)


@dataclasses.dataclass
class Trial:
    """Of many variants: how many there were, how many gave a line, and what went wrong."""

    tried: int = 0
    lines: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)

    def read(
        self,
        variants: Iterator[Variant],
        path: Path,
        read: Callable[[], Any],
        *,
        same: Callable[[Any, Variant], bool],
        named: str = "",
    ) -> None:
        """Has a reader read each variant in the place of a file, which is as before at the end.

        Args:
          variants: of the file's content.
          path: the file.
          read: reads it and what lies around it.
          same: whether what was read is right.
          named: what a line must name, if not the file's folder.
        """
        before = path.read_bytes()
        named = named or str(path.parent)
        try:
            for variant in variants:
                self.tried += 1
                path.write_bytes(variant.content)
                if fault := self._fault(variant, read, same, named):
                    self.faults.append(f"{path.name}, {variant.name}: {fault}")
        finally:
            path.write_bytes(before)

    def _fault(
        self, variant: Variant, read: Callable[[], Any], same: Callable[..., bool], named: str
    ) -> str:
        """What is wrong with what a reader makes of a variant; "" if nothing is."""
        most = _peak() + MEGABYTES + 2 * len(variant.content) // 2**20
        try:
            with _ends_soon():
                found = read()
        except (ValueError, OSError) as error:
            self.lines += 1
            line = one_line(error)
            if not line.isprintable() or len(line) > LONGEST_LINE:
                return f"not one clear line: {line[:200]!r}"
            if named not in line:
                return f"names no file: {line[:200]}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{type(error).__name__}: {str(error)[:200]!r}"
        else:
            if not same(found, variant):
                return "read as something else"
        return f"{_peak() - most + MEGABYTES} MB more" if _peak() > most else ""


class _TooLong(BaseException):
    pass


@contextlib.contextmanager
def _ends_soon() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLong(f"still reading after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _peak() -> int:
    """The most memory that this process has had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE, whose first three tokens are special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=20, special_tokens=special)
    tokenizer.train_from_iterator(["abc bca cab abba"] * 5, trainer)
    return tokenizer
