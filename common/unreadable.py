"""Images that cannot be read: tried again, and skipped as far as --skip-bad allows."""

import errno
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from common.batch import Sample
from common.datasets.dataset import Dataset
from common.errors import InputError

log = logging.getLogger("concord")

# errors of a file system that no second try mends
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG)
PAUSES = (0.5, 2)  # seconds before the second and the third try


@dataclass(frozen=True)
class Skips:
    """The unreadable images that a training does without: at most `limit` different ones.

    They are listed in skipped-images.txt of the run folder, for all processes and for later starts.
    Machines that do not share the run folder have a list each.
    """

    limit: int
    folder: Path

    def admits(self, name: str, error: InputError) -> bool:
        """Returns whether image `name` may be skipped. Lists it and logs `error` if it is new."""
        if not self.limit:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)  # another machine may lack it
        path = self.folder / "skipped-images.txt"
        # other processes read and write it, too
        with FileLock(path.with_suffix(".lock")), path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            listed = file.read().splitlines()
            if name in listed:
                return True
            if len(listed) >= self.limit:
                return False
            file.write(name + "\n")
        count = len(listed) + 1
        # logged as an error, since ranks other than 0 log nothing else
        message = "%s: another image takes its place (%d of --skip-bad %d)"
        log.error(message, error, count, self.limit)
        return True


NONE = Skips(0, Path())


def load_patiently(dataset: Dataset, row: int, keep_ignored: bool = False) -> Sample:
    """Returns image `row` as `Dataset.load` does. A file system that fails gets three tries.

    Its errors are those of the system (EIO, ESTALE, ...) that `LASTING` does not name, also as the
    context of an InputError.
    """
    for seconds in PAUSES:
        try:
            return dataset.load(row, keep_ignored)
        except (InputError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            code = cause.errno if isinstance(cause, OSError) else None
            if code in (None, *LASTING):
                raise
            message = "%s: tried again in %g s"
            log.error(message, error, seconds)
            time.sleep(seconds)
    return dataset.load(row, keep_ignored)


@dataclass
class Readable(Dataset):
    """A dataset in which a black image stands for each unreadable one that `skips` admits."""

    skips: Skips = NONE

    def load(self, i: int, keep_ignored: bool = False) -> Sample:
        """Returns image `i` as `Dataset.load` does, or a black image."""
        try:
            return load_patiently(super(), i, keep_ignored)
        except InputError as error:
            name = f"{self.name}: {self.index.file_name(i)}"
            if not self.skips.admits(name, error):
                raise
        black = torch.zeros(3, 32, 32, dtype=torch.uint8)
        return Sample.unlabelled(black, self.name, self.index.image_ids[i], i)
