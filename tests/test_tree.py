"""Every mask equals the definition by walking parents: trees, chains, packed documents, combs."""

# B sequences, T tokens, K masks a token, R rows of a forward, L columns.

import random

import pytest
import torch
from torch import Tensor

from foretell.ops.tree import (
    MASK,
    PADDING,
    ROOT,
    ancestors,
    beside_mask,
    chain,
    chain_mask,
    depths,
    document_mask,
    forest,
    hang,
    row_mask,
)
from foretell.types import PAD_DOCUMENT
from tests.twins import brute_force_visible

DOCUMENTS = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 2, 2, 2, 2, 2],
        [5, 5, 7, 7, 7, 7, PAD_DOCUMENT, PAD_DOCUMENT, PAD_DOCUMENT],
    ]
)


def random_parents(rows: int, rng: random.Random, padding: int = 0, shuffled: bool = False) -> list[int]:
    """A random forest, padding rows at the end; shuffled: parents may stand after their children."""
    parents = [rng.choice([ROOT, *range(r)]) if r else ROOT for r in range(rows)]
    if shuffled:
        place = list(range(rows))
        rng.shuffle(place)
        moved = [0] * rows
        for r, parent in enumerate(parents):
            moved[place[r]] = place[parent] if parent >= 0 else parent
        parents = moved
    return parents + [PADDING] * padding


def row_mask_by_walking(parents: list[int], length: int, total_length: int, window: int | None) -> Tensor:
    """One row, one column at a time."""
    tree_RR = brute_force_visible(parents)
    depth = [int(tree_RR[r].sum()) - 1 for r in range(len(parents))]
    out_RL = torch.zeros(len(parents), total_length, dtype=torch.bool)
    for r, parent in enumerate(parents):
        for column in range(min(length + len(parents), total_length)):
            if column < length:
                position, seen = column, parent != PADDING
            else:
                position, seen = length + depth[column - length], bool(tree_RR[r, column - length])
            out_RL[r, column] = seen and (window is None or position > length + depth[r] - window)
    return out_RL


def test_the_definition_itself():
    #  0 -> 1 -> 3,  0 -> 2,  4 a second root,  5 padding
    visible = brute_force_visible([ROOT, 0, 0, 1, ROOT, PADDING])
    seen = [[s for s in range(6) if visible[r, s]] for r in range(6)]
    assert seen == [[0], [0, 1], [0, 2], [0, 1, 3], [4], [5]]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 33])
def test_ancestors_and_depths_of_random_trees(rows, shuffled):
    rng = random.Random(rows)
    batch = [random_parents(rows, rng, padding=i % 3, shuffled=shuffled) + [PADDING] * (2 - i % 3) for i in range(6)]
    wanted = torch.stack([brute_force_visible(parents) for parents in batch])
    assert torch.equal(ancestors(torch.tensor(batch)), wanted)
    assert torch.equal(depths(torch.tensor(batch)), wanted.sum(-1) - 1)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 100])
def test_ancestors_of_a_deep_chain(rows):
    parents_BR = chain(rows)[None]
    assert torch.equal(ancestors(parents_BR)[0], torch.ones(rows, rows, dtype=torch.bool).tril())
    assert depths(parents_BR)[0].tolist() == list(range(rows))


@pytest.mark.parametrize("window", [None, 1, 2, 4, 9, 40])
def test_row_mask_equals_the_definition(window):
    rng = random.Random(3)
    lengths, R = [0, 3, 11, 20], 7
    batch = [random_parents(R - i % 3, rng, padding=i % 3) for i in range(len(lengths))]
    for total_length in (27, 40):
        got = row_mask(torch.tensor(batch), torch.tensor(lengths), total_length, window)
        for b, length in enumerate(lengths):
            assert torch.equal(got[b], row_mask_by_walking(batch[b], length, total_length, window)), (b, window)


def test_a_tree_row_stands_at_its_depth_not_at_its_column():
    # two children of the root: the second is stored one column later but stands at the same position
    got = row_mask(torch.tensor([[ROOT, 0, 0]]), torch.tensor([4]), 7, window=3)
    assert got[0].int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0, 1]]


@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_chain_mask_equals_row_mask(window):
    lengths_B, valid_rows_B, R, L = torch.tensor([0, 5, 9]), torch.tensor([6, 4, 1]), 6, 17
    parents_BR = chain(R).repeat(3, 1)
    wanted = row_mask(parents_BR, lengths_B, L, window)
    assert torch.equal(chain_mask(R, lengths_B, L, window=window), wanted)
    padded_BR = parents_BR.masked_fill(torch.arange(R) >= valid_rows_B[:, None], PADDING)
    wanted = row_mask(padded_BR, lengths_B, L, window)
    assert torch.equal(chain_mask(R, lengths_B, L, valid_rows_B, window), wanted)


def test_every_row_sees_at_least_itself():
    """A row that sees nothing turns softmax into NaN."""
    lengths_B = torch.tensor([0, 6])
    parents_BR = torch.tensor([[ROOT, 0, 1, PADDING], [ROOT, PADDING, PADDING, PADDING]])
    own = torch.arange(10) == (lengths_B[:, None] + torch.arange(4))[..., None]
    assert (row_mask(parents_BR, lengths_B, 10, window=1) & own).sum() == 8
    assert (chain_mask(4, lengths_B, 10, torch.tensor([3, 0]), window=1) & own).sum() == 8
    assert document_mask(DOCUMENTS, window=1).diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("window", [None, 1, 2, 4])
