import re
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from sparse_jax.data.batches import Encoded, bucket_lengths, eval_batches, train_batches
from sparse_jax.data.examples import Examples
from sparse_jax.data.tokenizer import encode, load_tokenizer
from sparse_jax.errors import InputError

grouped_or_not = pytest.mark.parametrize("grouped", [True, False])

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "##d"]
VOCABULARY = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with a BERT tokenizer of ten word pieces."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizer(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


def examples_of(text_a, text_b=None):
    return Examples(text_a, text_b, np.arange(len(text_a), dtype=np.int32))


def encoded_of(lengths, *, max_length=128):
    """Returns examples of given lengths; tokens and label are the example's number."""
    ids = [np.full(n, i, np.int32) for i, n in enumerate(lengths)]
    return Encoded(ids, None, np.arange(len(lengths), dtype=np.int32), max_length, 0)


def random_lengths(n, most=128):
    return np.random.default_rng(0).integers(2, most + 1, n).tolist()


def seen(batches):
    """Returns the numbers of the examples of weight 1, in the order of the batches."""
    return [
        int(label)
        for batch in batches
        for label, weight in zip(
            batch["labels"].ravel(), batch["weights"].ravel(), strict=True
        )
        if weight == 1
    ]


def test_a_single_text_becomes_ids(tokenizer):
    encoded = encode(examples_of(["A bd", "x"]), tokenizer, max_length=8, positions=8)
    assert [ids.tolist() for ids in encoded.input_ids] == [[2, 5, 6, 9, 3], [2, 1, 3]]
    assert encoded.token_type_ids is not None
    assert encoded.token_type_ids[0].tolist() == [0] * 5
    assert encoded.pad_id == 0
    assert len(encoded) == 2


def test_a_pair_has_two_types_and_loses_tokens_of_the_longer_text(tokenizer):
    examples = examples_of(["a b c d a b"], ["d c"])
    encoded = encode(examples, tokenizer, max_length=8, positions=8)
    assert encoded.input_ids[0].tolist() == [2, 5, 6, 7, 3, 8, 7, 3]
    assert encoded.token_type_ids is not None
    assert encoded.token_type_ids[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_no_example_is_longer_than_max_length(tokenizer):
    texts = ["a " * n for n in range(30)]
    encoded = encode(examples_of(texts), tokenizer, max_length=16, positions=16)
    lengths = [len(ids) for ids in encoded.input_ids]
    assert lengths == [min(n + 2, 16) for n in range(30)]


@pytest.mark.parametrize(
    ("text_a", "text_b", "num_truncated"),
    [
        # With [CLS] and [SEP], six words are eight tokens.
        (["a b c a b c", "a b c a b c d", "a"], None, 1),
        (["a b c a b c", "a"], None, 0),
        # A pair has a second [SEP].
        (["a b c", "a b c", "a"], ["a b", "a b c", "a b c a b c"], 2),
    ],
)
def test_examples_that_lose_tokens_are_counted(
    tokenizer, text_a, text_b, num_truncated
):
    encoded = encode(examples_of(text_a, text_b), tokenizer, max_length=8, positions=8)
    assert encoded.num_truncated == num_truncated
    assert max(map(len, encoded.input_ids)) == 8


def test_many_examples_keep_their_order(tokenizer):
    texts = ["a " * (n % 7) for n in range(5000)]
    encoded = encode(examples_of(texts, texts), tokenizer, max_length=16, positions=16)
    lengths = [len(ids) for ids in encoded.input_ids]
    assert lengths == [2 * (n % 7) + 3 for n in range(5000)]


def test_a_tokenizer_without_types_gives_none(tokenizer):
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_input_names=["input_ids", "attention_mask"],
    )
    encoded = encode(examples_of(["a"]), plain, max_length=8, positions=8)
    assert encoded.token_type_ids is None
    assert encoded.pad_id == 0
    (batch,) = eval_batches(encoded, 1)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "weights"}


