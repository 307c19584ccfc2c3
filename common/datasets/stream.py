"""Reads json files. Each list of a large one is read in runs of whole elements."""

import gc
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import orjson

from common.datasets.tools import name_tool
from common.errors import InputError

CHUNK = 1 << 20  # bytes
CUTS = 30  # places tried before more text is read: an element may hold thousands of objects
SPACE = b" \t\r\n"
KEY = re.compile(rb'("(?:[^"\\]|\\.)*")[ \t\r\n]*:', re.DOTALL)
COMMA = re.compile(rb"[ \t\r\n]*,")
# a quote alone opens a string that is cut off
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|["\[\]{},]', re.DOTALL)
T = TypeVar("T")


def read_json(path: Path) -> dict:
    """Reads a json file whole. Raises InputError if it does not hold a json object."""
    try:
        record = orjson.loads(path.read_bytes().removeprefix(BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise not_json(path, error) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(record, dict):
        what = f"holds a json {type(record).__name__}; a COCO-format json object is needed"
        raise InputError(f"{path} {name_tool(path) or what}")
    return record


def not_json(path: Path, reason: object) -> InputError:
    """Returns the error of a damaged json file, or of one that is not UTF-8."""
    if encoding := _other_encoding(path):
        return InputError(
            f"{path} is {encoding}; save it as UTF-8, in which json files are written"
        )
    return InputError(
        f"{path} is not valid json ({reason}); was it cut off, or does it hold NaN? mend it, copy "
        "or download it again"
    )


def _other_encoding(path: Path) -> str:
    """Tells how a file is encoded, or where it is not UTF-8; "" if it is or cannot be read."""
    decoder = getincrementaldecoder("utf-8")()
    position = 0
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) or start[1:2] == b"\0":
                return "UTF-16 or UTF-32 text"
            decoder.decode(start)
            while text := file.read(CHUNK):
                position = file.tell() - len(text)
                decoder.decode(text)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return f"no UTF-8 text (byte 0x{byte:02x} near position {position + error.start})"
    except OSError:
        pass
    return ""


def read_fields(path: Path, chunk: int = CHUNK) -> Iterator[tuple[str, object]]:
    """Yields (field, value) of each field of the json object in a file, in the file's order.

    A list is yielded in parts: (field, run) several times, each run a list of whole elements. An
    empty list is one empty run. About `chunk` bytes of the file are in memory at a time.
    Raises InputError if the file cannot be read, is not json, is no object or has a field twice.
    """
    fields = set()
    with _window(path, chunk) as text:
        if text.peek() != b"{":
            read_json(path)  # raises the error that fits
        text.use(1)
        ended = text.peek() == b"}" and text.next(b"}")
        while not ended:
            if text.peek() != b'"':
                raise orjson.JSONDecodeError("a field's name expected", "", 0)
            key = text.find(KEY.match)
            field = orjson.loads(key[1])
            if field in fields:
                raise orjson.JSONDecodeError(f"the field '{field}' comes twice", "", 0)
            fields.add(field)
            text.use(key.end())
            if text.peek() == b"[":
                text.use(1)
                for run in _runs(text):
                    yield field, run
            else:
                end = text.find(_value_end)
                value = orjson.loads(text.held[:end])
                text.use(end)
                yield field, value
            ended = text.next(b",}") == b"}"
        text.end()


def read_elements(path: Path, chunk: int = CHUNK) -> Iterator[object]:
    """Yields the elements of the json list in a file. About `chunk` bytes are in memory at a time.

    Raises InputError if the file cannot be read, is not json or is no list.
    """
    with _window(path, chunk) as text:
        if text.peek() == b"{":
            raise InputError(f"{path} holds a json object; a list is needed")
        text.next(b"[")
        for run in _runs(text):
            yield from run
        text.end()


@contextmanager
def _window(path: Path, chunk: int) -> Iterator["Window"]:
    """Opens a json file, as a context, to be read `chunk` bytes at a time.

    Turns Python's cycle collector off. It would run after every 700 new objects, and take twice as
    long as parsing them.
    Raises InputError if the file cannot be read, or if the block raises JSONDecodeError.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with path.open("rb") as file:
            if file.read(len(BOM_UTF8)) != BOM_UTF8:
                file.seek(0)
            text = Window(file.read, chunk)
            try:
                yield text
            except orjson.JSONDecodeError as error:
                raise not_json(path, f"{error.msg}, near byte {text.used + error.pos}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    finally:
        if collects:
            gc.enable()


class Window:
    """Holds the bytes of a file that are read but not yet removed by `use`: `held`.

    read: read(count) returns up to `count` further bytes of the file
    used: the number of bytes of the file before `held`
    """

    def __init__(self, read: Callable[[int], bytes], chunk: int):
        self.read, self.chunk = read, chunk
        self.held, self.used = b"", 0

    def more(self) -> bool:
        """Reads further bytes into `held`. Returns False at the end of the file."""
        # doubles what is held: a value of many chunks is not scanned once for each of them
        new = self.read(max(self.chunk, len(self.held)))
        self.held += new
        return bool(new)

    def use(self, count: int) -> None:
        """Removes the first `count` bytes of `held` and the white space after them."""
        rest = self.held[count:].lstrip(SPACE)
        self.used += len(self.held) - len(rest)
        self.held = rest

    def find(self, scan: Callable[[bytes], T | None]) -> T:
        """Reads on until `scan(held)` is not None, and returns it. JSONDecodeError at the end."""
        while (found := scan(self.held)) is None:
            if not self.more():
                raise orjson.JSONDecodeError("unexpected end of data", "", 0)
        return found

    def peek(self) -> bytes:
        """Returns the next character that is no white space, b"" at the end; keeps it in `held`."""
        while not self.held and self.more():
            self.use(0)
        return self.held[:1]

    def next(self, expected: bytes) -> bytes:
        """Removes and returns the next character. Raises JSONDecodeError if not in `expected`."""
        found = self.peek()
        if not found or found not in expected:
            names = " or ".join(f"'{chr(c)}'" for c in expected)
            raise orjson.JSONDecodeError(f"{names} expected", "", 0)
        self.use(1)
        return found

    def end(self) -> None:
        """Raises JSONDecodeError unless the file ends here."""
        if self.peek():
            raise orjson.JSONDecodeError("unexpected content after document", "", 0)


def _value_end(text: bytes) -> int | None:
    """Returns where the value at the start of `text` ends; None if more text is needed."""
    depth = 0
    for token in TOKEN.finditer(text):
        letter = token[0]
        if letter == b'"':
            return None
        if not depth and letter in b",}]":
            return token.start()
        depth += (letter in b"[{") - (letter in b"]}")
    return None


def _runs(text: Window) -> Iterator[list]:
    """Parses a json list piece by piece. Yields lists of consecutive whole elements.

    `text` begins after the opening bracket. Raises JSONDecodeError for text that is not json.
    """
    ended, first = False, True
    while not ended:
        run, used, ended = text.find(_whole_elements)
        if not first and not run:
            raise orjson.JSONDecodeError("trailing comma is not allowed", "", 0)
        text.use(used)
        first = False
        yield run


def _whole_elements(text: bytes) -> tuple[list, int, bool] | None:
    """Parses the whole elements at the start of `text`, which begins inside a list.

    Returns (elements, number of bytes they take, whether the list ends there), or None if more text
    is needed. Raises JSONDecodeError if the text is not json.
    The text is cut at its last "}," first. If that is inside an element, the text before it is not
    balanced and cannot be parsed, and the "}," before it is tried.
    """
    cut = len(text)
    for _ in range(CUTS):
        cut = text.rfind(b"}", 0, cut)
        if cut < 0:
            break
        comma = COMMA.match(text, cut + 1)
        found = _parse(text[: cut + 1] + b"]") if comma else None
        if found:
            run, used = found
            if used > cut + 1:
                return run, comma.end(), False
            return run, used, True  # the list ends before the cut
    found = _parse(text[: text.rfind(b"]") + 1])
    return found and (*found, True)


def _parse(text: bytes) -> tuple[list, int] | None:
    """Parses a list that ends in `text`. `text` begins after its opening bracket.

    Returns (elements, number of bytes up to the closing bracket), or None if more text is needed.
    Raises JSONDecodeError if `text` is not json.
    """
    try:
        return orjson.loads(b"[" + text), len(text)
    except orjson.JSONDecodeError as error:
        if error.pos >= len(error.doc) - 1:  # all before the end is valid
            return None
        head = error.doc[: error.pos].rstrip()
        try:
            return orjson.loads(head), len(head.encode()) - 1
        except orjson.JSONDecodeError:
            raise error from None
