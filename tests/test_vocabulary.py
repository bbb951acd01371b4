"""A draft vocabulary holds what answers are made of, and always what ends them."""

from __future__ import annotations

import pytest
import torch

from foretell.data.vocabulary import coverage, frequent_tokens

# answers: 7 three times, 5 twice, 9 once; prompts: 3 twice, 9 twice, 2 once
ROWS = [
    {"input_ids": [3, 9, 7, 7, 5], "labels": [-100, -100, 7, 7, 5]},
    {"input_ids": [3, 9, 2, 7, 5, 9], "labels": [-100, -100, -100, 7, 5, 9]},
]


@pytest.mark.parametrize(
    ("size", "always", "wanted"),
    [
        (1, (), [7]),
        (2, (), [5, 7]),
        (3, (), [5, 7, 9]),
        (4, (), [3, 5, 7, 9]),  # then the prompts
        (5, (), [2, 3, 5, 7, 9]),
        (7, (), [0, 1, 2, 3, 5, 7, 9]),  # then the lowest ids
        (12, (), list(range(12))),
        (3, (11,), [5, 7, 11]),
        (3, (11, 7), [5, 7, 11]),
        (2, (10, 11), [10, 11]),
    ],
)
def test_the_order_of_choice(size, always, wanted):
    ids_M = frequent_tokens(ROWS, size, vocab_size=12, always=always)
    assert ids_M.dtype == torch.long and ids_M.tolist() == wanted


def test_prompts_break_ties():
    rows = [{"input_ids": [4, 6, 1, 6], "labels": [4, 6, 1, -100]}]  # 6 also stands in a prompt; 1 is the lower id
    assert frequent_tokens(rows, 1, vocab_size=8).tolist() == [6]
    assert frequent_tokens(rows, 2, vocab_size=8).tolist() == [1, 6]


def test_rows_without_labels_are_all_answer():
    assert frequent_tokens([{"input_ids": torch.tensor([4, 4, 2])}], 1, vocab_size=8).tolist() == [4]


def test_coverage_counts_trained_tokens_only():
    assert coverage(ROWS, torch.tensor([7])) == pytest.approx(3 / 6)
    assert coverage(ROWS, [5, 7, 3]) == pytest.approx(5 / 6)
    assert coverage(ROWS, range(12)) == 1.0
    with pytest.raises(ValueError, match="without a trained token"):
        coverage([{"input_ids": [1], "labels": [-100]}], [1])


def test_sizes_and_ids_that_cannot_be():
    with pytest.raises(ValueError, match="got a size of 13, wanted between 1 .* and 12"):
        frequent_tokens(ROWS, 13, vocab_size=12)
    with pytest.raises(ValueError, match="got a size of 0"):
        frequent_tokens(ROWS, 0, vocab_size=12)
    with pytest.raises(ValueError, match="got a size of 1, wanted between 2"):
        frequent_tokens(ROWS, 1, vocab_size=12, always=(1, 2))
    with pytest.raises(ValueError, match="got token id 9, wanted ids below the target's vocabulary of 9"):
        frequent_tokens(ROWS, 2, vocab_size=9)
