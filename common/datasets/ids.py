"""Ids that one list of a json file writes as numbers, and another as text."""

import re
from collections.abc import Hashable, Iterable

import numpy as np

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")


def other_type(id: Hashable) -> int | str | None:
    """Returns the number 1 for the text "1" and the text for the number; None if there is none."""
    if isinstance(id, str):
        return int(id) if NUMBER.fullmatch(id) else None
    return str(id) if isinstance(id, int) and not isinstance(id, bool) else None


def find_ids(ids: Iterable[Hashable], listed: dict[Hashable, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of ids in `listed`, {id: row}, and which of them are listed as other type.

    An id that is listed as it is has its own row. Otherwise "1" and 1 are one id. Returns (N,)
    int64, -1 for an unknown id, and (N,) bool.
    """
    rows, retyped = [], []
    for id in ids:
        row = listed.get(id, -1)
        is_other = row < 0
        if is_other:
            row = listed.get(other_type(id), -1)
        rows.append(row)
        retyped.append(is_other and row >= 0)
    return np.array(rows, dtype=np.int64), np.array(retyped, dtype=bool)
