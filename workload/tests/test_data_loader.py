"""The loader yields every token once per epoch, in an order independent of resumes and the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ictx.data.loader import Batch, Batches
from ictx.data.shards import Shard, TokenArray
from ictx.data.stream import KEPT, Stream, shuffled
from ictx.errors import UserError

SIZES = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=4).filter(
    lambda shards: sum(map(sum, shards)) > 60
)
"""Lengths of the documents in each shard."""
SEED = st.integers(0, 2**64 - 1)


def array(sizes: Sequence[Sequence[int]]) -> TokenArray:
    """Returns data with tokens 0, 1, 2, … over all shards, so that each identifies its document and position."""
    shards, first = [], 0
    for documents in sizes:
        total = sum(documents)
        shards.append(Shard(np.arange(first, first + total), np.cumsum(documents)))
        first += total
    return TokenArray(shards, {})


def documents_of(data: TokenArray) -> dict[int, range]:
    """Returns each document's range of tokens by its first token."""
    result = {}
    for shard in data.shards:
        starts = [0, *shard.ends[:-1]]
        for start, end in zip(starts, shard.ends, strict=True):
            tokens = shard.tokens[start:end]
            result[int(tokens[0])] = range(int(tokens[0]), int(tokens[-1]) + 1)
    return result


def ranks_of(data: TokenArray, length: int, batch: int, ranks: int, seed: int) -> list[Batches]:
    return [Batches(data, length, batch, rank, ranks, seed) for rank in range(ranks)]


def step(loaders: Sequence[Batches]) -> Batch:
    """Returns the global batch: the ranks' parts in order of rank."""
    parts = [loader.next() for loader in loaders]
    names = ("input_ids", "labels", "position_ids", "document_ids")
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def stream_of(data: TokenArray, seed: int, count: int) -> Tensor:
    """Returns the first tokens of the stream of shuffled documents."""
    return torch.from_numpy(Stream(data, 1, seed).read(0, count)[0])


def windows_of(data: TokenArray, length: int, seed: int, count: int) -> dict[tuple[int, ...], list[int]]:
    """Returns the first windows of the stream before they are shuffled, each with its numbers."""
    tokens = stream_of(data, seed, count * length + 1).tolist()
    result: dict[tuple[int, ...], list[int]] = {}
    for number in range(count):
        result.setdefault(tuple(tokens[number * length : (number + 1) * length + 1]), []).append(number)
    return result


@given(sizes=SIZES, seed=SEED)
@settings(max_examples=60, deadline=None)
def test_each_epoch_of_the_stream_has_every_document_whole_and_once(sizes: list[list[int]], seed: int) -> None:
    data = array(sizes)
    documents, total = documents_of(data), len(data)
    orders = []
    for epoch in range(3):
        tokens, lengths = Stream(data, 1, seed).read(epoch * total, total)
        starts = np.cumsum(lengths) - lengths
        assert sorted(tokens[starts]) == sorted(documents)
        for start, length in zip(starts, lengths, strict=True):
            assert tokens[start : start + length].tolist() == list(documents[int(tokens[start])])
        orders.append(tokens[starts].tolist())
    if len(documents) > 20:
        assert orders[0] != orders[1] != orders[2], "each epoch has another order"


@given(sizes=SIZES, seed=SEED, position=st.integers(0, 500), count=st.integers(1, 200))
@settings(max_examples=80, deadline=None)
def test_the_stream_reads_the_same_from_any_place(sizes: list[list[int]], seed: int, position: int, count: int) -> None:
    data = array(sizes)
    tokens, lengths = Stream(data, 1, seed).read(position, count)
    assert tokens.tolist() == stream_of(data, seed, position + count)[position:].tolist()
    assert lengths.sum() == count
    assert (lengths > 0).all()


@given(
    sizes=SIZES,
    seed=SEED,
    length=st.integers(1, 12),
    batch=st.integers(1, 2),
    ranks=st.sampled_from([1, 2, 4]),
    stops=st.lists(st.integers(0, 6), max_size=4),
)
@settings(max_examples=80, deadline=None)
def test_an_interrupted_run_has_the_stream_of_an_uninterrupted_one(
    sizes: list[list[int]], seed: int, length: int, batch: int, ranks: int, stops: list[int]
) -> None:
    """At each stop all ranks are recreated from the state of the first one."""
    data = array(sizes)
    if data.windows(length) < batch * ranks:
        return
    whole = ranks_of(data, length, batch, ranks, seed)
    expected = [step(whole) for _ in range(sum(stops) + 2)]
    seen: list[Batch] = []
    loaders = ranks_of(data, length, batch, ranks, seed)
    for stop in [*stops, 2]:
        seen += [step(loaders) for _ in range(stop)]
        state = loaders[0].state_dict()
        assert all(isinstance(value, int) for value in state.values())
        assert all(loader.state_dict() == state for loader in loaders), "all ranks must have the same state"
        loaders = ranks_of(data, length, batch, ranks, seed)
        for loader in loaders:
            loader.load_state_dict(state)
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.position_ids, theirs.position_ids)
    # For any number of ranks, the batch must equal that of a single rank.
    single = Batches(data, length, 1, 0, 1, seed)
    for row in torch.cat([taken.input_ids for taken in seen]):
        assert torch.equal(row, single.next().input_ids[0])