@pytest.mark.parametrize(
    ("text_b", "max_length", "message"),
    [
        (None, 33, "must be at most the 32 positions of the model, got 33."),
        (None, 2, "must be at least 3, the special tokens and one of each text, got 2"),
        (["a"], 4, "must be at least 5, the special tokens and one of each text, got"),
    ],
)
def test_a_length_that_the_model_cannot_read_is_an_error(
    tokenizer, text_b, max_length, message
):
    examples = examples_of(["a"], text_b)
    with pytest.raises(InputError, match=f"`max_length` {message}"):
        encode(examples, tokenizer, max_length=max_length, positions=32)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(InputError, match="must hold a tokenizer .tokenizer.json, "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", '{"version": ', '{"model": {}}', "[]"])
def test_a_torn_tokenizer_is_an_error(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="must hold a whole tokenizer: "):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("max_length", "lengths"),
    [
        (512, (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)),
        (100, (16, 32, 48, 64, 96, 100)),
        (16, (16,)),
        (17, (16, 17)),
        (5, (5,)),
        (1024, (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)),
    ],
)
def test_buckets_end_at_max_length(max_length, lengths):
    assert bucket_lengths(max_length) == lengths


def test_a_batch_is_padded_to_the_next_bucket():
    (batch,) = eval_batches(encoded_of([3, 17]), 2)
    assert batch["input_ids"].shape == (2, 32)
    assert batch["attention_mask"].sum(axis=1).tolist() == [3, 17]
    assert batch["attention_mask"][0, :4].tolist() == [1, 1, 1, 0]
    assert batch["input_ids"][1].tolist() == [1] * 17 + [0] * 15
    dtypes = {name: array.dtype for name, array in batch.items()}
    assert dtypes.pop("weights") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int32)}


def test_padding_is_the_pad_token_but_masks_and_types_are_zero():
    ids = [np.array([7, 8], np.int32)]
    types = [np.array([1, 1], np.int32)]
    (batch,) = eval_batches(Encoded(ids, types, np.zeros(1, np.int32), 4, 9), 1)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 9]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0]]


def test_values_keep_their_type():
    encoded = replace(encoded_of([3]), labels=np.array([0.5], np.float32))
    (batch,) = eval_batches(encoded, 1)
    assert batch["labels"].dtype == np.float32
    assert batch["labels"].tolist() == [0.5]


