"""Check the unpacked sizes of a Parquet file's pages, before any reader unpacks them.

The footer states a size too, but readers allocate by the page headers, and the footer of a
decompression bomb lies. The check uses no library: Arrow 25 ends the process, with no exception,
when Python reads the metadata of a column whose size statistics are corrupt.
"""

from typing import Any

MAX_PAGE_BYTES = 64 << 20
"""Maximum bytes of an unpacked page: one for 122,880 images, DuckDB's row group, takes 40 MB."""

MAX_FOOTER_BYTES = 2 << 20
"""Maximum bytes of the footer: 1.5 kB a row group of 1,000 images makes 0.75 MB for 500,000."""

MAX_ITEMS = 10_000
"""Maximum items of a list in the footer: row groups, or columns of one."""

_MAX_PAGES = 100_000
_MAX_PAGE_HEADER = 64 << 10  # bytes; some writers put the smallest and largest value into it
_MAX_FIELD = 1000  # Parquet's own field numbers end at 20
_MAX_DEPTH = 16  # and its own structs and lists are nested 9 deep

# Thrift's compact protocol, by its specification:
# https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
# Types of a field. A boolean is its type alone and has no value after it.
_BOOLEANS = {1, 2}
_BYTE = 3
_I16 = 4
_I32 = 5
_I64 = 6
_INTEGERS = {_I16, _I32, _I64}
_BYTES = 8
_LIST = 9
_STRUCT = 12
_LONG_LIST = 15  # instead of a list's length: a varint with the length follows
_MAX_SHIFT = 63  # of the last seven bits of a varint of 64 bits

# Fields of https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift,
# by number and type.
# FileMetaData
_NUM_ROWS = (3, _I64)
_ROW_GROUPS = (4, _LIST)
# RowGroup
_COLUMN_CHUNKS = (1, _LIST)
# ColumnChunk
_COLUMN = (3, _STRUCT)
# ColumnMetaData
_PACKED = (7, _I64)
_DATA_AT = (9, _I64)
_DICTIONARY_AT = (11, _I64)
# PageHeader, and the first field of each struct in it
_PAGE_UNPACKED = (2, _I32)
_PAGE_PACKED = (3, _I32)
_PAGE_VALUES = (1, _I32)
_Struct = dict[tuple[int, int], Any]


class BadPages(ValueError):
    """A file that no reader should open; the message has the observed and the expected value."""


class _NotThrift(ValueError):
    """The bytes are not a footer or page header as a writer writes it."""


def check_pages(content: bytes, name: str, rows: int, limit: int) -> None:
    """Raise BadPages for a Parquet file that is cut off, empty or corrupt, or unpacks to too much.

    No page may hold more than `rows` values, and all pages together no more than `limit` bytes,
    unpacked. `name` is the file's name in the message.
    """
    # A file is PAR1, pages, footer, the footer's length in four bytes, PAR1.
    size = int.from_bytes(content[-8:-4], "little")
    if content[:4] != b"PAR1" or content[-4:] != b"PAR1" or size + 12 > len(content):
        raise BadPages(
            f"{name} is no whole Parquet file: its {len(content)} bytes do not begin and end with "
            "PAR1 and hold the footer that they promise; send it again"
        )
    if size > MAX_FOOTER_BYTES:
        raise BadPages(
            f"{name} has a footer of {size} bytes; expected at most {MAX_FOOTER_BYTES}: write "
            "row groups of 1,000 rows or more and leave other columns away"
        )
    try:
        footer = _Thrift(content[-8 - size : -8]).struct()
        if footer[_NUM_ROWS] == 0:
            raise BadPages(f"{name} has 0 rows; expected at least one image in each file")
        unpacked = _unpacked_bytes(content, name, footer, rows)
    except (IndexError, KeyError, _NotThrift) as error:
        raise BadPages(
            f"{name} has a corrupt footer or page header; expected sizes and places of its pages: "
            "write it again"
        ) from error
    if unpacked > limit:
        raise BadPages(
            f"{name} unpacks to {unpacked} bytes; expected at most {limit}: it was not unpacked"
        )


def _unpacked_bytes(content: bytes, name: str, footer: _Struct, rows: int) -> int:
    """Return the unpacked size of all pages, in bytes, as their headers state it.

    The pages of a column follow each other: each header gives the offset of the next one.
    """
    total = 0
    pages = 0
    groups = _structs(footer[_ROW_GROUPS])
    for chunk in (chunk for group in groups for chunk in _structs(group[_COLUMN_CHUNKS])):
        column = chunk[_COLUMN]
        # A dictionary page, if there is one, comes before the data; 0 stands for none.
        at = min(column[_DATA_AT], column.get(_DICTIONARY_AT) or column[_DATA_AT])
        end = at + column[_PACKED]
        if not 0 < at <= end <= len(content):
            raise BadPages(
                f"{name} promises pages in its bytes {at} to {end}; expected them within "
                f"{len(content)}: it is corrupt, write it again"
            )
        while at < end:
            header = _Thrift(content[at : at + _MAX_PAGE_HEADER])
            sizes = header.struct()
            unpacked = sizes[_PAGE_UNPACKED]
            packed = sizes[_PAGE_PACKED]
            at += header.at + packed
            total += unpacked
            pages += 1
            # The number of values is in the struct of the page's kind: data, dictionary or data v2.
            kinds = (part for part in sizes.values() if isinstance(part, dict))
            values = max((part[_PAGE_VALUES] for part in kinds), default=-1)
            if min(unpacked, packed, values) < 0:  # a negative size could loop for ever
                raise _NotThrift
            if unpacked > MAX_PAGE_BYTES or values > rows or pages > _MAX_PAGES:
                raise BadPages(
                    f"{name} unpacks its page {pages} to {unpacked} bytes of {values} values; "
                    f"expected at most {MAX_PAGE_BYTES} of {rows} in at most {_MAX_PAGES} "
                    "pages: it was not unpacked"
                )
    return total


def _structs(values: list[Any]) -> list[_Struct]:
    if not all(isinstance(value, dict) for value in values):
        raise _NotThrift
    return values


class _Thrift:
    """A reader of Thrift's compact protocol, as far as Parquet's footer and page headers use it.

    A struct is a dict of its values by number and type of their field; of bytes only the length is
    kept. Raises IndexError where the content ends, and _NotThrift for anything that a writer never
    writes, such as the same field twice: Arrow might take the other one of the two.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0

    def struct(self, depth: int = 0) -> _Struct:
        """Return the struct that begins at `at`, and move `at` behind it."""
        values: _Struct = {}
        number = 0
        while head := self._byte():
            # The high half of the byte is the distance from the field before, 0 if that is too far.
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._integer()
            if (number, kind) in values or not 0 < number <= _MAX_FIELD:
                raise _NotThrift
            values[number, kind] = None if kind in _BOOLEANS else self._value(kind, depth)
        return values

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise _NotThrift
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BYTE:
            return self._byte()
        if kind == _BYTES:
            length = self._varint()
            self.at += length
            return length
        if kind == _LIST:
            head = self._byte()
            count = head >> 4 if head >> 4 < _LONG_LIST else self._varint()
            if count > MAX_ITEMS:
                raise _NotThrift
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise _NotThrift

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _varint(self) -> int:
        # Seven bits a byte, the lowest first; the eighth bit is set if another byte follows.
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > _MAX_SHIFT:
                raise _NotThrift
        return value | byte << shift

    def _integer(self) -> int:
        # Zigzag: 0, -1, 1, -2 are written as 0, 1, 2, 3.
        value = self._varint()
        return value >> 1 ^ -(value & 1)