def test_document_mask_is_the_forest(window):
    parents_BT = forest(DOCUMENTS)
    got = document_mask(DOCUMENTS, window)
    for b, parents in enumerate(parents_BT.tolist()):
        assert torch.equal(got[b], row_mask_by_walking(parents, 0, len(parents), window))
    assert parents_BT[1].tolist() == [ROOT, 0, 1, ROOT, ROOT, 4, 5, 6, 7]
    assert parents_BT[2].tolist() == [ROOT, 0, ROOT, 2, 3, 4, PADDING, PADDING, PADDING]


def comb(document_BT: Tensor, masks: int) -> tuple[Tensor, Tensor]:
    """(parents, kinds) of a text whose tokens all carry masks."""
    every_BT = torch.ones_like(document_BT, dtype=torch.bool)
    return hang(document_BT, torch.arange(document_BT.shape[1]).expand_as(document_BT), every_BT, masks)


def test_comb_layout():
    parents, kinds = comb(torch.zeros(1, 3, dtype=torch.long), 2)
    assert parents.tolist() == [[ROOT, 0, 1, 0, 3, 1, 5, 2, 7]]
    assert (kinds == MASK).tolist() == [[False] * 3 + [True] * 6]
    assert depths(parents).tolist() == [[0, 1, 2, 1, 2, 2, 3, 3, 4]]
    for masks in (1, 3):
        parents, _ = comb(DOCUMENTS, masks)
        assert torch.equal(parents[:, :9], forest(DOCUMENTS))
        for b, document_T in enumerate(DOCUMENTS.tolist()):
            rows = iter(range(9, 9 * (1 + masks)))
            wanted = [(t, next(rows)) for t in range(9) for _ in range(masks)]
            for i, (t, row) in enumerate(wanted):
                above = t if i % masks == 0 else row - 1
                assert int(parents[b, row]) == (PADDING if document_T[t] == PAD_DOCUMENT else above)


def test_no_token_of_a_comb_sees_a_mask_and_no_mask_sees_another_block():
    T, K = 9, 3
    parents, kinds = comb(DOCUMENTS, K)
    visible = ancestors(parents)
    assert not (visible & (kinds == MASK)[:, None] & (kinds != MASK)[..., None]).any()
    block = (torch.arange(T * (1 + K)) - T).div(K, rounding_mode="floor")
    masks_only = visible[:, T:, T:]
    assert not (masks_only & (block[T:, None] != block[T:])).any()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="a circle"):
        brute_force_visible([1, 0])
    with pytest.raises(ValueError, match="leads to 5"):
        brute_force_visible([ROOT, 5])
    with pytest.raises(ValueError, match="3 rows for 2 columns"):
        row_mask(chain(3)[None], torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="window must be at least 1"):
        chain_mask(2, torch.tensor([0]), 4, window=0)


@pytest.mark.parametrize("window", [None, 1, 2, 5])
@pytest.mark.parametrize("drafted", [False, True], ids=["the text's own", "drafted"])
def test_chains_beside_a_text_see_their_own_rows_of_a_tree(drafted, window):
    """Chain o's row k is the row k - 1 below owner o, or k below what stands before it: other columns, one rule."""
    document_BT, K, rng = DOCUMENTS[:2], 3, random.Random(4)
    (B, T), O = document_BT.shape, 4  # noqa: E741
    owner_BO = torch.tensor([sorted(rng.sample(range(1, T), O)) for _ in range(B)])
    first_BT = torch.tensor([[row.index(value) for value in row] for row in document_BT.tolist()])
    order_BT = torch.stack([torch.randperm(T) for _ in range(B)])  # text may be stored in any order
    below_BO = owner_BO - int(drafted)
    inside_BO = below_BO >= first_BT.gather(1, owner_BO)  # else the chain begins a text: a tree of its own
    parents_BR, _ = hang(document_BT, below_BO, torch.ones_like(owner_BO, dtype=torch.bool), K)
    roots_BR = torch.zeros_like(parents_BR, dtype=torch.bool)
    roots_BR[:, T::K] = ~inside_BO
    parents_BR = parents_BR.masked_fill(roots_BR, ROOT)
    tree_BRL = row_mask(parents_BR, torch.zeros(B, dtype=torch.long), T + O * K, window)
    for chain_rows in range(0 if not drafted else 1, K + 1):
        found = beside_mask(order_BT, first_BT.gather(1, owner_BO), below_BO, chain_rows, window)
        assert found.shape == (B, O, T + chain_rows * O)
        for b in range(B):
            for o in range(O):
                row = T + o * K + chain_rows - 1 if chain_rows else int(below_BO[b, o])
                columns = [*order_BT[b].tolist(), *(T + i * K + k for k in range(chain_rows) for i in range(O))]
                assert torch.equal(found[b, o], tree_BRL[b, row, columns])
