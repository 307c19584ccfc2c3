"""Datasets that yield samples, loaded by their names on the command line."""

import importlib

MODULES = {
    "Dataset": "dataset",
    "evaluation_datasets": "runs",
    "load_datasets": "names",
    "training_datasets": "runs",
    "validation_datasets": "runs",
    "warn_of_overlap": "runs",
}


def __getattr__(name: str) -> object:
    """Imports one of these names when it is asked for: the table of datasets needs no torch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__} has no {name}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
