"""Storage of cached latents and rotated keys; the only module that depends on its memory layout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ictx.errors import UserError
from ictx.kernels import layout
from ictx.model.cache import Slots, bytes_per_token, quantisable
from ictx.model.config import ModelConfig


class LatentStorage:
    """Normed latents and rotated keys of a batch of sequences, preallocated for `max_length` tokens of each.

    The cache of a layer is one tensor (blocks, block_size, kv_lora_rank + qk_rope_head_dim), the latent first. Row
    `b` of `block_tables`, int32 of shape (batch, blocks of a sequence), lists the blocks of sequence `b` in order;
    blocks are allocated as a sequence grows and freed by `release`. Without `block_size` the cache is contiguous: one
    block of `max_length` tokens per sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        *,
        block_size: int | None = None,
        blocks: int | None = None,
        dtype: torch.dtype = torch.float32,
        stored: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates the cache.

        Args:
            block_size: tokens per block; None: a contiguous cache.
            blocks: total number of blocks; default: enough for `max_length` tokens of every sequence.
            dtype: dtype of the values; if latents are quantised, that of the keys, which are not.
            stored: dtype of quantised latents, int8 or fp8 (see `kernels.layout`); requires blocks and a 16-bit dtype.

        Raises:
            ValueError: a size is less than 1, or `stored` is given without blocks or a 16-bit dtype.
            UserError: the model's latents cannot be quantised.
        """
        if batch < 1 or max_length < 1:
            raise ValueError(f"batch is {batch} and max_length {max_length}: expected 1 or more")
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size is {block_size}: expected 1 or more")
        if stored:
            if stored not in layout.QUANTISED or block_size is None or dtype.itemsize != 2:
                raise ValueError(
                    f"stored is {stored}, block_size {block_size} and dtype {dtype}: expected one of "
                    f"{', '.join(layout.QUANTISED)}, a block size, and 16 bits"
                )
            if not quantisable(config):
                raise UserError(
                    f"latents of {config.kv_lora_rank} and keys of {config.qk_rope_head_dim} values: only those of "
                    f"{layout.LATENT} and {layout.ROPE} can be quantised"
                )
        self.config, self.max_length, self.dtype, self.stored = config, max_length, dtype, stored
        self.contiguous = block_size is None
        self.block_size = block_size or max_length
        per_sequence = -(-max_length // self.block_size)
        count = blocks if blocks is not None else batch * per_sequence
        shape = (count, self.block_size, layout.ROW_BYTES if stored else config.cache_width)
        held = torch.uint8 if stored else dtype
        self.layers = [torch.zeros(shape, dtype=held, device=device) for _ in range(config.num_hidden_layers)]
        self.block_tables = torch.zeros((batch, per_sequence), dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        # A host copy of the lengths: reading them from the device would synchronise in every step.
        self._lengths = [0] * batch
        self._owned: list[list[int]] = [[] for _ in range(batch)]
        self._free = list(range(count - 1, -1, -1))
        if self.contiguous and count == batch:
            # Sequence b is block b, so that all sequences are one view of the layer.
            for row in range(batch):
                self._grow(row, max_length)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self._lengths)

    @property
    def longest(self) -> int:
        """Length of the longest sequence, in tokens."""
        return max(self._lengths)

    @property
    def direct(self) -> bool | None:
        """Whether block b is sequence b, so that kernels need no table; None if they do not support the block size."""
        if self.contiguous and self.layers[0].shape[0] == self.batch:
            return True
        return False if self.block_size & (self.block_size - 1) == 0 else None

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token, in all layers."""
        return bytes_per_token(self.config, self.dtype, self.stored)

    @property
    def bytes_allocated(self) -> int:
        """Bytes allocated for the cache, regardless of the tokens in it."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers)

    def reserve(self, tokens: int, mask_bs: Tensor | None = None) -> Slots:
        """Returns the slots of `tokens` more tokens per sequence, without those that are padding (0) in `mask_bs`.

        Raises UserError if a sequence exceeds `max_length` or there are too few free blocks; the cache is unchanged.
        """
        batch, device = self.batch, self.lengths.device
        if mask_bs is None:
            counts, real_bs = [tokens] * batch, None
            positions_bs = self.lengths[:, None] + torch.arange(tokens, device=device)
        else:
            real_bs = mask_bs.to(device=device, dtype=torch.bool)
            counts = [int(count) for count in real_bs.sum(1).tolist()]
            # Padding gets the position of the token before it, or of the next: any valid one works.
            positions_bs = (self.lengths[:, None] + (real_bs.cumsum(1) - 1).clamp(min=0)).clamp(max=self.max_length - 1)
        lengths = [old + new for old, new in zip(self._lengths, counts, strict=True)]
        if max(lengths) > self.max_length:
            raise UserError(
                f"a sequence of {max(lengths)} tokens does not fit the cache: its limit is {self.max_length}"
            )
        needed = [self._blocks_for(length) - len(self._owned[row]) for row, length in enumerate(lengths)]
        if sum(max(count, 0) for count in needed) > len(self._free):
            raise UserError(
                f"the cache has {len(self._free)} free blocks of {self.block_size} tokens: too few for this batch"
            )
        for row, length in enumerate(lengths):
            self._grow(row, length)
        lengths_b = self.lengths + tokens if real_bs is None else self.lengths + real_bs.sum(1)
        return Slots(positions_bs, real_bs, lengths_b, lengths)

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def _grow(self, row: int, length: int) -> None:
        """Allocates the blocks that a sequence of this length needs."""
        owned = self._owned[row]
        new = [self._free.pop() for _ in range(self._blocks_for(length) - len(owned))]
        if new:
            first = len(owned)
            self.block_tables[row, first : first + len(new)] = torch.tensor(new, dtype=torch.int32)
            owned.extend(new)

    def write(self, layer: int, entries_bsc: Tensor, slots: Slots) -> None:
        """Writes the slots' entries of a layer: normed latent and rotated key, (batch, tokens, cache_width)."""
        places_bs = self.places(slots.positions_bs)
        entries_bsc = entries_bsc.to(self.dtype)
        if self.stored:
            self._write_quantised(layer, entries_bsc, places_bs, slots.real_bs)
            return
        flat = self.layers[layer].view(-1, self.config.cache_width)
        if slots.real_bs is None:
            flat.index_copy_(0, places_bs.flatten(), entries_bsc.flatten(0, 1))
        else:
            flat.index_copy_(0, places_bs[slots.real_bs], entries_bsc[slots.real_bs])

    def places(self, positions_bs: Tensor) -> Tensor:
        """Returns the slots of tokens at these positions of each sequence: block × block_size + row, int64."""
        blocks_bs = self.block_tables.gather(1, positions_bs // self.block_size).long()
        return blocks_bs * self.block_size + positions_bs % self.block_size

    def _write_quantised(self, layer: int, entries_bsc: Tensor, places_bs: Tensor, real_bs: Tensor | None) -> None:
        """Quantises entries and writes them to the slots `places_bs`."""
        assert self.stored
        if real_bs is None:
            entries_nc, places_n = entries_bsc.flatten(0, 1), places_bs.flatten()
        else:
            entries_nc, places_n = entries_bsc[real_bs], places_bs[real_bs]
        where = places_n // self.block_size, places_n % self.block_size
        latents, scales, keys = layout.parts(self.layers[layer], self.stored, self.dtype)
        values, scale = layout.quantise_groups(entries_nc[:, : layout.LATENT], self.stored)
        latents.view(torch.uint8)[where] = values.view(torch.uint8)
        scales[where] = scale
        keys[where] = entries_nc[:, layout.LATENT :]

    def commit(self, slots: Slots) -> None:
        """Updates the lengths, once every layer has written the slots' tokens."""
        self.lengths = slots.lengths_b
        if slots.real_bs is None:
            self._lengths = [length + slots.positions_bs.shape[1] for length in self._lengths]
        else:
            self._lengths = [int(length) for length in slots.lengths_b.tolist()]

    def read(self, layer: int, length: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the first `length` entries of every sequence, `chunk` at a time, each with its first position.

        The tensors (batch, up to chunk, cache_width) are views of a contiguous cache and copies of a paged one. Entries
        after the end of a shorter sequence are finite but undefined.
        """
        if self.direct:
            for start in range(0, length, chunk):
                yield start, self.layers[layer][:, start : min(start + chunk, length)]
            return
        step = max(chunk // self.block_size, 1)
        for first in range(0, self._blocks_for(length), step):
            tables = self.block_tables[:, first : first + step].long()
            start = first * self.block_size
            blocks = self.layers[layer][tables]
            if self.stored:
                blocks = layout.dequantise(blocks.flatten(0, 1), self.stored, self.dtype)
                blocks = blocks.view(*tables.shape, *blocks.shape[1:])
            yield start, blocks.flatten(1, 2)[:, : length - start]

    def sequence(self, layer: int, row: int) -> tuple[Tensor, Tensor | None]:
        """Returns a layer's blocks and a sequence's block table; if `direct`, the sequence's block and None."""
        if self.direct:
            return self.layers[layer][row : row + 1], None
        return self.layers[layer], self.block_tables[row]

    def release(self, row: int) -> None:
        """Empties a sequence and frees its blocks."""
        self.lengths = self.lengths.clone()
        self.lengths[row] = 0
        self._lengths[row] = 0
        if not self.contiguous:
            self._free.extend(reversed(self._owned[row]))
            self._owned[row] = []
            self.block_tables[row] = 0
