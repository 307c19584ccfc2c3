"""Flags without an effect: those that exclude each other are refused, the others are logged."""

import logging
from collections.abc import Iterable
from typing import Any

from common.datasets.grammar import entries
from common.errors import InputError
from common.process import environment_number

log = logging.getLogger("concord")
CLASS_FIELDS = ["classes", "rename"]  # settings of the training that --eval-only repeats
DATA_FIELDS = ["datasets", "eval_datasets", "data_root", "tiny"]  # and these, if it names no data
TEXT_FIELDS = ["text_encoder", "prompts", "null"]  # what the text of a class name depends on
EXCLUDED = {  # {flag: (what it does, flags that have no effect beside it)}
    "resume": ("goes on with that training", ("output", "weights", "predict", "eval_only")),
    "predict": (
        "draws the classes of --vocabulary, or all, in the images that it names",
        ("eval_only", "datasets", "eval_datasets", "classes", "rename", "track", "novel"),
    ),
    "eval_only": ("neither trains nor draws images of yours", ("vocabulary", "track", "novel")),
}
OF_TRAINING = ["steps", "lr", "batch_size", "ema", "eval_every", "skip_bad", "accumulate"]


def flag(name: str) -> str:
    """Returns the flag of a field: "--eval-only" of "eval_only"."""
    return "--" + name.replace("_", "-")


def tell(message: str, *values: object) -> None:
    """Logs a line, unless this is not the first rank."""
    if environment_number("RANK", 0) == 0:
        log.info(message, *values)


def refuse_conflicts(args: Any) -> None:
    """Raises InputError for a flag that has no effect beside another one, or without another one.

    args: what the flags give, without saved settings
    """
    if args.replay and not args.resume:
        raise InputError(f"--replay {args.replay} needs --resume: the run folder of that training")
    for name, (does, others) in EXCLUDED.items():
        value = getattr(args, name)
        shown = f"{flag(name)} {value}" if isinstance(value, str) else flag(name)
        for other in others if value else ():
            if getattr(args, other, None):
                raise InputError(
                    f"{flag(other)} has no effect beside {shown}, which {does}; leave one of them"
                    " out"
                )
    if args.vocabulary and not args.predict:
        raise InputError(
            "--vocabulary names the classes of --predict; to train on some classes of the datasets"
            " give --classes"
        )
    if args.eval_only and not args.eval_datasets:
        for entry in entries(args.datasets):
            place, _, _ = entry.partition("=")
            if "@" in place or ":" in place.removesuffix(":val"):
                raise InputError(
                    f"--datasets {entry}: --eval-only evaluates the whole split for validation;"
                    f" write --eval-datasets {entry}"
                )


def tell_of_weights(args: Any, typed: Any, saved: dict, names: Iterable[str]) -> None:
    """Logs the settings that the weights give, and the flags of text that change nothing.

    typed: the flags alone
    saved: the settings of the training
    names: the settings that the weights restore
    """
    of_classes = {name: getattr(args, name) for name in CLASS_FIELDS if not getattr(typed, name)}
    told = [(f"{flag(name)} {v}", f'{flag(name)} ""') for name, v in of_classes.items() if v]
    if told:
        flags, remedies = (" and ".join(parts) for parts in zip(*told))
        tell("evaluates with %s, as it was trained; for all classes give %s", flags, remedies)

    others = [name for name in names if name in saved and name not in CLASS_FIELDS]
    taken = [name for name in others if getattr(args, name) != getattr(typed, name)]
    if taken:
        shown = ", ".join(f"{flag(name)} {getattr(args, name)!r}" for name in taken)
        tell("taken from the weights, where no flag replaces it: %s", shown)

    if (args.predict or args.eval_only) and has_text(args):
        of_text = [name for name in TEXT_FIELDS if name in others]
        changed = [name for name in of_text if getattr(args, name) != saved[name]]
        if args.eval_only and args.text_encoder.endswith(".npy"):  # `with_table` tells of it
            changed = []
        if changed:
            message = "%s: classes keep the text of the training, unless a name of them is new"
            tell(message, " and ".join(map(flag, changed)))


def has_text(args: Any) -> bool:
    """Returns whether the model compares with text embeddings of class names."""
    return hasattr(args, "text_encoder") and getattr(args, "classifier", "text") == "text"


def tell_of_effects(args: Any, tiny: dict, model_fields: Iterable[str], idle: dict) -> None:
    """Logs which flags have no effect in this start, or take the place of others.

    tiny: {field: default under --tiny}; model_fields: the settings that shape the model
    idle: {(field, its value): fields that have no effect then}; True: any value but ""
    """
    for (name, value), fields in idle.items():
        given = getattr(args, name)
        if isinstance(value, bool) and bool(given) == value:
            tell_idle(args, tiny, fields, flag(name) if value else flag(f"no_{name}"))
        elif given == value:
            tell_idle(args, tiny, fields, f"{flag(name)} {value}")
    if args.predict or args.eval_only:
        fields = [*OF_TRAINING]
        if not args.tiny and "image_size" not in model_fields:
            fields.append("image_size")  # otherwise it is that of generated or of test images
        # --eval-only has the task of the annotations, --predict reads no dataset
        fields.append("task" if args.eval_only else "data_root")
        tell_idle(args, tiny, fields, "--eval-only" if args.eval_only else "--predict")
    elif args.dataset_ratios and hasattr(args, "sampling"):
        tell("--dataset-ratios takes the place of --sampling %s", args.sampling)


def tell_idle(args: Any, tiny: dict, names: Iterable[str], mode: str) -> None:
    """Logs in a line which of the settings `names` are not the defaults, but have no effect.

    names: fields, of which `args` may lack some
    mode:  the flag because of which they have none
    """
    defaults = vars(type(args)(**tiny if args.tiny else {}))
    names = [name for name in names if name in defaults]
    idle = [name for name in names if getattr(args, name) != defaults[name]]
    if idle:
        tell("no effect with %s: %s", mode, ", ".join(map(flag, idle)))
