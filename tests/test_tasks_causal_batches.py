import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_jax.data.batches import (
    TokenSequences,
    bucket_lengths,
    eval_batches,
    train_batches,
)
from sparse_jax.data.packing import pack_rows, segment_arrays
from sparse_jax.errors import InputError

packed_or_not = pytest.mark.parametrize("is_packed", [False, True])


def sequences_of(lengths, *, max_length=64, is_packed=False):
    """Returns sequences that count from 100 times their number; half are targets."""
    ids = [np.arange(n, dtype=np.int32) + 100 * i for i, n in enumerate(lengths)]
    marks = [np.arange(n) >= max(n // 2, 1) for n in lengths]
    return TokenSequences(ids, marks, max_length, 9, is_packed=is_packed)


def random_lengths(n, most=64):
    return np.random.default_rng(0).integers(2, most + 1, n).tolist()


def flat(batch):
    """Returns a batch without the axis of its parts."""
    return {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}


def read_back(batch):
    """Yields the tokens and weights of every segment of a batch."""
    for row in range(len(batch["input_ids"])):
        segments = batch.get("segment_ids", batch["attention_mask"])[row]
        for number in range(1, segments.max() + 1):
            here = segments == number
            yield batch["input_ids"][row][here], batch["weights"][row][here]


def seen(batches):
    """Returns the numbers of the sequences that have weight, batch after batch."""
    return [
        int(ids[0]) // 100
        for batch in batches
        for ids, weights in read_back(flat(batch))
        if weights.any()
    ]


def context_loss(ids):
    """Returns a loss of each token that depends on all tokens before it."""
    return np.sin(np.cumsum(ids) + np.arange(len(ids)) ** 2)


def test_a_padded_batch_has_these_arrays():
    (batch,) = eval_batches(sequences_of([3, 17]), 2)
    assert set(batch) == {"input_ids", "attention_mask", "weights"}
    assert batch["input_ids"].shape == (2, 32)
    assert batch["input_ids"][0, :5].tolist() == [0, 1, 2, 9, 9]
    assert batch["attention_mask"][0, :5].tolist() == [1, 1, 1, 0, 0]
    assert batch["weights"][0, :5].tolist() == [0, 1, 1, 0, 0]
    dtypes = [batch[name].dtype for name in ("input_ids", "attention_mask", "weights")]
    assert dtypes == [np.int32, np.int32, np.float32]


def test_a_packed_batch_has_these_arrays():
    sequences = sequences_of([3, 5, 2], max_length=8, is_packed=True)
    (batch,) = eval_batches(sequences, 2)
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[100, 101, 102, 103, 104, 0, 1, 2], [200, 201] + [9] * 6],
        "attention_mask": [[1] * 8, [1, 1] + [0] * 6],
        "weights": [[0, 0, 1, 1, 1, 0, 1, 1], [0, 1] + [0] * 6],
        "segment_ids": [[1] * 5 + [2] * 3, [1, 1] + [0] * 6],
        "positions": [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1] + [0] * 6],
    }
    assert {x.dtype for name, x in batch.items() if name != "weights"} == {
        np.dtype(np.int32)
    }


@packed_or_not
@pytest.mark.parametrize("num_sequences", [1, 7, 8, 9, 450])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_epoch_has_every_sequence_once(num_sequences, accumulate, is_packed):
    sequences = sequences_of(random_lengths(num_sequences), is_packed=is_packed)
    batches = train_batches(sequences, 8, seed=1, epoch=2, accumulate=accumulate)
    assert sorted(seen(batches)) == list(range(num_sequences))
    assert len(batches) == len(list(batches))


@packed_or_not
def test_evaluation_has_every_sequence_once(is_packed):
    sequences = sequences_of(random_lengths(99), is_packed=is_packed)
    found = seen(eval_batches(sequences, 8))
    assert (sorted(found) if is_packed else found) == list(range(99))


@packed_or_not
def test_every_target_has_weight_once(is_packed):
    sequences = sequences_of(random_lengths(99), is_packed=is_packed)
    options = {"seed": 0, "epoch": 0}
    batches = list(train_batches(sequences, 8, **options))
    assert sum(b["weights"].sum() for b in batches) == sequences.num_targets
    for batch in batches:
        assert not (batch["weights"] * (1 - batch["attention_mask"])).any()
        assert not batch["weights"][:, 0].any()
        if is_packed:
            assert not batch["weights"][batch["positions"] == 0].any()


def test_packing_does_not_change_the_loss():
    sums = []
    for is_packed in (False, True):
        sequences = sequences_of(random_lengths(200), is_packed=is_packed)
        batches = train_batches(sequences, 8, seed=0, epoch=0)
        parts = [part for batch in batches for part in read_back(batch)]
        sums.append(sum((weights * context_loss(ids)).sum() for ids, weights in parts))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)  # float32 weights, other order


def test_positions_count_inside_each_segment():
    sequences = sequences_of(random_lengths(200), is_packed=True)
    batches = train_batches(sequences, 8, seed=0, epoch=0)
    for batch in batches:
        # A sequence counts from 100 times its number, so the rest is the position.
        inside = batch["segment_ids"] > 0
        assert (batch["positions"] == batch["input_ids"] % 100)[inside].all()
        assert ((batch["segment_ids"] > 0) == batch["attention_mask"]).all()
        assert not batch["positions"][~inside].any()


