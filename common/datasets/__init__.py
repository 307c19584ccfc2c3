"""Datasets that yield samples, loaded by their names on the command line."""

from common.datasets.dataset import Dataset
from common.datasets.names import eval_entries, load_datasets, warn_of_overlap

__all__ = ["Dataset", "eval_entries", "load_datasets", "warn_of_overlap"]
