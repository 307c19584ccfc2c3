"""Names on the command line -> datasets that yield samples."""

from common.datasets.dataset import Dataset
from common.datasets.names import default_eval, load_datasets, warn_of_overlap

__all__ = ["Dataset", "default_eval", "load_datasets", "warn_of_overlap"]