@packed_or_not
def test_there_are_few_shapes(is_packed):
    sequences = sequences_of(random_lengths(500), is_packed=is_packed)
    shapes = {
        batch["input_ids"].shape
        for epoch in range(3)
        for batch in train_batches(sequences, 8, seed=0, epoch=epoch)
    }
    assert {rows for rows, _ in shapes} == {8}
    lengths = {length for _, length in shapes}
    assert lengths == {64} if is_packed else lengths <= {*bucket_lengths(64)}


def test_grouped_by_length_similar_sequences_share_a_batch():
    sequences = sequences_of(random_lengths(800))
    fills = [
        np.mean([b["attention_mask"].mean() for b in batches])
        for batches in (
            train_batches(sequences, 8, seed=0, epoch=0, group_by_length=grouped)
            for grouped in (True, False)
        )
    ]
    assert fills[0] > 1.3 * fills[1]


@packed_or_not
def test_the_order_depends_on_seed_and_epoch_only(is_packed):
    sequences = sequences_of(random_lengths(100), is_packed=is_packed)

    def order(seed, epoch):
        options = {"seed": seed, "epoch": epoch}
        return tuple(seen(train_batches(sequences, 8, **options)))

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert order(1, 1) == orders[1, 1]


@packed_or_not
def test_every_epoch_has_as_many_batches(is_packed):
    sequences = sequences_of(random_lengths(500), is_packed=is_packed)
    epochs = [train_batches(sequences, 4, seed=0, epoch=epoch) for epoch in range(20)]
    assert len({len(batches) for batches in epochs}) == 1
    sizes = [Counter(len(b.rows[i]) for rows in b.plan for i in rows) for b in epochs]
    assert all(size == sizes[0] for size in sizes)


@packed_or_not
@pytest.mark.parametrize("start", range(4))
def test_resuming_gives_the_tail_of_the_epoch(start, is_packed):
    sequences = sequences_of([33] * 20, is_packed=is_packed)
    options = {"seed": 3, "epoch": 1}
    whole = list(train_batches(sequences, 8, **options))
    tail = train_batches(sequences, 8, **options, start=start)
    assert len(tail) == 3 - start
    for batch, expected in zip(tail, whole[start:], strict=True):
        assert all((batch[name] == expected[name]).all() for name in expected)


@packed_or_not
def test_parts_of_a_batch_have_a_leading_axis(is_packed):
    sequences = sequences_of(random_lengths(50), is_packed=is_packed)
    options = {"seed": 0, "epoch": 0}
    for parts, whole in zip(
        train_batches(sequences, 8, **options, accumulate=2),
        train_batches(sequences, 8, **options),
        strict=True,
    ):
        assert {x.shape[:2] for x in parts.values()} == {(2, 4)}
        assert all((parts[k].reshape(whole[k].shape) == whole[k]).all() for k in whole)


@packed_or_not
def test_the_last_batch_is_filled_with_rows_of_weight_zero(is_packed):
    batches = train_batches(
        sequences_of([40] * 11, is_packed=is_packed), 8, seed=0, epoch=0
    )
    *_, last = batches
    assert last["weights"].sum(axis=1).tolist() == [20] * 3 + [0] * 5
    # A filler has tokens: attention over none would be NaN, and 0 * NaN is NaN.
    assert last["attention_mask"].sum(axis=1).tolist() == [40] * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be positive, got 0."),
        ({"accumulate": 3}, "`accumulate` must divide the batch size 8, got 3."),
        ({"seed": -1}, "`seed` must not be negative, got -1."),
        ({"epoch": -1}, "`epoch` must not be negative, got -1."),
        ({"start": 4}, "`start` must be in [0, 3], the batches of an epoch, got 4."),
    ],
)
@packed_or_not
def test_a_number_outside_its_range_is_an_error(options, message, is_packed):
    arguments = {"batch_size": 8, "seed": 0, "epoch": 0} | options
    with pytest.raises(InputError, match=re.escape(message)):
        train_batches(sequences_of([40] * 20, is_packed=is_packed), **arguments)


@given(
    st.lists(st.integers(1, 32), max_size=60),
    st.one_of(st.none(), st.integers(0, 9)),
)
@settings(deadline=None, derandomize=True)
def test_packing_keeps_every_sequence_and_every_bound(lengths, seed):
    random = None if seed is None else np.random.default_rng(seed)
    rows = pack_rows(np.array(lengths, int), 32, random)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < total <= 32 for total in sums)
    # No two rows would fit into one.
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > 32


def test_packing_leaves_little_room():
    lengths = np.random.default_rng(1).integers(20, 400, 2000)
    rows = pack_rows(lengths, 1024, np.random.default_rng(0))
    assert len(rows) <= lengths.sum() / 1024 + 2


def test_packing_a_hundred_thousand_takes_seconds():
    lengths = np.random.default_rng(2).integers(1, 2049, 100_000)
    rows = pack_rows(lengths, 2048)
    assert len(rows) < 1.01 * lengths.sum() / 2048


def test_a_sequence_longer_than_a_row_is_an_error():
    with pytest.raises(InputError, match="hold the longest sequence, 9 tokens, got 8"):
        pack_rows(np.array([9, 2]), 8)


def test_no_sequence_of_equal_length_has_a_fixed_partner():
    partners = set()
    for seed in range(60):
        rows = pack_rows(np.array([6] * 6 + [2] * 6), 8, np.random.default_rng(seed))
        partners |= {int(max(row)) for row in rows if 0 in row}
    assert partners == {6, 7, 8, 9, 10, 11}


def test_segments_never_share_an_attention():
    arrays = segment_arrays([[np.zeros(2), np.zeros(1)], [np.zeros(3)]], 4)
    ids = arrays["segment_ids"]
    attends = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, None, :]
    assert attends[0].astype(int).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 0],
    ]
