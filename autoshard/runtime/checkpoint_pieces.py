"""What a rank holds of a whole tensor, told to DCP in its own protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from autoshard.errors import CheckpointError
from autoshard.runtime.boxes import Piece


class Pieces(torch.Tensor):
    """A whole tensor of which this rank holds pieces, as DCP's planner wants to see it.

    It has the whole shape and no data of its own; the three dunder methods are DCP's protocol.
    """

    _local: Tensor
    _pieces: tuple[Piece, ...]

    @staticmethod
    def __new__(
        cls: type[Pieces], local: Tensor, shape: tuple[int, ...], held: tuple[Piece, ...]
    ) -> Pieces:
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device
        )
        made._local, made._pieces = local, held
        return made

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(piece.whole.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(piece),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for piece in self._pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(piece) for piece in self._pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for piece in self._pieces:
            if index.offset is not None and tuple(index.offset) == piece.whole.offsets:
                return piece.local.of(self._local)
        raise CheckpointError(f"expected a piece of {index.fqn} at {index.offset} on this rank")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{function} on a description of pieces")


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.whole.offsets), torch.Size(piece.whole.sizes))
