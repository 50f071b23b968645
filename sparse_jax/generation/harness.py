"""Models as lm-evaluation-harness wants them, so that any of its tasks runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sparse_jax.data.batches import TokenSequences
from sparse_jax.errors import InputError
from sparse_jax.generation.choice import Greedy, Sample
from sparse_jax.generation.ranking import score_sequences
from sparse_jax.generation.writer import Stop, Writer

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

__all__ = ["harness_model"]

_MAX_NEW_TOKENS = 256  # unless a task says so, as for the harness' own models
# What tasks call it; of several the first counts, as there.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def harness_model(writer: Writer, *, batch_size: int = 16) -> "TemplateLM":
    """Returns a model for `lm_eval.simple_evaluate(model=...)`.

    Args:
      writer: of `load_writer`: a base model, or one with an adapter, ours or PEFT's.
      batch_size: rows of 256 tokens at a time.

    Raises:
      InputError: if lm_eval is not installed, or the tokenizer has no token that ends a
        text.
    """
    try:
        from lm_eval import utils  # pyright: ignore[reportMissingImports]
        from lm_eval.api.model import (  # pyright: ignore[reportMissingImports]
            TemplateLM,
        )
    except ImportError as error:
        raise InputError(
            "`harness_model` must have lm_eval, and it is not installed. Run "
            "`pip install 'sparse_jax[eval]'`."
        ) from error
    # What transformers says of its tokenizers is wider than what they return.
    tokenizer = cast("Any", writer.tokenizer)
    positions = writer.model.config.max_positions
    if tokenizer.eos_token_id is None:
        raise InputError(
            "`tokenizer` must have an end-of-sequence token, got none. Set "
            "`tokenizer.eos_token` and save it."
        )

    class HarnessModel(TemplateLM):
        """A writer; the harness states what its methods return."""

        max_length = positions
        max_gen_toks = _MAX_NEW_TOKENS

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            begin = tokenizer.bos_token_id
            return self.eot_token_id if begin is None else begin

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.name_or_path.replace("/", "__")

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            if add_special_tokens is None:
                begin = tokenizer.bos_token
                add_special_tokens = not (begin and string.startswith(begin))
            return tokenizer(
                string, add_special_tokens=add_special_tokens, verbose=False
            )["input_ids"]

        def apply_chat_template(
            self, chat_history: list[dict], add_generation_prompt: bool = True
        ) -> str:
            return tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(before, after) for _, before, after in requests]
            found = [*zip(*_scored(writer, pairs, batch_size), strict=True)]
            for (text, *_), (total, is_greedy) in zip(requests, found, strict=True):
                if text is not None:
                    answer = (float(total), bool(is_greedy))
                    self.cache_hook.add_partial("loglikelihood", text, answer)
            return [(float(total), bool(is_greedy)) for total, is_greedy in found]

        def loglikelihood_rolling(
            self, requests: list, disable_tqdm: bool = False
        ) -> list[float]:
            windows, owners = [], []
            for number, request in enumerate(requests):
                parts = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=positions,
                    context_len=1,
                )
                parts = [utils.make_disjoint_window(part) for part in parts]
                windows += parts
                owners += [number] * len(parts)
            totals, _ = _scored(writer, windows, batch_size)
            sums = np.bincount(owners, totals, len(requests)) if owners else []
            return [float(total) for total in sums]

        def generate_until(
            self, requests: list, disable_tqdm: bool = False
        ) -> list[str]:
            texts = [""] * len(requests)
            # Requests of one task have the same options.
            groups: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                groups.setdefault(repr(request.args[1]), []).append(number)
            for numbers in groups.values():
                options = requests[numbers[0]].args[1]
                prompts = [self.tok_encode(requests[i].args[0]) for i in numbers]
                for i, text in zip(
                    numbers, _written(writer, prompts, options), strict=True
                ):
                    texts[i] = text
                    self.cache_hook.add_partial(
                        "generate_until", requests[i].args, text
                    )
            return texts

    return HarnessModel()


def _scored(
    writer: Writer, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores the second part of every pair; too long ones lose their beginning."""
    positions = writer.model.config.max_positions
    # The last token is predicted, and not read.
    ids = [np.array([*one, *two], np.int32)[-positions - 1 :] for one, two in pairs]
    marks = [
        np.arange(len(whole)) >= max(1, len(whole) - len(two))
        for whole, (_, two) in zip(ids, pairs, strict=True)
    ]
    if not ids:
        return np.zeros(0), np.zeros(0, bool)
    sequences = TokenSequences(ids, marks, positions + 1, 0)
    return score_sequences(
        writer.model,
        writer.params,
        sequences,
        attachment=writer.attachment,
        batch_size=batch_size,
    )


def _written(
    writer: Writer, prompts: Sequence[list[int]], options: dict[str, Any]
) -> list[str]:
    """Writes after prompts, of which the ends are kept if they are too long."""
    given = [options[name] for name in _LIMITS if options.get(name) is not None]
    most = int(next(iter(given), _MAX_NEW_TOKENS))
    most = min(most, writer.model.config.max_positions - 1)
    room = writer.model.config.max_positions - most
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until
    temperature = float(options.get("temperature") or 0.0)
    draws = options.get("do_sample", temperature > 0) and temperature > 0
    # To transformers 0 keeps all tokens.
    kept = {"top_k": options.get("top_k") or None, "top_p": options.get("top_p")}
    return writer.write(
        [prompt[-room:] for prompt in prompts],
        choice=Sample(temperature, **kept) if draws else Greedy(),
        max_new_tokens=most,
        # As texts, since a stop may begin within a token; the model's own end is known.
        stop=[Stop((), word) for word in until if word],
    )
