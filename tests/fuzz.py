"""What the fuzz test does to sound files: it replaces bytes, words, and values of a json.

A mutation is (operation, place, number): the place is a fraction of the file, the number chooses
what comes there. So hypothesis can make and shrink it, and the same one fits every file.
"""

import copy
import json
import re
from collections.abc import Callable

from hypothesis import strategies as st

# no value is in its place here
ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 7, 0.5, -0.0, 1e300, -1e300, 2**31, 2**63, 2**64, 10**400),
    *(float("nan"), float("inf"), "", " ", "0", "1", "-1", "x", "nan", "x" * 5000, "a\nb", "\0"),
    *("..", "/", "../../etc/passwd", "/dev/zero", "é猫😀", "\x1b[31m", "\u2028", "𐀀"),
    *([], {}, [[]], [None], [1, 2, 3, 4], {"a": 1}, [0] * 3000, [["x"]], {"size": [9, 9]}),
)
ODD_WORDS = (
    *("", "0", "1", "-1", "2", "0.5", "1.0", "1e999", "-1e300", "nan", "inf", "9" * 400, "0x10"),
    *("x", "é猫", "\0", "..", "/", "../..", "/dev/zero", "x" * 5000, "²", "\ufeff", "\u2028"),
    *(",", ";", "\t", "\n", "\r\n", '"', "'", "<", ">", "&", "</object>", "<!--", "]]>", "&a;"),
    *("[", "]", "{", "}", ":", "- ", "*a", "&a ", "!!python/name:os", "%", "=", "#"),
)
WORD = re.compile(r"[\w.+-]+|\s+|[^\w\s]")
MUTATION = st.tuples(
    st.sampled_from(("flip", "cut", "drop", "repeat", "insert", "word", "value", "remove", "swap")),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255),
)
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=4)


def mutated(content: bytes, mutations: list[tuple[str, float, int]]) -> bytes:
    """Returns a file with some mutations. An operation that does not fit the file does nothing."""
    for operation, place, number in mutations:
        content = OPERATIONS[operation](content, place, number)
    return content


def flip(content: bytes, place: float, number: int) -> bytes:
    """Replaces a byte."""
    at = int(place * len(content))
    return content[:at] + bytes([number]) + content[at + 1 :]


def cut(content: bytes, place: float, number: int) -> bytes:
    """Cuts the end off."""
    return content[: int(place * len(content))]


def drop(content: bytes, place: float, number: int) -> bytes:
    """Takes some bytes out."""
    at = int(place * len(content))
    return content[:at] + content[at + 1 + number % 16 :]


def repeat(content: bytes, place: float, number: int) -> bytes:
    """Writes some bytes twice."""
    at = int(place * len(content))
    return content[: at + 1 + number] + content[at:]


def insert(content: bytes, place: float, number: int) -> bytes:
    """Writes some equal bytes in between."""
    at = int(place * len(content))
    return content[:at] + bytes([number]) * (1 + number % 9) + content[at:]


def word(content: bytes, place: float, number: int) -> bytes:
    """Replaces a word of a text."""
    try:
        words = WORD.findall(content.decode())
    except UnicodeDecodeError:
        return content
    if not words:
        return content
    words[int(place * len(words))] = ODD_WORDS[number % len(ODD_WORDS)]
    return "".join(words).encode()


def in_json(change: Callable[[object, object, int], None]) -> Callable[[bytes, float, int], bytes]:
    """Returns an operation that changes one value in a json, `change(parent, key, number)`."""

    def operation(content: bytes, place: float, number: int) -> bytes:
        try:
            record = json.loads(content)
            spots = list(values_of(record)) if isinstance(record, dict | list) else []
        except (ValueError, RecursionError):
            return content
        if not spots:
            return content
        parent, key = spots[int(place * len(spots))]
        change(parent, key, number)
        return json.dumps(record).encode()

    return operation


def values_of(record):
    """Yields (parent, key) of all values below `record`."""
    pairs = record.items() if isinstance(record, dict) else enumerate(record)
    for key, value in list(pairs):
        yield record, key
        if isinstance(value, dict | list):
            yield from values_of(value)


def put(parent, key, number: int) -> None:
    parent[key] = copy.deepcopy(ODD_VALUES[number % len(ODD_VALUES)])


def remove(parent, key, number: int) -> None:
    del parent[key]


def swap(parent, key, number: int) -> None:
    """Exchanges the type: numbers for texts, a list for an object or its first element."""
    value = parent[key]
    if isinstance(value, list):
        parent[key] = dict(enumerate(value)) if number % 2 else (value or [0])[0]
    elif isinstance(value, str):
        parent[key] = [value] if number % 2 else len(value)
    else:
        parent[key] = str(value) if number % 2 else [value]


OPERATIONS = {
    "flip": flip,
    "cut": cut,
    "drop": drop,
    "repeat": repeat,
    "insert": insert,
    "word": word,
    "value": in_json(put),
    "remove": in_json(remove),
    "swap": in_json(swap),
}
