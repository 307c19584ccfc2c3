"""Json files, whole or, where they are large, as runs of the elements of their lists."""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson

from common.errors import InputError

CHUNK = 1 << 20  # bytes
CUTS = 30  # tried before more text is read: an element may hold thousands of objects
SPACE = b" \t\r\n"
KEY, COMMA = re.compile(rb'("(?:[^"\\]|\\.)*")[ \t\r\n]*:', re.DOTALL), re.compile(rb"[ \t\r\n]*,")
TOKEN = re.compile(
    rb'"(?:[^"\\]|\\.)*"|["\[\]{},]', re.DOTALL
)  # a quote alone opens a string that was cut off


def read_json(path: Path) -> dict:
    """The object in a json file. Raises InputError for no json and no object."""
    try:
        record = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise not_json(path, error) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(record, dict):
        raise InputError(
            f"{path} holds a json {type(record).__name__}; a COCO-format json object is needed"
        )
    return record


def not_json(path: Path, what: object) -> InputError:
    return InputError(f"{path} is not valid json ({what}); was it cut off, or does it hold NaN? mend it, copy or "
                      "download it again")  # fmt: skip


def read_fields(path: Path, chunk: int = CHUNK) -> Iterator[tuple[str, object]]:
    """(field, value) of each field of the json object in a file, in its order; about `chunk` bytes are in memory.

    A list comes in runs of whole elements under the same field, at least one; an empty list is an empty run.
    Raises InputError for a file that cannot be read, is no json or no object, or has a field twice.
    """
    with window(path, chunk) as text:
        yield from _fields(text, path)


def read_elements(path: Path, chunk: int = CHUNK) -> Iterator[object]:
    """The elements of the json list in a file, with about `chunk` bytes of it in memory.

    Raises InputError for a file that cannot be read, is no json or no list.
    """
    with window(path, chunk) as text:
        if text.peek() == b"{":
            raise InputError(f"{path} holds a json object; a list is needed")
        text.next(b"[")
        for run in _runs(text):
            yield from run
        text.end()


@contextmanager
def window(path: Path, chunk: int) -> Iterator["Window"]:
    """The text of a json file. Raises InputError for what is wrong with it."""
    try:
        with no_collector(), path.open("rb") as file:
            text = Window(file.read, chunk)
            try:
                yield text
            except orjson.JSONDecodeError as error:
                raise not_json(path, f"{error.msg}, near byte {text.used + error.pos}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


@contextmanager
def no_collector() -> Iterator[None]:
    """Python's collector looks for cycles after every 700 new objects, which takes twice as long as to parse them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Window:
    """The bytes of a file that were read and not yet used."""

    def __init__(self, read: Callable[[int], bytes], chunk: int):
        self.read, self.chunk, self.held, self.used = read, chunk, b"", 0

    def more(self) -> bool:
        """Read on, at least as much as is held: so a value of many chunks is not scanned for each. False at the end."""
        new = self.read(max(self.chunk, len(self.held)))
        self.held += new
        return bool(new)

    def use(self, count: int) -> None:
        """Let go of the first `count` bytes and the space after them."""
        rest = self.held[count:].lstrip(SPACE)
        self.used += len(self.held) - len(rest)
        self.held = rest

    def find(self, scan: Callable[[bytes], object]):
        """`scan(held)` as soon as it finds something. Raises JSONDecodeError at the end of the file."""
        while (found := scan(self.held)) is None:
            if not self.more():
                raise orjson.JSONDecodeError("unexpected end of data", "", 0)
        return found

    def peek(self) -> bytes:
        """The next character that is no space, empty at the end of the file."""
        while not self.held and self.more():
            self.use(0)
        return self.held[:1]

    def next(self, expected: bytes) -> bytes:
        """Use up that character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            names = " or ".join(f"'{chr(c)}'" for c in expected)
            raise orjson.JSONDecodeError(f"{names} expected", "", 0)
        self.use(1)
        return found

    def end(self) -> None:
        if self.peek():
            raise orjson.JSONDecodeError("unexpected content after document", "", 0)


def _fields(text: Window, path: Path) -> Iterator[tuple[str, object]]:
    if text.peek() != b"{":
        read_json(path)  # raises: it is no object
    text.use(1)
    fields = set()
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


def _value_end(text: bytes) -> int | None:
    """Where the value that `text` begins with ends: at a comma or brace that is not its own."""
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
    """The elements of a list, whose bracket is used up."""
    ended, first = False, True
    while not ended:
        run, used, ended = text.find(_whole_elements)
        if not first and not run:
            raise orjson.JSONDecodeError("trailing comma is not allowed", "", 0)
        text.use(used)
        first = False
        yield run


def _whole_elements(text: bytes) -> tuple[list, int, bool] | None:
    """The elements of a list that `text` goes on with, how many bytes they take, and whether the list ends there.

    A cut between a brace and a comma may be inside of an object or a string of an element, but then what is before it
    is not balanced and cannot be parsed. None where more text is needed. Raises JSONDecodeError for what is no json.
    """
    cut = len(text)
    for _ in range(CUTS):
        if (cut := text.rfind(b"}", 0, cut)) < 0:
            break
        if (comma := COMMA.match(text, cut + 1)) and (found := _parse(text[: cut + 1] + b"]")):
            run, used = found
            return (
                (run, comma.end(), False) if used > cut + 1 else (run, used, True)
            )  # or the list ended before it
    found = _parse(text[: text.rfind(b"]") + 1])
    return found and (*found, True)


def _parse(text: bytes) -> tuple[list, int] | None:
    """The elements of a list that ends in `text` and the bytes up to its end; None if `text` is only a part of it."""
    try:
        return orjson.loads(b"[" + text), len(text)
    except orjson.JSONDecodeError as error:
        if error.pos >= len(error.doc) - 1:  # whatever is before the end is right
            return None
        head = error.doc[: error.pos].rstrip()
        try:
            return orjson.loads(head), len(head.encode()) - 1
        except orjson.JSONDecodeError:
            raise error from None
