"""UniDet on shuffled merges: a control of those that it learns.

    python -m benchmarks.claims.unidet_shuffled --datasets coco,oid --tiny --stage unified \
        --label-space RUN/label_space.csv

The flags are those of unidet.py, for two datasets. The classes that the table merges are merged,
but each of them with the partner of another. --seed draws which.
"""

import unidet
from common.command import run_command
from common.labels import derangement
from common.merges import Group, read_groups

Args, METHOD, MODEL_FIELDS = unidet.Args, unidet.METHOD, unidet.MODEL_FIELDS
TINY = unidet.TINY


def shuffle(groups: list[Group], seed: int) -> list[Group]:
    """Returns groups of two classes, each with the second class of another one."""
    pairs = [list(group.items()) for group in groups]
    return [
        dict([pair[0], pairs[other][1]])
        for pair, other in zip(pairs, derangement(len(pairs), seed).tolist())
    ]


def main() -> None:
    """Runs unidet.py, which gets the groups of its table shuffled."""
    train = unidet.train

    def train_shuffled(args: Args, *given) -> tuple:
        unidet.read_groups = lambda *table: shuffle(read_groups(*table), args.seed)
        return train(args, *given)

    unidet.train = train_shuffled
    unidet.main()


if __name__ == "__main__":
    run_command(main)
