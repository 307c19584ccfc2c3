"""Names on the command line -> datasets that yield samples."""

from common.datasets.base import Dataset
from common.datasets.registry import load_datasets

__all__ = ["Dataset", "load_datasets"]
