"""The command line of a method: flags, their ranges, and how a run ends.

What needs torch is imported where it is used: `common.flag_check` tells wrong flags before.
"""

import dataclasses
import difflib
import logging
import math
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
from tqdm import tqdm

from common.console import open_console
from common.effects import (
    CLASS_FIELDS,
    DATA_FIELDS,
    flag,
    refuse_conflicts,
    tell_of_effects,
    tell_of_weights,
)
from common.errors import InputError, one_line, tell
from common.process import (
    Stop,
    environment_number,
    heed_no_more,
    heed_signals,
    is_in_group,
    leave_group,
    unlock,
)
from common.saved import OF_A_START, hub_address, is_on_hub, own_weights, read_args, read_metadata

log = logging.getLogger("concord")


@dataclasses.dataclass(frozen=True)
class Range:
    """Limits the numbers of a flag, as part of its type: Annotated[float, Range(above=0)].

    low, high: the smallest and the largest number allowed
    above:     every number allowed is greater than this

    A flag may hold two numbers, (low, high). `check_numbers` requires that both are within the
    limits, and low <= high.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high and number > self.above

    def __str__(self) -> str:
        if self.above > -math.inf:
            bound = f" and at most {self.high}" if self.high < math.inf else ""
            return f"greater than {self.above}{bound}"
        if self.high == math.inf:
            return f"at least {self.low}"
        return f"between {self.low} and {self.high}"


PATH_FIELDS = ["data_root", "weights", "resume", "output"]
COUNT = Range(0, 2**31 - 1)  # steps, seeds, numbers of processes
SIDE = Range(16, 16384)  # pixels
T = TypeVar("T")


def parse_args(
    args_class: type[T],
    method: str,
    tiny: dict,
    model_fields: list[str],
    convert: Callable | None = None,
    argv: list[str] | None = None,
    early: bool = False,
    idle: dict | None = None,
) -> T:
    """Parses the command line and returns it as an `args_class`.

    A value is that of the first source that has it: the flags, the saved settings, --tiny, the
    defaults. --resume loads all settings that its run saved. --weights loads only the saved
    settings `model_fields`, which shape the model. With --eval-only, it also loads --classes and
    --rename of the training, and its datasets, unless others are named. With the datasets come
    --tiny and the size of the generated images. --eval-datasets may name a dataset that the
    training defined. Unless a training starts from them, converted weights also bring the settings
    of their own class head.

    method:  the run or the weights must be of this method
    tiny:    {field: default under --tiny}
    convert: converts official weights (`common.convert`), which --weights may name; or None.
             `weights` of the result is then the converted file.
    argv:    the flags; by default sys.argv[1:]
    early:   leaves out what official weights bring, since their conversion needs torch, and
             weights on the hub, since their download needs a network
    idle:    {(field, its value): fields that have no effect then}, for the log

    Raises InputError for an unknown flag, with the nearest one, for a number out of its range, and
    for saved settings that cannot be read or do not fit. tyro itself reports a value of another
    type and ends the process with exit code 2.
    """
    argv = sys.argv[1:] if argv is None else argv

    def parse(default: T) -> tuple[T, list[str]]:
        return tyro.cli(args_class, args=argv, default=default, return_unknown_args=True)

    small = args_class(tiny=True, **tiny)
    default = small if "--tiny" in argv else args_class()
    args, unknown = parse(default)
    if unknown:
        flags = [flag(field.name) for field in dataclasses.fields(args_class)]
        near = difflib.get_close_matches(unknown[0], flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
        raise InputError(f"unknown argument '{unknown[0]:.60}'; {hint}")
    expand_paths(args)
    refuse_conflicts(args)
    if args.resume:
        repeated = vars(default).keys() - OF_A_START
        saved = read_args(Path(args.resume), method)
        source = Path(args.resume) / "args.json"
        args, _ = parse(with_saved(default, saved, repeated, source))
    elif args.weights and not (early and needs_more(args.weights)):
        weights = find_weights(args.weights, method, convert)
        metadata = read_metadata(weights, method)
        saved = metadata["args"]
        if args.eval_only or args.predict:
            saved |= metadata.get("own_head", {})
        repeated = list(model_fields)
        if (args.eval_only or args.predict) and saved.get("amp") == "off":
            repeated.append("amp")  # the results of a training in float32 do not change
        if args.eval_only:
            repeated += CLASS_FIELDS
        if args.eval_only and args.eval_datasets:
            repeated.append("datasets")  # for the names that it defines
        elif args.eval_only and not args.datasets:
            repeated += DATA_FIELDS
            if saved.get("tiny"):  # the generated images, of the size that the training had
                default = small
                repeated.append("image_size")
        typed = args
        args, _ = parse(with_saved(default, saved, repeated, weights))
        tell_of_weights(args, typed, saved, repeated)
        args.weights = weights
    check_numbers(args)
    expand_paths(args)
    tell_of_effects(args, tiny, model_fields, idle or {})
    args.workers = min(args.workers, os.cpu_count() or 1)
    return args


def needs_more(path: str) -> bool:
    """Returns whether weights cannot be read before torch is imported, or without a network.

    Raises InputError for a file that is missing, and for a wrong address.
    """
    if is_on_hub(path):
        return bool(hub_address(path))
    return own_weights(path) is None


def find_weights(path: str, method: str, convert: Callable | None) -> str:
    """Returns the safetensors file of --weights, which may be official weights to convert."""
    if own := own_weights(path):
        return str(own)
    from common.convert import convert_if_official

    return str(convert_if_official(path, method, convert))


def expand_paths(args: Any) -> None:
    """Replaces a leading ~ in the paths of `args` by the home folder, in place."""
    for name in PATH_FIELDS:
        setattr(args, name, os.path.expanduser(getattr(args, name)))


def with_saved(default: T, saved: dict, names: Iterable[str], source: str | Path) -> T:
    """Returns a copy of `default` with the saved values of the fields `names`, where there are any.

    JSON lists become tuples. source: the file of the values, for messages
    Raises InputError for a saved value that the command line would refuse, too: one of another
    type, one that is not among the choices, or a number out of its range.
    """
    hints = get_type_hints(type(default), include_extras=True)
    values = {}
    for name in names:
        if name not in saved:
            continue
        value = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
        fits = is_of(value, hints[name])
        fault = number_fault(value, hints[name]) if fits else "does not fit"
        if fault:
            raise InputError(
                f"{source}: the saved setting {name} is {value!r:.60}, which {fault}; mend it"
            )
        values[name] = value
    return dataclasses.replace(default, **values)


def is_of(value: object, kind: Any) -> bool:
    """Returns whether a JSON value, with tuples in place of lists, is of a flag's type.

    A whole number is a float, too. A bool is no number.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return is_of(value, parts[0])
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(is_of(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = parts[:1] * len(value) if Ellipsis in parts else parts
        return len(kinds) == len(value) and all(map(is_of, value, kinds))
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind


def saved_args(args_class: type[T], metadata: dict) -> T:
    """Returns an `args_class` with the settings saved in `metadata`, as `read_metadata` returns it.

    A field that was not saved has its default. After a training in float32, --amp is off. After one
    in bfloat16 it has its default, since this machine may be another one.
    Raises InputError for a value that does not fit.
    """
    default = args_class()
    saved = metadata["args"] | metadata.get("own_head", {})
    args = with_saved(default, saved, vars(default).keys(), metadata["file"])
    return args if args.amp == "off" else dataclasses.replace(args, amp=default.amp)


def check_numbers(args: Any) -> None:
    """Raises InputError as `check_ranges`, and for a --batch-size that the ranks cannot share."""
    check_ranges(args)
    ranks = max(1, environment_number("WORLD_SIZE", 1))
    if args.batch_size != "auto" and args.batch_size % ranks:
        raise InputError(
            f"--batch-size {args.batch_size} is not a multiple of the {ranks} ranks; make it one"
        )


def check_ranges(args: Any) -> None:
    """Raises InputError unless all numbers are finite and in the `Range` of their flag's type.

    It also raises for a pair (low, high) with low > high.
    """
    hints = get_type_hints(type(args), include_extras=True)
    for name, value in vars(args).items():
        if fault := number_fault(value, hints[name]):
            numbers = value if isinstance(value, tuple) else (value,)
            raise InputError(f"{flag(name)} {' '.join(map(str, numbers))} {fault}")


def number_fault(value: object, kind: Any) -> str:
    """Returns what is wrong with the numbers of a flag, like "must be at least 1"; "" for nothing.

    kind: the flag's type, with its `Range` if it has one. None is right: the default depends on
    the datasets.
    """
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        return "must be a finite number"
    if value is None or isinstance(value, str) or get_origin(kind) is not Annotated:
        return ""
    (allowed,) = kind.__metadata__
    if not all(number in allowed for number in numbers):
        return f"must be {allowed}"
    if list(numbers) != sorted(numbers):
        return "must be a range, the smaller number first"
    return ""


def given(value: T | None, default: T) -> T:
    """Returns the value of a flag, or `default` if it was not given (None)."""
    return default if value is None else value


def per_dataset(
    args: Any, name: str, datasets: list, default: int, **special: int
) -> dict[str, int]:
    """Parses the flag `name` of `args`, such as "coco=1,in21k=4", into {dataset: value}.

    datasets: the `Dataset`s that get a value
    default:  the value of a dataset that the flag does not name
    special:  other defaults for some kinds of supervision, such as image_labels=4

    Raises InputError for a dataset that is not in `datasets`, and for a value outside 1..16384.
    """
    values = {d.name: special.get(d.supervision, default) for d in datasets}
    for entry in filter(None, getattr(args, name).split(",")):
        dataset, _, value = (part.strip() for part in entry.partition("="))
        wrong = f"{flag(name)} {entry}"
        if dataset not in values:
            raise InputError(
                f"{wrong}: no dataset '{dataset}' is trained on; there are {', '.join(values)}"
            )
        if not (value.isdecimal() and 0 < int(value) <= 16384):
            raise InputError(f"{wrong}: write NAME=NUMBER (1 to 16384), separated by commas")
        values[dataset] = int(value)
    if name != "dataset_ratios" and set(values.values()) != {default}:
        pairs = ", ".join(f"{dataset} {value}" for dataset, value in values.items())
        what = "image size" if name == "dataset_sizes" else "batch"
        log.info("%s of each dataset: %s", what, pairs)
    return values


def close_bars() -> None:
    """Closes all progress bars, so that a message gets a line of its own."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()


def fail(error: BaseException) -> NoReturn:
    """Saves the last whole step, prints one line for the error and ends the process.

    An unknown error is raised again, for its traceback. The exit codes are those of `explain`.
    """
    heed_no_more()
    close_bars()
    from common.distributed import rank
    from common.rescue import explain, rescue

    line, code = explain(error)
    kept = rescue()
    if code > 128:  # a signal, which all ranks get
        if rank() == 0:
            print(one_line("; ".join(filter(None, (line, kept)))), file=sys.stderr)
    else:
        if kept:
            log.info("%s", kept)
        if line:
            tell(line)
    if not line and is_in_group():
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_in_group():
        os._exit(code)  # other ranks may wait in a collective: do not join them
    if not line:
        raise error
    sys.exit(code)


def allow_open_files() -> None:
    """Raises the limit of open files as far as the system lets it.

    Every tensor from a data loading process needs an open file.
    """
    try:
        import resource
    except ImportError:  # Windows, which passes tensors in another way
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS names no limit as the hard one, and then refuses more than OPEN_MAX
    most = max(soft, min(hard, 10_240)) if sys.platform == "darwin" else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def run_command(main: Callable[[], None]) -> None:
    """Calls `main()` as a command. What it has trained when it ends early is saved.

    Bad input, a signal and lack of memory end it with one line. The exit code is 2 for bad input,
    128 + the number of a signal, else 1, also if some of several inputs failed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[open_console()])
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    allow_open_files()
    if sys.platform == "linux":
        # Python 3.14's default would give every worker a copy of the mapped annotations
        multiprocessing.set_start_method("fork", force=True)
    with heed_signals():
        try:
            main()
        except (Exception, KeyboardInterrupt, Stop) as error:
            fail(error)
        finally:
            unlock()
    leave_group()