@grouped_or_not
@pytest.mark.parametrize("num_examples", [1, 7, 8, 9, 450])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_epoch_has_every_example_once(num_examples, accumulate, grouped):
    encoded = encoded_of(random_lengths(num_examples))
    options = {"seed": 1, "epoch": 2, "accumulate": accumulate}
    options["group_by_length"] = grouped
    batches = train_batches(encoded, 8, **options)
    assert sorted(seen(batches)) == list(range(num_examples))
    assert len(batches) == len(list(batches)) == -(-num_examples // 8)


@pytest.mark.parametrize("num_examples", [1, 8, 9, 100])
def test_evaluation_has_every_example_once_in_order(num_examples):
    encoded = encoded_of(random_lengths(num_examples))
    batches = eval_batches(encoded, 8)
    assert seen(batches) == list(range(num_examples))
    assert len(batches) == -(-num_examples // 8)


def test_the_last_batch_is_filled_with_an_example_of_weight_zero():
    *_, last = train_batches(encoded_of([5] * 11), 8, seed=0, epoch=0)
    assert last["weights"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert (last["labels"][3:] == last["labels"][0]).all()
    # A filler has tokens: attention over none would be NaN, and 0 * NaN is NaN.
    assert last["attention_mask"].sum(axis=1).tolist() == [5] * 8


def test_there_are_no_more_shapes_than_buckets():
    encoded = encoded_of(random_lengths(1000), max_length=128)
    batches = [b for e in range(3) for b in train_batches(encoded, 8, seed=0, epoch=e)]
    batches += eval_batches(encoded, 8)
    assert {b["input_ids"].shape[0] for b in batches} == {8}
    assert {b["input_ids"].shape[1] for b in batches} <= {*bucket_lengths(128)}


def mean_lengths(encoded, **options):
    """Returns the mean length of the examples of every batch of 16."""
    batches = train_batches(encoded, 16, seed=0, epoch=0, **options)
    return np.array([batch["attention_mask"].sum(1).mean() for batch in batches])


def test_batches_are_random_samples_of_the_data():
    lengths = random_lengths(16_000)
    means = mean_lengths(encoded_of(lengths))
    # The variance of a mean of 16 draws is a sixteenth; of 1,000 such, within 4.5 %.
    assert np.var(means) == pytest.approx(np.var(lengths) / 16, rel=0.15)


def test_grouped_by_length_similar_lengths_share_a_batch():
    lengths = random_lengths(16_000)
    means = mean_lengths(encoded_of(lengths), group_by_length=True)
    assert np.var(means) > 0.99 * np.var(lengths)


def test_grouping_by_length_pads_less():
    encoded = encoded_of(random_lengths(1600))
    fills = [
        np.mean([b["attention_mask"].mean() for b in batches])
        for batches in (
            train_batches(encoded, 16, seed=0, epoch=0, group_by_length=grouped)
            for grouped in (True, False)
        )
    ]
    assert fills[0] > 1.4 * fills[1]


def test_the_order_of_lengths_is_shuffled():
    batches = train_batches(
        encoded_of(random_lengths(1600)), 16, seed=0, epoch=0, group_by_length=True
    )
    widths = np.array([b["input_ids"].shape[1] for b in batches])
    order = np.arange(len(widths))
    assert abs(np.corrcoef(widths, order)[0, 1]) < 0.3


@grouped_or_not
def test_short_batches_do_not_favor_long_examples(grouped):
    encoded = encoded_of(range(2, 102))
    options = {"seed": 0, "group_by_length": grouped}
    last = [
        list(train_batches(encoded, 16, epoch=e, **options))[-1] for e in range(200)
    ]
    lengths = [b["attention_mask"].sum(1)[b["weights"] == 1].mean() for b in last]
    # Four of 2..101 have a mean of 51.5 and a deviation of 14; of 200, 1.
    assert np.mean(lengths) == pytest.approx(51.5, abs=4)


def test_the_order_depends_on_seed_and_epoch_only():
    encoded = encoded_of(random_lengths(100))
    orders = {
        (seed, epoch): tuple(seen(train_batches(encoded, 8, seed=seed, epoch=epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    again = train_batches(encoded, 8, seed=1, epoch=2)
    assert tuple(seen(again)) == tuple(seen(again)) == orders[1, 2]


@grouped_or_not
@pytest.mark.parametrize("start", range(4))
def test_resuming_gives_the_tail_of_the_epoch(start, grouped):
    encoded = encoded_of(random_lengths(20))
    options = {"seed": 3, "epoch": 1, "group_by_length": grouped}
    whole = list(train_batches(encoded, 8, **options))
    tail = train_batches(encoded, 8, **options, start=start)
    assert len(tail) == 3 - start
    for batch, expected in zip(tail, whole[start:], strict=True):
        assert all((batch[name] == expected[name]).all() for name in expected)


def test_parts_of_a_batch_have_a_leading_axis():
    encoded = encoded_of(random_lengths(20))
    options = {"seed": 0, "epoch": 0}
    for parts, whole in zip(
        train_batches(encoded, 8, **options, accumulate=2),
        train_batches(encoded, 8, **options),
        strict=True,
    ):
        assert parts["input_ids"].shape[:2] == (2, 4)
        assert parts["weights"].shape == parts["labels"].shape == (2, 4)
        assert all((parts[k].reshape(whole[k].shape) == whole[k]).all() for k in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be positive, got 0."),
        ({"accumulate": 3}, "`accumulate` must divide the batch size 8, got 3."),
        ({"accumulate": 0}, "`accumulate` must divide the batch size 8, got 0."),
        ({"seed": -1}, "`seed` must not be negative, got -1."),
        ({"epoch": -1}, "`epoch` must not be negative, got -1."),
        ({"start": 4}, "`start` must be in [0, 3], the batches of an epoch, got 4."),
        ({"start": -1}, "`start` must be in [0, 3], the batches of an epoch, got -1."),
    ],
)
def test_a_number_outside_its_range_is_an_error(options, message):
    arguments = {"batch_size": 8, "seed": 0, "epoch": 0} | options
    with pytest.raises(InputError, match=re.escape(message)):
        train_batches(encoded_of([3] * 20), **arguments)


def test_evaluation_needs_a_positive_batch_size():
    with pytest.raises(InputError, match="`batch_size` must be positive, got 0."):
        eval_batches(encoded_of([3]), 0)
