"""Packs documents of many lengths into full batches of a fixed number of tokens.

Rows come in a few lengths, because attention over a row costs the square of its length and most
documents are short. Positions restart with each document in a row; transformers builds the
block-diagonal attention mask from that, so a document never sees its neighbours.
"""

from bisect import bisect_right
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from .documents import IGNORED, Document

ROW_LENGTHS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows; each field has shape ``[rows, row length]``."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


def batches(documents: list[Document], batch_tokens: int, pad_id: int, rng: Random) -> list[Batch]:
    """`documents` in batches of `batch_tokens` tokens (the last of a row length may be smaller).

    Labels are shifted: ``labels[r, i]`` is the token to predict after ``input_ids[r, i]``.
    """
    rows: dict[int, list[list[Document]]] = {length: [] for length in ROW_LENGTHS}
    for length, row in _rows(documents, rng):
        rows[length].append(row)
    packed: list[Batch] = []
    for length, group in rows.items():
        rng.shuffle(group)
        size = max(1, batch_tokens // length)
        packed.extend(
            _stack(group[at : at + size], length, pad_id) for at in range(0, len(group), size)
        )
    rng.shuffle(packed)
    return packed


def _rows(documents: list[Document], rng: Random) -> list[tuple[int, list[Document]]]:
    """Rows with their lengths: each document opens the shortest row it fits, rest is filled up.

    Fillers are drawn at random among the documents that fit, so that rows differ between passes.
    """
    waiting = sorted(documents, key=lambda d: len(d.ids))
    sizes = [len(d.ids) for d in waiting]
    rows: list[tuple[int, list[Document]]] = []
    while waiting:
        row = [waiting.pop()]
        room = length = next(n for n in ROW_LENGTHS if n >= sizes[-1])
        room -= sizes.pop()
        while fitting := bisect_right(sizes, room):
            # The larger half of what fits, lest the small ones run out first.
            index = rng.randrange(fitting // 2, fitting)
            row.append(waiting.pop(index))
            room -= sizes.pop(index)
        rows.append((length, row))
    return rows


def _stack(rows: list[list[Document]], length: int, pad_id: int) -> Batch:
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.zeros(shape, dtype=torch.long)
    for index, row in enumerate(rows):
        at = 0
        for document in row:
            end = at + len(document.ids)
            input_ids[index, at:end] = torch.tensor(document.ids)
            labels[index, at : end - 1] = torch.tensor(document.labels[1:])
            position_ids[index, at:end] = torch.arange(end - at)
            at = end
        # Padding is one more document at the end of the row, which nobody attends to.
        position_ids[index, at:] = torch.arange(length - at)
    return Batch(input_ids, position_ids, labels)
