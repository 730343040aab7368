"""Boundaries of the documents in packed tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels import dispatch


@dataclass(frozen=True)
class Packing:
    """Boundaries of the documents in packed tokens, computed once for all layers."""

    first: Tensor
    """First token of each token's document, int32 [tokens]."""
    end: Tensor
    """End of each token's document, int32 [tokens]."""
    equal: int = 0
    """Number of documents, if they are known to have equal lengths without reading the tensors; otherwise 0."""
    edges: Tensor | None = None
    """First token of each document and the end of the last, int32 [documents + 1], if a library may require it."""

    @classmethod
    @functools.lru_cache(8)
    def of_rows(cls, rows: int, length: int, device: torch.device) -> Packing:
        """Returns the packing of rows that are one document each."""
        # The result is cached for later calls, which may compute gradients even if this one does not.
        with torch.inference_mode(False):
            places = torch.arange(rows * length, dtype=torch.int32, device=device)
            first = places - places % max(length, 1)
            return cls(first, first + length, rows)

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> Packing:
        """Returns it without waiting for the device. Tokens after the last document form one more document."""
        places = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens, places, right=True)
        edges = F.pad(F.pad(cu_seqlens, (1, 0)), (0, 1), value=tokens)
        return cls(edges[document], edges[document + 1], edges=edges)

    @classmethod
    def of_starts(cls, starts: Tensor) -> Packing:
        """Returns the packing, given whether a document starts at each token, bool [tokens].

        Waits for the device only if attention may use a library that requires `edges`.
        """
        places = torch.arange(len(starts), dtype=torch.int32, device=starts.device)
        first = torch.where(starts, places, 0).cummax(0).values
        # The end of a token's document is the first start after the token.
        later = F.pad(torch.where(starts, places, len(starts))[1:], (0, 1), value=len(starts))
        end, edges = later.flip(0).cummin(0).values.flip(0), None
        if dispatch.takes_edges(starts.device):
            edges = F.pad((first == places).nonzero().flatten().int(), (0, 1), value=len(starts))
        return cls(first, end, edges=edges)

    def bounds(self) -> list[int]:
        """Returns the first token of each document; waits for the device."""
        return list(dict.fromkeys(self.first.tolist()))
