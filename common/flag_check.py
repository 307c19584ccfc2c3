"""Checks the flags of a method before its file is run: the imports of that file take seconds."""

import ast
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from common.command import parse_args
from common.console import open_console
from common.datasets.grammar import check_entries
from common.errors import InputError, tell
from common.inputs import check_names
from common.saved import is_on_hub, weights_files

BOXES = ("boxes", "instances")  # what a method without SUPERVISION can learn from


def check_flags(file: str) -> None:
    """Answers --help, and ends the process with one line for a flag that is wrong in itself.

    It calls what the `main` of the method calls again. So a mistake that it cannot see, such as one
    in official weights, is told later, and so are the lines of the log.

    file: the method file
    """
    open_console()
    logging.disable()
    try:
        check(file)
    except InputError as error:
        tell(str(error))
        sys.exit(2)
    except OSError:  # the command tells it
        pass
    finally:
        logging.disable(logging.NOTSET)


def check(file: str) -> None:
    """Raises InputError for a wrong flag of a method file, dataset name, path or saved setting."""
    found = read_names(file, "Args", "TINY", "MODEL_FIELDS", "SUPERVISION")
    method = Path(file).stem
    args = parse_args(found["Args"], method, found["TINY"], found["MODEL_FIELDS"], early=True)
    if (args.predict or args.eval_only) and not is_on_hub(args.weights):
        weights_files(args.weights)
    if args.predict:
        check_names(args.predict)
    else:
        check_entries(args, found.get("SUPERVISION", BOXES))


def read_names(file: str | Path, *names: str) -> dict:
    """Returns {name: value} of the top-level `names` that a Python file has.

    Only the statements that these need are run, in their order.
    """
    statements = ast.parse(Path(file).read_text(encoding="utf-8")).body
    needed = set(names)
    chosen = []
    for statement in reversed(statements):  # a name stands above what uses it
        if needed.intersection(bound(statement)):
            chosen.insert(0, statement)
            needed.update(node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
    values = {"__name__": "__main__", "__file__": str(file)}
    exec(compile(ast.Module(chosen, []), str(file), "exec"), values)
    return {name: values[name] for name in names if name in values}


def bound(statement: ast.stmt) -> Iterator[str]:
    """Yields the names that a top-level statement binds or changes."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.ClassDef | ast.FunctionDef):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
    elif isinstance(statement, ast.AugAssign | ast.AnnAssign):
        yield statement.target.id
