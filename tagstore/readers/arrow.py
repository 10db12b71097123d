"""Arrow files, and folders that Hugging Face's `save_to_disk` wrote, read a few rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput, MissingExtra
from tagstore.readers.records import Options, choose_columns, row_to_pair
from tagstore.readers.values import rejected
from tagstore.types import Pair, Rejected

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files of a saved dataset, and of a saved dictionary of its splits."""
_BATCH_ROWS = 32


def read_arrow(file: Path, options: Options) -> Iterator[Pair | Rejected]:
    """Every row a pair; numbers in messages count rows from 1."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingExtra("reading Arrow needs pyarrow: pip install 'tagstore[server]'") from error
    number = 0
    try:
        with pa.memory_map(str(file)) as source:
            chosen = None
            for batch in _batches(pa, source):
                chosen = chosen or choose_columns(options, batch.schema.names, str(file))
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                        number += 1
                        yield row_to_pair(row, chosen, file, number, options)
    except (pa.ArrowException, OSError, ValueError) as error:
        if not number:
            raise InvalidInput(f"{file}: not an Arrow file, or cut off ({error})") from None
        reason = f"damaged or cut off: what came before row {number + 1} is used ({error})"
        yield rejected(f"{file.name}:{number + 1}", reason, f"{file}:{number + 1}")


def _batches(pa: Any, source: Any) -> Iterator[Any]:
    """The record batches of a file, or of a stream, as datasets write them."""
    if source.read(6) == b"ARROW1":
        source.seek(0)
        reader = pa.ipc.open_file(source)
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    source.seek(0)
    return iter(pa.ipc.open_stream(source))


def saved_files(folder: Path) -> list[Path] | None:
    """The files of a dataset that was saved to this folder, in order; None if none was.

    Raises `InvalidInput` for one of several splits, or whose description is damaged.
    """
    try:
        if (folder / SPLITS).is_file():
            splits = [str(name) for name in json.loads((folder / SPLITS).read_bytes())["splits"]]
            if len(splits) > 1:
                raise InvalidInput(
                    f"{folder}: a dataset of several splits ({', '.join(splits)}): give {folder / splits[0]}"
                )
            return saved_files(folder / splits[0])
        if not (folder / STATE).is_file():
            return None
        files = json.loads((folder / STATE).read_bytes())["_data_files"]
        return [folder / file["filename"] for file in files]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidInput(f"{folder}: a saved dataset whose description is damaged ({error})") from None
