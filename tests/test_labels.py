"""The label spaces that several datasets make together: merged and concatenated columns."""

import pytest
import torch

from common.errors import InputError
from common.labels import LabelSpace, Vocabulary


def test_label_space_merges_the_names_that_fold_alike():
    """In the order of first appearance, and spelled as there. The concatenation merges none."""
    vocabularies = [
        Vocabulary("a", ("Traffic light", "cat", "Cup")),
        Vocabulary("b", ("dog", "traffic_light", "CAT", "sofa")),
        Vocabulary("c", ("sofa", "cup ", "zebra", "Dog")),
    ]
    merged, plain = LabelSpace(vocabularies, merge=True), LabelSpace(vocabularies)
    assert merged.names == ("Traffic light", "cat", "Cup", "dog", "sofa", "zebra")
    assert len(merged) == 6
    columns = {"a": [0, 1, 2], "b": [3, 0, 1, 4], "c": [4, 2, 5, 3]}
    assert {name: merged.columns(name).tolist() for name in merged.datasets} == columns
    assert merged.to_global("b", torch.tensor([1, 1, 3])).tolist() == [0, 0, 4]
    assert merged.to_global("c", torch.tensor([], dtype=torch.long)).tolist() == []
    assert merged.columns("a").dtype == torch.int64
    assert merged.to_global("a", torch.tensor([2])).dtype == torch.int64
    assert plain.names == sum((v.names for v in vocabularies), ()) and len(plain) == 11
    assert plain.columns("b").tolist() == [3, 4, 5, 6] and plain.scope("b") == slice(3, 7)
    assert plain.to_global("c", torch.tensor([3, 0])).tolist() == [10, 7]
    with pytest.raises(InputError, match="dataset 'd' is not part of this label space"):
        merged.columns("d")


def test_label_space_merges_within_a_dataset_too():
    space = LabelSpace([Vocabulary("a", ("Bat", "bat", "ball"))], merge=True)
    assert space.names == ("Bat", "ball") and space.columns("a").tolist() == [0, 0, 1]
