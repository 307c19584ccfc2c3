"""Datasets that yield samples, loaded by their names on the command line."""

from common.datasets.dataset import Dataset
from common.datasets.names import load_datasets
from common.datasets.runs import (
    evaluation_datasets,
    training_datasets,
    validation_datasets,
    warn_of_overlap,
)

__all__ = [
    "Dataset",
    "evaluation_datasets",
    "load_datasets",
    "training_datasets",
    "validation_datasets",
    "warn_of_overlap",
]
