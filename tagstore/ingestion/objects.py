"""Objects of a program as pairs: DataFrames, Arrow tables, Hugging Face datasets, records.

No library is imported for its type: a source is known by its methods, and brings what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.readers.image_files import png_of
from tagstore.readers.merging import rows_together
from tagstore.readers.records import ChosenColumns, Columns, Options, choose_columns, row_to_pair
from tagstore.readers.values import rejected
from tagstore.types import Pair, Rejected

_ROWS = 64
"""Rows that are taken from a table at a time."""
_WINDOW = 100
"""Records at the beginning whose fields are taken for those of all."""

KINDS = (
    "the path of a file or folder, a pandas or Polars DataFrame, an Arrow table, a Hugging Face Dataset, or "
    "an iterable of Pair or of dicts with an image, captions and other columns"
)


def name_of(source: Any) -> str:
    """What a version records of where its pairs came from: the object's type."""
    kind = type(source)
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def pairs_of(
    source: Any,
    *,
    columns: Columns = Columns(),  # noqa: B008  frozen
    images: str | Path | None = None,
    captions_optional: bool = False,
) -> Iterator[Pair | Rejected]:
    """The pairs of an object, in its order; memory holds a few rows beside the object itself.

    Keys are those of `readers.read`, with `rows:N` for a row that has neither key nor path.

    Args:
        columns: names of columns, where they aren't the usual ones.
        images: folder that paths are relative to and may not leave; without one a path is the program's own
            word, relative to its working directory.
        captions_optional: a pair needs no caption.

    Raises:
        InvalidInput: nothing that can be read as pairs, a column is missing, or there is no row.
    """
    records = _records(source)
    first = list(islice(records, _WINDOW))
    if not first:
        raise InvalidInput(f"the {name_of(source)} has no rows")
    records = chain(first, records)
    folder = Path.cwd() if images is None else Path(images)
    options = Options(folder, columns, allow_outside=images is None, captions_optional=captions_optional)
    names = dict.fromkeys(name for record in first if isinstance(record, Mapping) for name in record)
    chosen = choose_columns(options, map(str, names), f"the {name_of(source)}") if names else None
    yield from rows_together(_rows(records, chosen, folder, options))


def _rows(
    records: Iterable[Any], chosen: ChosenColumns | None, folder: Path, options: Options
) -> Iterator[Pair | Rejected]:
    for number, record in enumerate(records, start=1):
        if isinstance(record, Pair | Rejected):
            yield record
        elif isinstance(record, Mapping) and chosen is not None:
            row = {str(name): _plain(value) for name, value in record.items()}
            yield row_to_pair(row, chosen, folder / "rows", number, options)
        else:
            reason = f"no record: item {number} is of type {type(record).__name__}, pass Pair or dict"
            yield rejected(f"rows:{number}", reason, f"rows:{number}")


def _records(source: Any) -> Iterator[Any]:
    if hasattr(source, "cast_column"):
        return _of_dataset(source)
    if hasattr(source, "iloc") and hasattr(source, "to_dict"):
        return _of_pandas(source)
    if hasattr(source, "__arrow_c_stream__"):
        return _of_arrow(source)
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "cast_column") for value in source.values()):
            raise InvalidInput(f"several splits ({', '.join(map(str, source))}): pass one, dataset['train']")
        raise InvalidInput("a dict is one record: pass a list of them, or a DataFrame")
    if isinstance(source, bytes | str) or not isinstance(source, Iterable):
        raise InvalidInput(f"source is of type {type(source).__name__}: pass {KINDS}")
    return iter(source)


def _of_pandas(frame: Any) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(frame), _ROWS):
        yield from frame.iloc[start : start + _ROWS].to_dict("records")


def _of_arrow(table: Any) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa

    with pa.RecordBatchReader.from_stream(table) as batches:
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                yield from batch.slice(start, _ROWS).to_pylist()


def _of_dataset(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """Images stay encoded, as they are in the dataset's files."""
    for name, feature in (dataset.features or {}).items():
        if type(feature).__name__ == "Image":
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return iter(dataset)


def _plain(value: Any) -> Any:
    """A cell as Python has it: numpy's numbers and arrays, pandas' missing values, decoded pictures."""
    if value is None or isinstance(value, str | bytes | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "getbands"):  # a PIL image
        return png_of(value)
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    convert: Callable[[], Any] | None = getattr(value, "tolist", None) or getattr(value, "item", None)
    return value if convert is None else _plain(convert())
