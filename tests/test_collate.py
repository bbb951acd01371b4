"""Packed, padded or one by one: the same tokens are predicted from the same contexts, and never across documents."""

from __future__ import annotations

import random

import pytest
import torch

from foretell.data.collate import MTPCollator, pack, to_batch
from foretell.types import IGNORE_INDEX, PAD_DOCUMENT


def make_rows(lengths, width=None, seed=0):
    """Encoded rows of these lengths with unlike tokens; about half of them are trained."""
    rng, rows = random.Random(seed), []
    for number, length in enumerate(lengths):
        ids = [100 * number + at + 1 for at in range(length)]
        row = {"input_ids": ids, "labels": [token if rng.random() < 0.5 else IGNORE_INDEX for token in ids]}
        if width:
            row["hidden_states"] = torch.tensor(ids, dtype=torch.float32)[:, None] + torch.arange(width) / width
        rows.append(row)
    return rows


def predictions(batch, depth):
    """By brute force: every (context, position, k, label) that depth k = 0..depth may be trained on."""
    found = []
    for ids, labels, documents, positions in zip(
        *(tensor.tolist() for tensor in (batch.input_ids_BT, batch.labels_BT, batch.document_BT, batch.position_ids_BT))
    ):
        for t in range(len(ids)):
            context = tuple(ids[s] for s in range(t + 1) if documents[s] == documents[t])
            for k in range(depth + 1):
                target = t + 1 + k
                if target >= len(ids) or labels[target] == IGNORE_INDEX:
                    continue
                if len(set(documents[t : target + 1])) == 1 and documents[t] != PAD_DOCUMENT:
                    found.append((context, positions[t], k, labels[target]))
    return sorted(found)


def test_rows_are_padded_on_the_right():
    rows = make_rows([3, 5], width=4)
    inputs = MTPCollator(pad_token_id=9)(rows)
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 9, 9], [101, 102, 103, 104, 105]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert inputs["document_ids"].tolist() == [[0, 0, 0, PAD_DOCUMENT, PAD_DOCUMENT], [0] * 5]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert inputs["labels"][0, 3:].tolist() == [IGNORE_INDEX] * 2
    assert inputs["hidden_states"].shape == (2, 5, 4)
    assert torch.equal(inputs["hidden_states"][0, :3], rows[0]["hidden_states"])
    assert not inputs["hidden_states"][0, 3:].any()
    assert all(inputs[name].dtype == torch.long for name in inputs if name != "hidden_states")


def test_lengths_are_rounded_up_if_asked():
    assert MTPCollator(0, pad_to_multiple_of=8)(make_rows([3, 9]))["input_ids"].shape == (2, 16)
    assert MTPCollator(0, pad_to_multiple_of=8)(make_rows([8]))["input_ids"].shape == (1, 8)


