"""Encoded rows to batches: padding, packing, and the one way from a dict of tensors to a `Batch`.

A document is one encoded row before packing. Tokens of different documents must never see or predict each other;
`document_ids` is what everything downstream tells them apart by.
"""

# B sequences in a batch, T positions of a row, D hidden width.

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foretell.data.prompts import Encoded
from foretell.data.rows import as_list
from foretell.ops.tree import starts_of
from foretell.types import IGNORE_INDEX, PAD_DOCUMENT, Batch


class MTPCollator:
    """Pads encoded rows on the right to a batch for transformers' Trainer.

    Args:
        pad_token_id: fills input_ids; never seen or trained.
        hidden: pass on kept `hidden_states` [T, D] where rows carry them. All rows of a batch must, or none.
        pad_to_multiple_of: in tokens; helps kernels and torch.compile by fewer distinct shapes.
        min_length: in tokens; a module of depth K needs K + 2, also where a batch holds only shorter rows.
    """

    def __init__(
        self, pad_token_id: int, hidden: bool = True, pad_to_multiple_of: int | None = None, min_length: int = 1
    ):
        if pad_token_id is None:
            raise ValueError("pad_token_id: got None, wanted an id; the EOS id will do, padding is masked everywhere.")
        self.pad_token_id = pad_token_id
        self.hidden = hidden
        self.pad_to_multiple_of = pad_to_multiple_of
        self.min_length = min_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, labels, document_ids, position_ids, attention_mask [B, T], and hidden_states [B, T, D].

        The first label of each document becomes IGNORE_INDEX: nothing before it could predict it, and so the number
        of labels is the number of next-token targets, packed or not.

        Raises:
            ValueError: columns of a row differ in length, or only some rows carry hidden states.
        """
        whole = [_whole(row) for row in rows]
        T = max(self.min_length, *(len(row["input_ids"]) for row in whole))
        if self.pad_to_multiple_of:
            T += -T % self.pad_to_multiple_of
        batch = {
            "input_ids": _padded(whole, "input_ids", T, self.pad_token_id),
            "labels": _padded(whole, "labels", T, IGNORE_INDEX),
            "document_ids": _padded(whole, "document_ids", T, PAD_DOCUMENT),
            "position_ids": _padded(whole, "position_ids", T, 0),
        }
        batch["attention_mask"] = (batch["document_ids"] != PAD_DOCUMENT).long()
        if self.hidden and _all_or_none_hidden(whole):
            first_TD = torch.as_tensor(whole[0]["hidden_states"])
            hidden_BTD = first_TD.new_zeros(len(whole), T, first_TD.shape[-1])
            for at, row in enumerate(whole):
                hidden_BTD[at, : len(row["input_ids"])] = torch.as_tensor(row["hidden_states"])
            batch["hidden_states"] = hidden_BTD
        return batch


def to_batch(inputs: Mapping[str, Tensor]) -> Batch:
    """Turn the tensors that a trainer passes on into a `Batch`.

    Whatever is missing is derived: documents from restarting position_ids (as TRL packs) or else one document a row;
    positions from the documents; padding from attention_mask. Left padding is fine. Labels default to the input ids.

    Raises:
        ValueError: tensors whose shapes differ from input_ids' [B, T].
    """
    input_ids_BT = inputs["input_ids"]
    names = ("labels", "document_ids", "position_ids", "attention_mask", "hidden_states", "mtp_labels")
    given = {name: inputs.get(name) for name in names}
    for name, tensor in given.items():
        shape = None if tensor is None else tensor.shape[:2] if name in names[-2:] else tensor.shape
        if shape is not None and shape != input_ids_BT.shape:
            raise ValueError(f"{name}: got the shape {tuple(shape)}, wanted input_ids' {tuple(input_ids_BT.shape)}.")
    document_BT, position_BT = given["document_ids"], given["position_ids"]
    if document_BT is None:
        document_BT = torch.zeros_like(input_ids_BT)
        if position_BT is not None:
            document_BT[:, 1:] = (position_BT[:, 1:] != position_BT[:, :-1] + 1).cumsum(1)
    if given["attention_mask"] is not None:
        document_BT = document_BT.masked_fill(given["attention_mask"] == 0, PAD_DOCUMENT)
    if position_BT is None:
        position_BT = positions_of(document_BT)
    labels_BT = input_ids_BT if given["labels"] is None else given["labels"]
    return Batch(
        input_ids_BT=input_ids_BT,
        labels_BT=labels_BT.masked_fill(document_BT == PAD_DOCUMENT, IGNORE_INDEX),
        document_BT=document_BT,
        position_ids_BT=position_BT,
        hidden_BTD=given["hidden_states"],
        mtp_labels_BTK=given["mtp_labels"],
    )


def positions_of(document_BT: Tensor) -> Tensor:
    """Position ids [B, T] that restart in each document, 0 on padding."""
    at_BT = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    start_BT = torch.where(starts_of(document_BT), at_BT, 0).cummax(1).values
    return (at_BT - start_BT).masked_fill(document_BT == PAD_DOCUMENT, 0)


class PackedRows(Sequence):
    """Rows that hold several documents each, put together when they are asked for: kept hidden states stay on disk."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], bins: list[list[int]]):
        self._rows, self.bins = rows, bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        rows = [_whole(self._rows[at]) for at in self.bins[index]]
        packed: dict[str, Any] = {"input_ids": [], "labels": [], "document_ids": [], "position_ids": []}
        for row in rows:
            # rows that are packed already keep their documents apart, under new numbers
            shift = packed["document_ids"][-1] + 1 if packed["document_ids"] else 0
            for name, column in packed.items():
                column += [value + shift for value in row[name]] if name == "document_ids" else row[name]
        if _all_or_none_hidden(rows):
            packed["hidden_states"] = torch.cat([torch.as_tensor(row["hidden_states"]) for row in rows])
        return packed


