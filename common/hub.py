"""The Hugging Face hub."""

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached: one short try, since its client repeats for most of a minute."""
    try:
        urllib.request.urlopen(
            os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5
        ).close()
    except (OSError, ValueError) as error:
        return isinstance(error, urllib.error.HTTPError)  # an error page is an answer
    return True


@contextmanager
def hub() -> Iterator[None]:
    """Without a network only the hub's local cache is asked; the loaders' log lines are held back in either case."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = (
        constants.HF_HUB_OFFLINE,
        constants.HF_HUB_OFFLINE or not hub_answers(),
    )
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.disable(logging.NOTSET)
