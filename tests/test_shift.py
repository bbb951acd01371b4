"""Labels k ahead equal the triple-loop definition, with packed documents, padding and loss masks."""

# B sequences, T positions, K depths.

import pytest
import torch
from torch import Tensor

from foretell.ops.shift import ahead, check_depth, labels_of, next_labels
from foretell.types import IGNORE_INDEX, PAD_DOCUMENT, Batch


def future_labels(labels_BT: Tensor, document_BT: Tensor, depth: int) -> Tensor:
    """labels_of a batch of which nothing else is known."""
    return labels_of(Batch(labels_BT, labels_BT, document_BT, torch.zeros_like(labels_BT)), depth)


def by_definition(labels_BT: Tensor, document_BT: Tensor, depth: int) -> Tensor:
    """Depths 0..K: position, depth, and every token in between, one at a time."""
    B, T = labels_BT.shape
    out = torch.full((B, T, depth + 1), IGNORE_INDEX)
    for b in range(B):
        for t in range(T):
            for k in range(depth + 1):
                at = t + 1 + k
                inside = at < T and all(document_BT[b, s] == document_BT[b, t] for s in range(t, at + 1))
                if inside and document_BT[b, t] != PAD_DOCUMENT:
                    out[b, t, k] = labels_BT[b, at]
    return out


def packed_rows(seed: int, B: int = 4, T: int = 17) -> tuple[Tensor, Tensor]:
    """Random labels, a third of them masked, in rows packed with documents of 1..6 tokens and padded at the end."""
    g = torch.Generator().manual_seed(seed)
    labels_BT = torch.randint(0, 50, (B, T), generator=g)
    labels_BT[torch.rand(B, T, generator=g) < 0.33] = IGNORE_INDEX
    document_BT = torch.full((B, T), PAD_DOCUMENT)
    for b in range(B):
        at, document = 0, 0
        while at < T - b:  # row b ends with at most b padding positions
            length = int(torch.randint(1, 7, (), generator=g))
            document_BT[b, at : min(at + length, T - b)] = document
            at, document = at + length, document + 1
    return labels_BT, document_BT


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("depth", [1, 2, 5, 15])
def test_labels_equal_the_triple_loop(seed, depth):
    labels_BT, document_BT = packed_rows(seed)
    wanted = by_definition(labels_BT, document_BT, depth)
    assert torch.equal(next_labels(labels_BT, document_BT), wanted[..., 0])
    assert torch.equal(future_labels(labels_BT, document_BT, depth), wanted[..., 1:])


def test_packed_equals_one_document_at_a_time():
    labels_BT, document_BT = packed_rows(7)
    packed = future_labels(labels_BT, document_BT, 2)
    compared = 0
    for b in range(len(labels_BT)):
        for document in document_BT[b].unique().tolist():
            at = document_BT[b] == document
            if document == PAD_DOCUMENT or at.sum() < 4:
                continue
            alone = future_labels(labels_BT[b, at][None], torch.zeros(1, int(at.sum()), dtype=torch.long), 2)
            assert torch.equal(packed[b, at], alone[0])
            compared += 1
    assert compared >= 5


def test_depth_2_does_not_look_into_the_next_document():
    """MaxText's defect: it rolls the next-token labels step by step and tests the rolled segment ids, so that depth 2
    un-masks the last position of each document."""
    x = IGNORE_INDEX
    labels_BT = torch.tensor([[11, 12, 13, 14, 21, 22, 23, 24]])
    document_BT = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    labels_BTK = future_labels(labels_BT, document_BT, 2)
    assert labels_BTK[..., 0].tolist() == [[13, 14, x, x, 23, 24, x, x]]
    assert labels_BTK[..., 1].tolist() == [[14, x, x, x, 24, x, x, x]]

    rolled, segment = next_labels(labels_BT, document_BT), document_BT
    for _ in range(2):
        inside = segment[:, 1:] == segment[:, :-1]
        rolled = torch.cat([torch.where(inside, rolled[:, 1:], x), rolled.new_full((1, 1), x)], 1)
        segment = torch.cat([segment[:, 1:], segment.new_full((1, 1), PAD_DOCUMENT)], 1)
    assert (rolled != x).int().tolist() == [[1, 0, 0, 1, 1, 0, 0, 0]], "the mistake as published"
    assert rolled[0, 3] == 23, "the end of the first document is trained to predict the second"


def test_only_the_target_token_needs_to_be_unmasked():
    x = IGNORE_INDEX
    labels_BT = torch.tensor([[x, x, x, 3, 4]])
    out = future_labels(labels_BT, torch.zeros(1, 5, dtype=torch.long), 2)
    assert out[0].tolist() == [[x, 3], [3, 4], [4, x], [x, x], [x, x]]


def test_ahead_carries_values_of_any_kind():
    document_BT = torch.tensor([[0, 0, 0, 1, 1]])
    values, valid = ahead(torch.tensor([[10, 11, 12, 20, 21]]), 2, document_BT, 0)
    assert values.tolist() == [[12, 0, 0, 0, 0]] and valid.tolist() == [[True, False, False, False, False]]
    hidden, _ = ahead(torch.arange(10.0).view(1, 5, 2), 1, document_BT, 0.0)
    assert hidden.tolist() == [[[2, 3], [4, 5], [0, 0], [8, 9], [0, 0]]]
    flags, _ = ahead(torch.ones(1, 5, dtype=torch.bool), 4, document_BT, False)
    assert not flags.any()


def test_nothing_is_ahead_of_the_end_and_padding_is_nowhere():
    document_BT = torch.tensor([[0, 0, PAD_DOCUMENT, PAD_DOCUMENT]])
    values_BT = torch.tensor([[1, 2, 3, 4]])
    for k, wanted in [
        (0, [True, True, False, False]),
        (1, [True, False, False, False]),
        (4, [False] * 4),
        (9, [False] * 4),
    ]:
        values, valid = ahead(values_BT, k, document_BT, -7)
        assert valid.tolist() == [wanted]
        assert torch.equal(values == -7, ~valid)


@pytest.mark.parametrize("depth", [-1, 0, 4, 5, 100])
def test_a_depth_that_no_row_can_hold_is_refused(depth):
    with pytest.raises(ValueError, match=r"\[1, T-2\] = \[1, 3\] for rows of T=5 tokens, got"):
        check_depth(depth, 5)


def test_other_bad_input_is_refused():
    rows = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="k must be 0 or more"):
        ahead(rows, -1, rows, 0)
    with pytest.raises(ValueError, match=r"\(2, 5\) and documents of shape \(2, 4\)"):
        next_labels(rows, rows[:, :4])