def test_the_first_token_of_a_document_is_never_a_label():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]  # without labels every token is trained
    assert MTPCollator(0)(rows)["labels"].tolist() == [[IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 9, IGNORE_INDEX]]
    packed = MTPCollator(0)(pack(rows, 5))
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    # 8 must be no target of 7: neither by its label nor by its document
    assert packed["labels"].tolist() == [[IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9]]
    assert packed["document_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_hidden_states_can_be_left_out_but_not_by_halves():
    rows = make_rows([3, 2], width=4)
    assert "hidden_states" not in MTPCollator(0, hidden=False)(rows)
    assert "hidden_states" not in MTPCollator(0)(make_rows([3, 2]))
    del rows[1]["hidden_states"]
    with pytest.raises(ValueError, match="got them in 1 of 2 rows"):
        MTPCollator(0)(rows)
    with pytest.raises(ValueError, match="got them in 1 of 2 rows"):
        pack(rows, 8)[0]


def test_hidden_states_keep_their_dtype():
    rows = [{"input_ids": [1, 2], "hidden_states": torch.ones(2, 3, dtype=torch.bfloat16)}]
    assert MTPCollator(0)(rows)["hidden_states"].dtype == torch.bfloat16


@pytest.mark.parametrize("column", ["labels", "document_ids", "position_ids", "hidden_states"])
def test_columns_of_unlike_length_are_refused(column):
    row = {"input_ids": [1, 2, 3], column: [[0.0]] if column == "hidden_states" else [1]}
    with pytest.raises(ValueError, match=f"{column}: got 1 values, wanted one for each of the 3 input_ids"):
        MTPCollator(0)([row])


def test_rows_without_tokens_and_padding_without_an_id_are_refused():
    with pytest.raises(ValueError, match="got a row without tokens"):
        MTPCollator(0)([{"input_ids": []}])
    with pytest.raises(ValueError, match="pad_token_id: got None"):
        MTPCollator(None)


@pytest.mark.parametrize("seed", range(4))
def test_packed_is_one_document_at_a_time(seed):
    rng = random.Random(seed)
    rows = make_rows([rng.randint(1, 12) for _ in range(20)], width=3, seed=seed)
    packed = pack(rows, 16)
    collate = MTPCollator(0)
    one_by_one = sorted(found for row in rows for found in predictions(to_batch(collate([row])), depth=3))
    padded = to_batch(collate(rows))
    together = to_batch(collate(packed[:]))
    assert one_by_one and predictions(padded, depth=3) == one_by_one
    assert predictions(together, depth=3) == one_by_one
    # states stay with their tokens
    real_BT = together.document_BT != PAD_DOCUMENT
    assert torch.equal(together.hidden_BTD[real_BT][:, 0], together.input_ids_BT[real_BT].float())
    # the count of labels is the count of next-token targets, so a division by it is the same either way
    targets = len([found for found in one_by_one if found[2] == 0])
    assert all(int((batch.labels_BT != IGNORE_INDEX).sum()) == targets for batch in (padded, together))


def test_the_comparison_above_would_see_a_leak():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    inputs = MTPCollator(0)(pack(rows, 5))
    right = predictions(to_batch(inputs), depth=1)
    leaking = predictions(to_batch({**inputs, "document_ids": torch.zeros_like(inputs["document_ids"])}), depth=1)
    assert right != leaking


@pytest.mark.parametrize("seed", range(4))
def test_packing_keeps_every_document_whole_and_wastes_little(seed):
    rng = random.Random(seed)
    lengths = [min(64, 1 + int(rng.expovariate(0.08))) for _ in range(300)]
    packed = pack(make_rows(lengths), 64)
    assert sorted(at for chosen in packed.bins for at in chosen) == list(range(300))
    sizes = [sum(lengths[at] for at in chosen) for chosen in packed.bins]
    assert max(sizes) <= 64 and sum(sizes) / (64 * len(sizes)) > 0.97
    assert [row["input_ids"][0] for row in packed] == sorted(row["input_ids"][0] for row in packed)  # the data's order
    assert packed.bins == pack(make_rows(lengths), 64).bins


def test_best_fit_takes_the_fullest_row_with_room():
    # 6 and 5 open two rows of 8; 3 fits behind 5 exactly, 2 behind 6 exactly
    assert pack(make_rows([6, 5, 3, 2]), 8).bins == [[0, 3], [1, 2]]


def test_long_documents_are_refused_never_split():
    rows = make_rows([4, 9, 11])
    with pytest.raises(ValueError, match=r"rows\[1\]: got 9 tokens, wanted at most 8 .*2 of 3 rows are longer"):
        pack(rows, 8)
    with pytest.raises(ValueError, match="length: got 0"):
        pack(rows, 0)


def test_packed_rows_pack_again_with_their_documents_apart():
    twice = pack(pack(make_rows([2, 2, 3]), 5)[:], 7)
    assert len(twice) == 1
    assert twice[0]["document_ids"] == [0, 0, 1, 1, 1, 2, 2]
    assert twice[0]["position_ids"] == [0, 1, 0, 1, 2, 0, 1]


def test_packing_reads_hidden_states_only_when_a_row_is_asked_for():
    class Watched(list):
        touched = 0

        def __getitem__(self, at):
            row = super().__getitem__(at)
            if isinstance(row, dict):
                Watched.touched += 1
            return row

    packed = pack(Watched(make_rows([3] * 10)), 6)
    before = Watched.touched
    packed[0]
    assert Watched.touched - before == 2


def test_to_batch_derives_what_is_missing():
    ids_BT = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    plain = to_batch({"input_ids": ids_BT})
    assert plain.document_BT.tolist() == [[0] * 5] * 2 and torch.equal(plain.labels_BT, ids_BT)
    assert plain.position_ids_BT.tolist() == [[0, 1, 2, 3, 4]] * 2 and plain.hidden_BTD is None

    padded = to_batch({"input_ids": ids_BT, "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5])})
    assert padded.document_BT.tolist() == [[0, 0, 0, PAD_DOCUMENT, PAD_DOCUMENT], [0] * 5]
    assert padded.position_ids_BT.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert padded.labels_BT[0].tolist() == [5, 6, 7, IGNORE_INDEX, IGNORE_INDEX]

    left = to_batch({"input_ids": ids_BT.flip(1), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5])})
    assert left.document_BT[0].tolist() == [PAD_DOCUMENT, PAD_DOCUMENT, 0, 0, 0]
    assert left.position_ids_BT[0].tolist() == [0, 0, 0, 1, 2]

    # as TRL packs: nothing but restarting positions; the second document is one token long
    restarting_BT = torch.tensor([[0, 1, 0, 0, 1]])
    trl = to_batch({"input_ids": ids_BT[1:], "position_ids": restarting_BT})
    assert trl.document_BT.tolist() == [[0, 0, 1, 2, 2]]
    assert torch.equal(trl.position_ids_BT, restarting_BT)

    packed = to_batch({"input_ids": ids_BT[1:], "document_ids": torch.tensor([[3, 3, 4, 4, 4]])})
    assert packed.position_ids_BT.tolist() == [[0, 1, 0, 1, 2]]


def test_to_batch_takes_what_the_collator_gives():
    inputs = MTPCollator(0)(pack(make_rows([3, 2, 4], width=2), 6))
    full = to_batch(inputs)
    derived = to_batch({name: inputs[name] for name in ("input_ids", "labels", "document_ids", "hidden_states")})
    assert full.mtp_labels_BTK is derived.mtp_labels_BTK is None
    for name in vars(full).keys() - {"mtp_labels_BTK"}:
        assert torch.equal(getattr(full, name), getattr(derived, name)), name


def test_to_batch_refuses_other_shapes():
    ids_BT = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels: got the shape \(2, 4\), wanted input_ids' \(2, 5\)"):
        to_batch({"input_ids": ids_BT, "labels": ids_BT[:, 1:]})
    with pytest.raises(ValueError, match="attention_mask: got the shape"):
        to_batch({"input_ids": ids_BT, "attention_mask": torch.ones(2, 1, 5, 5)})
    with pytest.raises(ValueError, match="hidden_states: got the shape"):
        to_batch({"input_ids": ids_BT, "hidden_states": torch.ones(2, 4, 3)})