def pack(rows: Sequence[Mapping[str, Any]], length: int) -> PackedRows:
    """Pack encoded rows into rows of at most `length` tokens, by best-fit decreasing; no document is ever split.

    Args:
        rows: encoded rows: input_ids, labels, and what else the collator takes.
        length: in tokens.

    Returns:
        A list-like of rows with input_ids, labels, document_ids, position_ids (restarting) and hidden_states, if the
        rows have them. `bins` holds the indices of the rows in each.

    Raises:
        ValueError: a row longer than `length` tokens.
    """
    if length < 1:
        raise ValueError(f"length: got {length}, wanted at least 1 token.")
    if isinstance(rows, Encoded):
        lengths = rows.lengths.tolist()
    else:
        lengths = [len(rows[at]["input_ids"]) for at in range(len(rows))]
    longer = [at for at, tokens in enumerate(lengths) if tokens > length]
    if longer:
        raise ValueError(
            f"rows[{longer[0]}]: got {lengths[longer[0]]} tokens, wanted at most {length} to pack a row without "
            f"splitting it ({len(longer)} of {len(lengths)} rows are longer). Pack to a larger length, or cut the rows."
        )
    bins: list[list[int]] = []
    bins_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # sorted keys of bins_by_room
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        tokens = lengths[at]
        found = bisect_left(rooms, tokens)
        if found == len(rooms):
            room, chosen = length, len(bins)
            bins.append([])
        else:
            room = rooms[found]
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                del bins_by_room[room], rooms[found]
        bins[chosen].append(at)
        left = room - tokens
        if left not in bins_by_room:
            insort(rooms, left)
        bins_by_room.setdefault(left, []).append(chosen)
    # the order of the data, not of the packing: a loader without shuffling must not see long documents first
    return PackedRows(rows, sorted(sorted(chosen) for chosen in bins))


def _whole(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with every column, as lists, and no label on a document's first token."""
    ids = list(as_list(row["input_ids"]))
    if not ids:
        raise ValueError("got a row without tokens, wanted at least one; drop it before collating.")
    given = {name: as_list(row.get(name)) for name in ("labels", "document_ids", "position_ids")}
    for name, values in {**given, "hidden_states": row.get("hidden_states")}.items():
        if values is not None and len(values) != len(ids):
            raise ValueError(f"{name}: got {len(values)} values, wanted one for each of the {len(ids)} input_ids.")
    document_1T = torch.zeros(1, len(ids), dtype=torch.long)
    if given["document_ids"] is not None:
        # numbered from 0 by appearance
        document_1T[0] = starts_of(torch.tensor([given["document_ids"]])).long().cumsum(1)[0] - 1
    starts = starts_of(document_1T)[0].tolist()
    labels = ids if given["labels"] is None else given["labels"]
    whole = {
        "input_ids": ids,
        "labels": [IGNORE_INDEX if first else label for first, label in zip(starts, labels, strict=True)],
        "document_ids": document_1T[0].tolist(),
        "position_ids": list(given["position_ids"] or positions_of(document_1T)[0].tolist()),
    }
    if row.get("hidden_states") is not None:
        whole["hidden_states"] = row["hidden_states"]
    return whole


def _padded(rows: list[dict[str, Any]], name: str, T: int, fill: int) -> Tensor:
    return torch.tensor([row[name] + [fill] * (T - len(row[name])) for row in rows], dtype=torch.long)


def _all_or_none_hidden(rows: list[dict[str, Any]]) -> bool:
    count = sum("hidden_states" in row for row in rows)
    if count not in (0, len(rows)):
        raise ValueError(f"hidden_states: got them in {count} of {len(rows)} rows, wanted them in all rows or in none.")
    return count > 0
