"""Tells poses from outlines among YOLO's labels, where no kpt_shape does.

A pose is a box and its key points, in columns that an outline could have, too.
"""

import numpy as np

LEAST = 3  # lines; fewer can look like poses by chance
MOST = 0.95  # share of the lines, or of the points, that must fit
SLACK = 0.02  # of the image: annotators round, and key points may lie at the edge of their box
VISIBLE = (0, 1, 2)  # the third number of a key point


def triples(values: list[float]) -> int:
    """Returns how many key points x y visibility follow the box in a line; 0 if it is no such line.

    values: the numbers after the class. Lines that could be outlines are none.
    """
    points, rest = divmod(len(values) - 4, 3)
    visibilities = values[6::3]
    if rest or not any(visibilities) or not set(visibilities) <= set(VISIBLE):
        return 0
    is_no_outline = len(values) % 2 == 1 or 2 in visibilities
    return points if is_no_outline else 0


def pose_shape(lines: np.ndarray) -> tuple[int, int] | None:
    """Returns (key points, numbers of each) if lines look like poses, otherwise None.

    lines: (N, V) the numbers after the class. Of a pose, the first four are a box in the image and
    its points lie in it. In small outlines they may, too, but not in lines all over the image.
    """
    count, width = lines.shape
    if count < LEAST or width < 6 or is_turned_box(lines):
        return None
    centre, half = lines[:, :2], lines[:, 2:4] / 2
    outside = np.maximum(half - centre, centre + half - 1).max(axis=1)
    if (outside <= SLACK).mean() < MOST:
        return None
    for numbers in (3, 2):
        if (width - 4) % numbers:
            continue
        points = lines[:, 4:].reshape(count, -1, numbers)  # (N, points, numbers)
        if not np.isin(points[..., 2:], VISIBLE).all():
            continue
        offset = np.abs(points[..., :2] - centre[:, None]) - half[:, None]
        inside = (offset <= SLACK).all(axis=-1)
        labelled = points[..., :2].any(axis=-1)  # 0 0 stands for a point that is not in the image
        if labelled.any() and inside[labelled].mean() >= MOST:
            return points.shape[1], numbers
    return None


def is_turned_box(lines: np.ndarray) -> bool:
    """Tells whether lines (N, V) are the four corners of turned boxes."""
    if lines.shape[1] != 8:
        return False
    a, b, c, d = lines.reshape(-1, 4, 2).swapaxes(0, 1)
    gap = np.abs(a + c - b - d).max(axis=1)
    return bool((gap <= SLACK).mean() >= MOST)