@given(
    sizes=SIZES,
    seed=SEED,
    length=st.integers(1, 9),
    runs=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=6),
)
@settings(max_examples=80, deadline=None)
def test_no_document_is_lost_or_repeated_when_the_world_changes(
    sizes: list[list[int]], seed: int, length: int, runs: list[tuple[int, int, int]]
) -> None:
    """Each start has another number of ranks, batch size and number of steps."""
    data = array(sizes)
    state = Batches(data, length, 1, 0, 1, seed).state_dict()
    rows: list[tuple[int, ...]] = []
    while len(rows) * length < 2 * len(data):
        for ranks, batch, steps in runs:
            if data.windows(length) < batch * ranks:
                return
            loaders = ranks_of(data, length, batch, ranks, seed)
            for loader in loaders:
                loader.load_state_dict(state)
            for _ in range(steps):
                taken = step(loaders)
                assert torch.equal(taken.input_ids[:, 1:], taken.labels[:, :-1])
                rows += map(tuple, torch.cat([taken.input_ids, taken.labels[:, -1:]], 1).tolist())
            state = loaders[-1].state_dict()
    total = len(data)
    for epochs in (1, 2):
        # The last window of an epoch continues with documents of the next epoch.
        count = -(-epochs * total // length)
        inputs = [token for row in rows[:count] for token in row[:-1]]
        assert sorted(inputs) == sorted(stream_of(data, seed, count * length).tolist())
        assert all(inputs.count(token) >= epochs for token in range(total))
        assert len(inputs) - epochs * total < length
    expected = windows_of(data, length, seed, len(rows) + data.windows(length) + 1)
    numbers = [expected[row].pop(0) for row in rows]
    assert len(set(numbers)) == len(numbers), "every window once"


@given(sizes=SIZES, seed=SEED, length=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_positions_and_documents_follow_the_documents(sizes: list[list[int]], seed: int, length: int) -> None:
    data = array(sizes)
    documents = documents_of(data)
    owner = {token: first for first, tokens in documents.items() for token in tokens}
    loader = Batches(data, length, 1, 0, 1, seed)
    for _ in range(4):
        batch = loader.next()
        for name in ("input_ids", "labels", "position_ids", "document_ids"):
            assert getattr(batch, name).dtype == torch.int64
            assert getattr(batch, name).shape == (1, length)
        tokens, positions, numbers = (x[0].tolist() for x in (batch.input_ids, batch.position_ids, batch.document_ids))
        position, number = 0, 0
        for place, token in enumerate(tokens):
            if place and token in documents:
                position, number = 0, number + 1
            assert owner[token] == owner[tokens[place - position]]
            assert positions[place] == position
            assert numbers[place] == number
            position += 1


def test_a_long_document_does_not_fill_batch_after_batch() -> None:
    data = array([[20_000, *[20] * 1000]])
    loader = Batches(data, 20, 40, 0, 1, 0)
    shares = [(loader.next().input_ids < 20_000).float().mean().item() for _ in range(50)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    assert min(shares) > 0
    assert max(shares) < 1


def test_a_million_tokens_are_one_sequence() -> None:
    length = 1 << 20
    data = array([[7] * 50_000, [900_000], [3, 600_000]])
    batch = Batches(data, length, 1, 0, 1, 3).next()
    assert batch.input_ids.shape == (1, length)
    row = tuple(torch.cat([batch.input_ids[0], batch.labels[0, -1:]]).tolist())
    assert row in windows_of(data, length, 3, 2)
    assert torch.equal(batch.labels[0, :-1], batch.input_ids[0, 1:])
    starts = (batch.position_ids[0] == 0).nonzero()[:, 0]
    assert torch.equal(batch.document_ids[0, starts], torch.arange(len(starts)))


def test_orders_are_fixed_for_good() -> None:
    """A checkpoint must resume with the same data in later releases: the order, computed without NumPy, is fixed."""
    assert shuffled(10, 0, 0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert shuffled(10, 0, 1).tolist() == [9, 0, 6, 7, 4, 3, 2, 1, 8, 5]
    assert shuffled(10, 1, 0).tolist() == [9, 8, 7, 4, 2, 0, 3, 6, 5, 1]


def test_orders_are_even() -> None:
    """Over many seeds, every number is at every position about equally often."""
    counts = np.zeros((8, 8))
    for seed in range(4000):
        counts[np.arange(8), shuffled(8, seed, 5)] += 1
    # Expected value 500, standard deviation 21.
    assert (abs(counts - 500) < 110).all(), counts


def test_neighbours_in_the_corpus_are_apart_in_the_stream() -> None:
    order = shuffled(10_000, 1)
    assert sorted(order) == list(range(10_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_memory_holds_the_order_of_few_shards() -> None:
    data = array([[5] * 10] * 30)
    loader = Batches(data, 7, 4, 0, 1, 0)
    stream = loader.stream
    assert isinstance(stream, Stream)
    made = 0
    while loader.taken * 7 < 3 * len(data):
        before = set(stream._kept)
        loader.next()
        made += len(set(stream._kept) - before)
        assert len(stream._kept) <= KEPT
    assert made < 3 * 30 * 2.5, "each order is computed about once per epoch"


def test_another_order_is_no_resume() -> None:
    data = array([[5] * 40])
    assert not torch.equal(stream_of(data, 1, 100), stream_of(data, 2, 100))
    state = Batches(data, 4, 1, 0, 1, 1).state_dict()
    with pytest.raises(UserError, match=r"train\.seed is 2, but the checkpoint's data has the order of 1"):
        Batches(data, 4, 1, 0, 1, 2).load_state_dict(state)
    with pytest.raises(UserError, match=r"train\.sequence_length is 5, but the checkpoint's data has the order of 4"):
        Batches(data, 5, 1, 0, 1, 1).load_state_dict(state)


def test_too_little_data_for_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="has 3 windows of 4 tokens, but a global batch takes 8"):
        Batches(array([[7, 6]]), 4, 4, 0, 2, 0)
