"""Records of Parquet files, by batches, and only the columns that somebody wants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import fsspec

from l2s_jax.data.sources import Record
from l2s_jax.data.text import all_whole, decoded
from l2s_jax.messages import one_line

_ROWS_AT_ONCE = 1024


def read_parquet(path: str, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Records of a Parquet file, which may be any URL that fsspec knows.

    A record's `line` is its row, from 1. Bytes are taken for UTF-8.

    Args:
      path: the file.
      columns: which of them are read; None: all that hold text, numbers, or lists of these.

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
            wanted = list(dict.fromkeys(columns or _plain_columns(file.schema_arrow)))
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                values = [_values(batch.column(name), name, row, path) for name in wanted]
                for fields in zip(*values, strict=True):
                    yield Record(dict(zip(wanted, fields, strict=True)), path, row)
                    row += 1
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except LookupError as error:
        raise ValueError(f"{path}: {error.args[0]}") from error
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: no Parquet file: {one_line(error)}") from error
    except (pyarrow.ArrowException, OSError, ImportError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error


def _plain_columns(schema: Any) -> list[str]:
    from pyarrow import types

    kinds = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer)
    kinds += (types.is_floating, types.is_null)

    def is_plain(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            return is_plain(kind.value_type)
        return any(fits(kind) for fits in kinds)

    return [field.name for field in schema if is_plain(field.type)]


def _values(column: Any, name: str, row: int, path: str) -> list[Any]:
    """What one column of a batch holds; the batch begins at row `row`."""
    try:
        return [_of_bytes(value) for value in column.to_pylist()]
    except UnicodeDecodeError:
        return [_value(column[i], name, row + i, path) for i in range(len(column))]


def _of_bytes(value: Any) -> Any:
    return decoded(value) if isinstance(value, bytes) else all_whole(value)


def _value(scalar: Any, name: str, row: int, path: str) -> Any:
    """One value of a column, of which some are not UTF-8."""
    try:
        # Of a text that Arrow cannot decode, it still has the bytes.
        return decoded(scalar.as_buffer().to_pybytes())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{row}: field {name!r} is not UTF-8: {error.reason} at byte {error.start}"
        ) from error
    except AttributeError:
        return scalar.as_py()
