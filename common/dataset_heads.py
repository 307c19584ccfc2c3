"""The multi-head baseline of segmenters: for queries, a softmax per dataset, without text."""

from torch import Tensor, nn

from common.errors import InputError
from common.labels import LabelSpace


class DatasetHeads(nn.Module):
    """Classifies queries with a linear layer per dataset. The last column is background."""

    def __init__(self, channels: int, label_space: LabelSpace):
        super().__init__()
        self.datasets = label_space.datasets
        vocabularies = label_space.vocabularies.values()
        self.layers = nn.ModuleList(nn.Linear(channels, len(v) + 1) for v in vocabularies)

    def forward(self, z: Tensor, label_space: LabelSpace) -> Tensor:
        """Returns the logits (..., K + 1) of queries z (..., C) over the K classes of one dataset.

        label_space: has this dataset only. Raises InputError if it has more than one.
        """
        if len(label_space.datasets) > 1:
            raise InputError(
                "this model has a classifier for each dataset; name one of them as --vocabulary:"
                f" {', '.join(self.datasets)}"
            )
        (dataset,) = label_space.datasets
        return self.layers[self.datasets.index(dataset)](z).float()
