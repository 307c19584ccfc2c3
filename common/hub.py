"""Access to the Hugging Face hub, with and without a network.

    python -m common.hub push runs/x owner/name [--private]

pushes the weights of a run with a model card, and `--weights hf://owner/name` takes them from there
(`download`).
"""

import argparse
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import InputError, first_line
from common.saved import WEIGHTS, hub_address, read_metadata

log = logging.getLogger("concord")

HUB = "https://huggingface.co"
# what a run folder has beside its weights and may be of use to others
EXTRAS = ("results.json", "per_class.json", "per_class.txt", "metrics.jsonl", "curves.png")
LOGIN = "`hf auth login`, or the environment variable HF_TOKEN, gives one"


def hub_answers() -> bool:
    """Returns whether the hub answers in 5 s. Tries once; the hub's client retries for a minute."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", HUB), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an error page is an answer
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def hub() -> Iterator[None]:
    """Context manager for loading from the hub. Without a network, only the local cache is used.

    Log lines below the level "critical" are silenced inside the context.
    """
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or not hub_answers()
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        logging.disable(logging.NOTSET)


def client() -> Any:
    """Returns the package huggingface_hub. Raises InputError without it."""
    try:
        import huggingface_hub.errors
    except ImportError:
        raise InputError("the hub needs its client: pip install -U huggingface_hub") from None
    return huggingface_hub


def download(address: str) -> Path:
    """Returns the weights of hf://owner/name[@revision], a file in the cache of the hub's client.

    Without a network, the cached file is taken. Raises InputError if there is none, and for a
    repository, revision or file that the hub does not have.
    """
    repo, revision = hub_address(address)
    package = client()
    errors = package.errors
    try:
        with hub():
            return Path(package.hf_hub_download(repo, WEIGHTS, revision=revision))
    except errors.GatedRepoError:
        reason = "its owner gives access on request: accept the terms on its page, then log in"
    except errors.RepositoryNotFoundError:
        reason = f"the hub has no such repository, or it is private, and needs a token: {LOGIN}"
    except errors.RevisionNotFoundError:
        reason = f"the repository has no revision '{revision}'"
    except errors.LocalEntryNotFoundError:
        reason = "the hub does not answer, and the weights were never downloaded; connect first"
    except errors.EntryNotFoundError:
        reason = (
            f"it has no {WEIGHTS}; `python -m common.hub push RUN_FOLDER OWNER/NAME` puts one there"
        )
    except Exception as error:  # of httpx or requests, as the version of the client has it
        reason = f"the download failed ({first_line(error)}); try again"
    raise InputError(f"--weights {address}: {reason}")


def push(path: str, repo: str, private: bool = False) -> None:
    """Pushes weights with a model card, as one commit. Makes the repository if it does not exist.

    path:    a run folder, whose results go along, or a weights file
    repo:    owner/name
    private: of a repository that is made; an old one stays as it is

    Raises InputError for weights that cannot be read, without a network or token, and if the hub
    refuses.
    """
    from common.model_card import model_card

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"push to '{repo:.80}': write OWNER/NAME, without a revision")
    metadata = read_metadata(os.path.expanduser(path))
    folder = Path(metadata["file"]).parent if os.path.isdir(os.path.expanduser(path)) else None
    extras = [folder / name for name in EXTRAS if (folder / name).is_file()] if folder else []
    card = model_card(repo, metadata, _results(extras))
    package = client()
    if package.get_token() is None:
        raise InputError(f"pushing to {repo} needs a token with the right to write: {LOGIN}")
    if not hub_answers():
        raise InputError("the hub does not answer; connect to the network, or see to HF_ENDPOINT")

    files = {"README.md": card.encode(), WEIGHTS: metadata["file"]}
    files |= {extra.name: str(extra) for extra in extras}
    log.info("pushes %s to %s", ", ".join(files), repo)
    log.info("the weights hold all settings of the training, with the paths of this machine")
    add = package.CommitOperationAdd
    try:
        api = package.HfApi(library_name="concord")
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.create_commit(
            repo,
            [add(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
            commit_message=f"Weights of {metadata['method']}.py",
        )
    except Exception as error:  # of httpx or requests, as the version of the client has it
        raise InputError(f"{repo}: {_refusal(error)}") from None
    log.info("%s", made.commit_url)
    log.info("anyone who may read it gives --weights hf://%s", repo)


def _results(extras: list[Path]) -> dict | None:
    """Returns the content of results.json; None if it is not among the files."""
    for file in extras:
        if file.name == "results.json":
            try:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{file} cannot be read ({error}); mend or remove it") from None
    return None


def _refusal(error: Exception) -> str:
    """Returns why the hub did not take a commit, with the remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the hub does not know the token: {LOGIN}"
    if status == 403:
        return "the token may not write there; give one with the right to write to this owner"
    return f"the hub did not take it ({first_line(error)}); try again"


def main() -> None:
    """Pushes as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m common.hub", description=push.__doc__)
    commands = parser.add_subparsers(required=True, metavar="push")
    pushing = commands.add_parser("push", help="push weights with a model card")
    pushing.add_argument("path", help="run folder or .safetensors file")
    pushing.add_argument("repo", help="OWNER/NAME on the hub")
    pushing.add_argument("--private", action="store_true", help="if the repository is made")
    given = parser.parse_args()
    push(given.path, given.repo, given.private)


if __name__ == "__main__":
    from common.command import run_command

    run_command(main)
