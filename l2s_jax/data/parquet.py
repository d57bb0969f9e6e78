"""Records of Parquet files, by batches, and only the columns that somebody wants."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec

from l2s_jax.data.sources import Record
from l2s_jax.data.text import all_whole, decoded
from l2s_jax.messages import one_line

_ROWS_AT_ONCE = 1024

log = logging.getLogger(__name__)


def read_parquet(path: str, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Records of a Parquet file, which may be any URL that fsspec knows.

    A record's `line` is its row, from 1. Bytes are taken for UTF-8. There is a record for each row,
    also where no column is read.

    Args:
      path: the file.
      columns: which of them are read; None: all that hold text, numbers, or lists of these. Bytes
        that nobody has noted as text are such a column if they are UTF-8 to begin with.

    Raises:
      ValueError: the file is missing or no Parquet, lacks a column, or holds text that is not
        UTF-8.
    """
    # Imported here: half a second that most commands need not spend.
    import pyarrow
    from pyarrow import parquet

    try:
        with fsspec.open(path, "rb") as stream, parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    raise LookupError(f"no column {column!r} (columns: {', '.join(names)})")
            row = 1
            wanted = list(dict.fromkeys(columns or _plain_columns(file, path)))
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                values = {name: _values(batch.column(name), name, row, path) for name in wanted}
                for place in range(len(batch)):
                    fields = {name: column[place] for name, column in values.items()}
                    yield Record(fields, path, row + place)
                row += len(batch)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except LookupError as error:
        raise ValueError(f"{path}: {error.args[0]}") from error
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: no Parquet file: {one_line(error)}") from error
    except (pyarrow.ArrowException, OSError, ImportError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error


def _plain_columns(file: Any, path: str) -> list[str]:
    """What `read_parquet` reads where nobody says what.

    Raises:
      ValueError: nothing but bytes that are no text.
    """
    from pyarrow import types

    # Polars writes views; what has written bytes may have meant text.
    unnoted = (types.is_binary, types.is_large_binary, types.is_binary_view)
    kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_null, *unnoted)
    kinds += (types.is_boolean, types.is_integer, types.is_floating)
    of_others = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_dictionary)
    of_others += (types.is_list_view, types.is_large_list_view)

    def innermost(kind: Any) -> Any:
        return innermost(kind.value_type) if any(of(kind) for of in of_others) else kind

    wanted, no_text = [], []
    for name, kind in ((field.name, innermost(field.type)) for field in file.schema_arrow):
        if any(of(kind) for of in unnoted):
            first = next(file.iter_batches(_ROWS_AT_ONCE, columns=[name]), None)
            try:
                if first:
                    _values(first.column(name), name, 1, path)
            except ValueError as error:
                no_text.append(error)
                continue
        if any(of(kind) for of in kinds):
            wanted.append(name)
    if no_text and not wanted:
        raise no_text[0]
    for error in no_text:
        log.warning("%s; the column is left out", error)
    return wanted


def _values(column: Any, name: str, row: int, path: str) -> list[Any]:
    """What one column of a batch holds; the batch begins at row `row`.

    Raises:
      ValueError: text that is not UTF-8.
    """
    try:
        return [_whole(value) for value in column.to_pylist()]
    except UnicodeDecodeError:
        return [_value(column[i], name, row + i, path) for i in range(len(column))]


def _whole(value: Any) -> Any:
    """A value with its bytes as text, of whole characters."""
    if isinstance(value, bytes):
        return decoded(value)
    return [_whole(item) for item in value] if isinstance(value, list) else all_whole(value)


def _value(scalar: Any, name: str, row: int, path: str) -> Any:
    """One value of a column, of which some are not UTF-8."""
    try:
        return _from_bytes(scalar)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{row}: field {name!r} is not UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _from_bytes(scalar: Any) -> Any:
    """`_whole` of what a scalar holds: of a text that Arrow cannot decode, it still has the bytes.

    Raises:
      UnicodeDecodeError: it is not UTF-8.
    """
    if not scalar.is_valid:
        return None
    if hasattr(scalar, "as_buffer"):
        return decoded(scalar.as_buffer().to_pybytes())
    if hasattr(scalar, "dictionary"):
        return _from_bytes(scalar.value)
    if hasattr(scalar, "values"):
        return [_from_bytes(item) for item in scalar.values]
    return _whole(scalar.as_py())
