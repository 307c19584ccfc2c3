"""Access to the Hugging Face hub, with and without a network."""

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

HUB = "https://huggingface.co"


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
