import math

import numpy as np
import pytest

from megatron_satformer.analysis.unigram import read_splits, unigram_entropy
from tests.datasets import write_dataset

DOCUMENTS = [[0, 0, 1], [1, 0], [2], [0, 3, 3, 1]]  # with 75,25,0 the last one is validation


@pytest.fixture
def prefix(tmp_path):
    lengths = [len(document) for document in DOCUMENTS]
    write_dataset(tmp_path / "data", np.concatenate(DOCUMENTS), lengths, vocab_size=5)
    return tmp_path / "data"


def test_splits_are_runs_of_documents(prefix):
    splits = {name: list(tokens) for name, tokens in read_splits(prefix, "75,25,0").items()}
    assert splits == {"train": [0, 0, 1, 1, 0, 2], "valid": [0, 3, 3, 1], "test": []}


def test_entropy_by_hand(prefix):
    # counts of training with one added: 4, 3, 2, 1, 1 of 11; 3 and 4 were never seen
    expected = -(math.log(4 / 11) + 2 * math.log(1 / 11) + math.log(3 / 11)) / 4
    assert unigram_entropy(prefix, "75,25,0", 5) == pytest.approx(expected, rel=1e-12)


def test_an_unused_vocabulary_costs(prefix):
    assert unigram_entropy(prefix, "75,25,0", 500) > unigram_entropy(prefix, "75,25,0", 5)


def test_an_empty_split_is_refused(prefix):
    with pytest.raises(ValueError, match=r"split \(100,0,0\) must give the valid split a document"):
        unigram_entropy(prefix, "100,0,0", 5)
