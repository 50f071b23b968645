"""Text generation: what a decoder writes after prompts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from sparse_jax.errors import InputError
from sparse_jax.generation.choice import Choice, Greedy
from sparse_jax.generation.cpu import compiled, layers_apart
from sparse_jax.generation.ends import before_end, end_table
from sparse_jax.generation.prompts import AdaptedModel, Prompts, padded_batches
from sparse_jax.models.attachment import Arrays, Attachment, LayerValues
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model, Params

__all__ = ["checked_prompts", "generate"]

# Rows at a time unless the caller says otherwise.
_ROWS = 32


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[ArrayLike],
    *,
    max_new_tokens: int = 128,
    choice: Choice = Greedy(),  # noqa: B008 - frozen
    stop: Sequence[int | Sequence[int]] = (),
    pad_id: int = 0,
    attachment: Attachment = Attachment(),  # noqa: B008 - a tuple
    key: jax.Array | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    first: int = 0,
) -> list[np.ndarray]:
    """Continues each prompt until a stop token or `max_new_tokens`.

    One program serves all prompts between two powers of two in length. The text
    after a prompt does not depend on the other prompts, up to rounding; samples depend
    on the key and on the prompt's place among all.

    Args:
      model: a model with the head `CausalLM`.
      params: its parameters.
      prompts: token ids, each prompt of its own length.
      max_new_tokens: most tokens to write after a prompt.
      choice: how tokens are chosen: `Greedy`, `Sample` or `Beams`.
      stop: what ends a text: a token, or several in a row.
      pad_id: token that fills the rows up; nothing depends on it.
      attachment: what a method adds to the layers, as `apply_adapter` returns it.
      key: needed where the choice is random.
      batch_size: prompts at a time; None takes all, up to 32.
      max_length: tokens that every prompt is padded to, and the most it may have; None
        takes a power of two for each batch.
      first: place of the first prompt among all, where these are some of them.

    Returns:
      The new tokens of each prompt, int32, without those that end it.

    Raises:
      InputError: if a prompt is empty, has a token that the model lacks or leaves no
        room for the new ones, or if a number is out of range.
    """
    sizes = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    _check(model, choice, attachment, key, pad_id, sizes)
    rows, limit = checked_prompts(model, prompts, max_new_tokens, max_length, first)
    batches = padded_batches(
        rows,
        batch_size=batch_size or min(_ROWS, 1 << (len(rows) - 1).bit_length()),
        most=limit,
        pad_id=pad_id,
        columns=None if max_length is None else limit,
    )
    key = jax.random.key(0) if key is None else key
    table = jnp.asarray(end_table(stop))
    layers = layers_apart(params)
    found: dict[int, np.ndarray] = {}
    for batch in batches:
        batch = batch._replace(numbers=np.asarray(batch.numbers) + first)
        tokens = _decode(
            params, layers, attachment.trained, batch, key, table,
            model=model,
            attached=attachment._replace(trained=None),
            choice=choice,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
        written = zip(np.asarray(batch.numbers), np.asarray(tokens), strict=True)
        found |= {int(number): before_end(row, stop) for number, row in written}
    return [found[number] for number in range(first, first + len(rows))]


def _written(
    params: Params,
    layers: tuple[Arrays, ...] | None,
    trained: LayerValues | None,
    prompts: Prompts,
    key: jax.Array,
    stop: jax.Array,
    *,
    model: Model,
    attached: Attachment,
    choice: Choice,
    max_new_tokens: int,
) -> jax.Array:
    """Returns new tokens, int32 `[B, max_new_tokens]`."""
    attachment = attached._replace(trained=trained)
    adapted = AdaptedModel(model, params, attachment, layers)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts.numbers)
    return choice.decode(adapted, prompts, keys, stop, max_new_tokens)


_decode = compiled(_written, ("model", "attached", "choice", "max_new_tokens"))


def checked_prompts(
    model: Model,
    prompts: Sequence[ArrayLike],
    max_new_tokens: int,
    max_length: int | None = None,
    first: int = 0,
) -> tuple[list[np.ndarray], int]:
    """Returns prompts as arrays, and the most tokens that one may have.

    The arguments and errors are those of `generate`.
    """
    positions = model.config.max_positions
    limit = positions - max_new_tokens
    if limit < 1:
        raise InputError(
            f"`max_new_tokens` must be less than the {positions} positions of the "
            f"model, got {max_new_tokens}. Leave room for a prompt."
        )
    limit = limit if max_length is None else min(limit, max_length)
    rows = [np.asarray(prompt) for prompt in prompts]
    for number, row in enumerate(rows, first):
        _check_prompt(number, row, limit, max_new_tokens, model)
    return rows, limit


def _check(
    model: Model,
    choice: Choice,
    attachment: Attachment,
    key: jax.Array | None,
    pad_id: int,
    sizes: dict[str, int | None],
) -> None:
    """Raises if an argument is of another kind than is needed, or out of range."""
    if not issubclass(model.head, CausalLM):
        raise InputError(
            f"`model` must have the head CausalLM, got {model.head.__name__}. Load a "
            "decoder with `from_pretrained(model, head=CausalLM)`."
        )
    if attachment.slots is not None:
        raise InputError(
            "`attachment` must have no slots, got some. They are for training: pass "
            "what `apply_adapter` returns."
        )
    if choice.is_random and key is None:
        raise InputError(
            f"`key` must be given for {choice}, got None. Pass `jax.random.key(0)`."
        )
    for name, number in sizes.items():
        if number is not None and number < 1:
            raise InputError(f"`{name}` must be at least 1, got {number}.")
    # A token that the model lacks is read as NaN.
    if not 0 <= pad_id < model.config.vocab_size:
        raise InputError(
            f"`pad_id` must be in [0, {model.config.vocab_size}), got {pad_id}. Any "
            "token will do."
        )


def _check_prompt(
    number: int, row: np.ndarray, limit: int, max_new_tokens: int, model: Model
) -> None:
    """Raises unless a prompt can be read."""
    place = f"prompt {number}"
    if row.ndim != 1 or not row.size:
        raise InputError(
            f"`prompt` must have at least one token, got shape {list(row.shape)} for "
            f"{place}. Begin it with the token that begins a text."
        )
    if row.size > limit:
        raise InputError(
            f"`prompt` must have at most {limit} tokens besides {max_new_tokens} new "
            f"ones, got {row.size} for {place}. Shorten it, or lower "
            "`max_new_tokens`."
        )
    size = model.config.vocab_size
    if row.dtype.kind not in "iu" or row.min() < 0 or row.max() >= size:
        raise InputError(
            f"`prompt` must be token ids in [0, {size}), got {row.min()} to "
            f"{row.max()} for {place}. Use the tokenizer of the model."
        )
