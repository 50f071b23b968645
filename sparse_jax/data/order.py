"""The order of an epoch: which examples share a batch, by seed and epoch."""

import numpy as np

from sparse_jax.errors import InputError

__all__ = ["check_sizes", "given_order", "random_of", "shuffled_order", "split_parts"]

# Batches whose examples are sorted together if batches are grouped by length. More
# would pad less and mix less: the same examples would meet again in every epoch.
_WINDOW = 50


def shuffled_order(
    lengths: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    group_by_length: bool = False,
) -> tuple[np.ndarray, ...]:
    """Returns the positions of the examples of each batch, the incomplete batch last.

    The order is a random permutation. Nothing but the arguments decides.

    Args:
      lengths: tokens of each example, shape `[N]`.
      batch_size: examples of one update.
      seed: not negative.
      epoch: not negative; each has an order of its own.
      start: batches to leave out, to resume in the middle.
      group_by_length: whether examples of similar length share a batch. Batches are
        then no longer random samples of the data.

    Raises:
      InputError: if a number is outside its range.

    Example:
      >>> [len(batch) for batch in shuffled_order(np.ones(5), 2, seed=0, epoch=0)]
      [2, 2, 1]
    """
    num_batches = -(-len(lengths) // max(batch_size, 1))
    random = random_of(seed, epoch)
    if not 0 <= start <= num_batches:
        raise InputError(
            f"`start` must be in [0, {num_batches}], the batches of an epoch, "
            f"got {start}."
        )
    order = random.permutation(len(lengths))
    if group_by_length:
        return tuple(_grouped(order, lengths, batch_size, random)[start:])
    return tuple(_cut(order, batch_size)[start:])


def given_order(num_examples: int, batch_size: int) -> tuple[np.ndarray, ...]:
    """Returns the positions of the examples of each batch, as they stand.

    Example:
      >>> [batch.tolist() for batch in given_order(3, 2)]
      [[0, 1], [2]]
    """
    return tuple(_cut(np.arange(num_examples), batch_size))


def random_of(seed: int, epoch: int, *purpose: int) -> np.random.Generator:
    """Returns the random numbers of an epoch, others for each purpose.

    Raises:
      InputError: if `seed` or `epoch` is negative.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise InputError(f"`{name}` must not be negative, got {value}.")
    return np.random.Generator(np.random.PCG64([seed, epoch, *purpose]))


def check_sizes(batch_size: int, accumulate: int) -> None:
    """Raises unless a batch can be cut into parts."""
    if batch_size < 1:
        raise InputError(f"`batch_size` must be positive, got {batch_size}.")
    if accumulate < 1 or batch_size % accumulate:
        raise InputError(
            f"`accumulate` must divide the batch size {batch_size}, got {accumulate}."
        )


def split_parts(
    arrays: dict[str, np.ndarray], accumulate: int
) -> dict[str, np.ndarray]:
    """Returns a batch as parts, `[A, B / A, ...]`, or as it is if it is one part."""
    if accumulate == 1:
        return arrays
    return {
        name: x.reshape(accumulate, len(x) // accumulate, *x.shape[1:])
        for name, x in arrays.items()
    }


def _grouped(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Returns batches of examples of similar length; the incomplete one is random."""
    # The rest is cut off before sorting: otherwise it would be the longest examples,
    # and weigh more, since the mean over a batch of few gives each of them more.
    whole, rest = np.split(order, [len(order) // batch_size * batch_size])
    batches = []
    for window in _cut(whole, _WINDOW * batch_size):
        batches += _cut(window[np.argsort(lengths[window], kind="stable")], batch_size)
    shuffled = [batches[i] for i in random.permutation(len(batches))]
    return shuffled + _cut(rest, batch_size)


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns consecutive pieces, the last one possibly shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]
