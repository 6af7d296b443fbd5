"""Check what the pages of a Parquet file would unpack to, before any reader unpacks them.

A file's footer says it too, but readers take memory for what the page says, and a bomb's footer
lies. Nothing of a library is asked: Arrow 25 ends the process, with no exception, if Python asks it
for the metadata of a column whose size statistics are corrupt.
"""

from typing import Any

MAX_PAGE_BYTES = 64 << 20
"""Size of an unpacked page: one page for 122,880 images, DuckDB's row group, takes 40 MB."""

MAX_FOOTER_BYTES = 2 << 20
"""Size of the footer: 1.5 kB for each row group of 1,000 images makes 0.75 MB for 500,000."""

MAX_ITEMS = 10_000
"""Members of a list in the footer: row groups, or columns of one."""

_MAX_PAGES = 100_000
_MAX_PAGE_HEADER = 64 << 10  # bytes; some writers put the smallest and largest value into it
_MAX_FIELD, _MAX_DEPTH = 1000, 16  # Parquet numbers to 20 and nests to 9, lists included
_BOOLEANS, _BYTE, _INTEGERS, _BYTES, _LIST, _STRUCT = {1, 2}, 3, {4, 5, 6}, 8, 9, 12
# Fields of https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift,
# by number and type.
_NUM_ROWS, _ROW_GROUPS = (3, 6), (4, _LIST)
_COLUMN_CHUNKS, _COLUMN = (1, _LIST), (3, _STRUCT)
_PACKED, _DATA_AT, _DICTIONARY_AT = (7, 6), (9, 6), (11, 6)
_PAGE_UNPACKED, _PAGE_PACKED, _PAGE_VALUES = (2, 5), (3, 5), (1, 5)
_Struct = dict[tuple[int, int], Any]


class BadPages(ValueError):
    """A file that no reader should open; the sentence names it, what was got and expected."""


class _NotThrift(ValueError):
    """What should be a footer or page header holds what none holds."""


def check_pages(content: bytes, name: str, rows: int, limit: int) -> None:
    """Refuse a Parquet file that is cut off, empty or corrupt, or unpacks to too much.

    No page may hold more than `rows` values, and all together no more than `limit` bytes. Raises
    BadPages; `name` appears in it.
    """
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
    """Return what all pages unpack to, by the header of each."""
    total, pages = 0, 0
    groups = _structs(footer[_ROW_GROUPS])
    for chunk in (chunk for group in groups for chunk in _structs(group[_COLUMN_CHUNKS])):
        column = chunk[_COLUMN]
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
            unpacked, packed = sizes[_PAGE_UNPACKED], sizes[_PAGE_PACKED]
            at += header.at + packed
            total += unpacked
            pages += 1
            kinds = (part for part in sizes.values() if isinstance(part, dict))
            values = max((part[_PAGE_VALUES] for part in kinds), default=-1)
            if min(unpacked, packed, values) < 0:
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
    """Read Thrift's compact protocol: what Parquet's footer and page headers use of it.

    A struct is a dict of its values by number and type of their field; of bytes only the length is
    kept. Raises IndexError where the content ends, and _NotThrift for what a writer never writes,
    such as a field that is there twice: what Arrow would make of it is not ours to guess.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0

    def struct(self, depth: int = 0) -> _Struct:
        """Return the struct that begins here, and stand behind it."""
        values: _Struct = {}
        number = 0
        while head := self._byte():
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
            count = head >> 4 if head >> 4 < 15 else self._varint()  # noqa: PLR2004 - 15: it follows
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
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:  # noqa: PLR2004 - bits of the largest integer
                raise _NotThrift
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
