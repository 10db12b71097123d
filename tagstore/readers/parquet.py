"""Parquet files, read a few rows at a time.

Images are bytes, `{"bytes", "path"}` (as Hugging Face's datasets write them) or paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tagstore.errors import InvalidInput, MissingExtra
from tagstore.readers.records import Options, choose_columns, row_to_pair
from tagstore.readers.values import rejected
from tagstore.types import Pair, Rejected

_BATCH_ROWS = 32


def read_parquet(file: Path, options: Options) -> Iterator[Pair | Rejected]:
    """Every row a pair; numbers in messages count rows from 1."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("reading Parquet needs pyarrow: pip install 'tagstore[server]'") from error
    try:
        # A buffer makes it read pages as they are needed; without one a whole row group of images is in
        # memory.
        table = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{file}: not a Parquet file, or cut off ({error})") from None
    with table:
        chosen = choose_columns(options, table.schema_arrow.names, str(file))
        number = 0
        try:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        row = batch.slice(index, 1).to_pylist()[0]
                    except (ValueError, OverflowError) as error:
                        is_text = isinstance(error, UnicodeDecodeError)
                        trouble = "not UTF-8" if is_text else "a value that Python cannot hold"
                        yield rejected(f"{file.name}:{number}", f"{trouble}: {error}", f"{file}:{number}")
                        continue
                    yield row_to_pair(row, chosen, file, number, options)
        except (pa.ArrowException, OSError) as error:
            reason = f"damaged or cut off: what came before row {number + 1} is used ({error})"
            yield rejected(f"{file.name}:{number + 1}", reason, f"{file}:{number + 1}")
