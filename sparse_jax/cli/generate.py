"""The command `sparse-jax generate`."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument

from sparse_jax.cli.options import (
    ADAPTER,
    AGAIN,
    BASE,
    DEVICES,
    OVERWRITE,
    flag,
    option,
    take_devices,
    takes_settings,
)
from sparse_jax.data.conversations import PROMPTS
from sparse_jax.data.read_rows import read_text, require_file
from sparse_jax.errors import InputError, brief
from sparse_jax.params.fields import require_word

if TYPE_CHECKING:
    from sparse_jax.generation.choice import Choice

__all__ = ["generate"]

# All but tabs and ends of lines; joiners and spaces of other scripts are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@takes_settings("mesh")
def generate(
    *,
    run: str | None = Argument(None, help=ADAPTER, show_default=False),
    model: str | None = BASE,
    adapter: str | None = AGAIN,
    prompt: list[str] | None = option(
        None, "Text to continue; may be repeated.", "none", metavar="<str>"
    ),
    prompts: str | None = option(
        None, "File of texts to continue, one per line.", "none"
    ),
    input: str | None = option(
        None,
        "File of JSON lines to continue, with `prompt` (a text or messages), "
        "`messages`, `instruction` and `input`, or `text`, and optionally `id`.",
        "none",
    ),
    output: str | None = option(
        None,
        "File to write JSON lines to, with `id`, `prompt` and `text`. After an "
        "interruption, the same command continues where it stopped.",
        "standard output",
    ),
    json: bool = flag(
        "--json", "Print JSON lines like those of --output; implied by --input."
    ),
    overwrite: bool = OVERWRITE,
    batch_size: int = option(32, "Texts per batch."),
    chat: bool = flag(
        "--chat", "Format each text as a message with the tokenizer's chat template."
    ),
    template: str | None = option(
        None,
        "Format each text as an instruction with a prompt template: "
        f"{' or '.join(PROMPTS)}.",
        "none",
    ),
    max_new_tokens: int = option(128, "Maximum number of tokens to generate."),
    temperature: float | None = option(
        None, "Temperature of sampling; below 1 favors likely tokens.", "greedy"
    ),
    top_k: int | None = option(
        None, "Sample from this many most likely tokens.", "all"
    ),
    top_p: float | None = option(
        None,
        "Sample from the most likely tokens whose probabilities add up to this.",
        "all",
    ),
    beams: int | None = option(None, "Beam search with this many beams.", "greedy"),
    length_penalty: float | None = option(
        None, "The score of a beam is divided by its length to this power.", "1"
    ),
    stop: list[str] | None = option(
        None,
        "Text, or id of a token, that also ends generation and is not printed; may be "
        "repeated.",
        "the model's own",
        metavar="<str>",
    ),
    mesh: str | None,
    devices: int | None = DEVICES,
    seed: int = option(0, "Seed of sampling."),
) -> None:
    """Generate text with a decoder, and print it."""
    if None not in (run, adapter):
        raise InputError(
            f"`run` must be left out with --adapter, got {brief(run)}: it is the same."
        )
    adapter = run or adapter
    if chat and template is not None:
        raise InputError(
            f"`template` must be left out with --chat, got {template!r}: the tokenizer "
            "has a template of its own."
        )
    if template is not None:
        require_word("template", template, PROMPTS)
    if batch_size < 1:
        raise InputError(f"`batch_size` must be positive, got {batch_size}.")
    if overwrite and output is None:
        raise InputError("`overwrite` must come with `output`, got it alone.")
    require_file("prompts", prompts)
    require_file("input", input)
    if not 0 <= seed < 2**32:
        raise InputError(f"`seed` must be in [0, 2**32), got {seed}.")
    take_devices(devices, mesh=mesh)
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.data.json_lines import JsonLines
    from sparse_jax.generation.requests import Request, Requests, read_requests
    from sparse_jax.generation.writer import (
        chat_tokens,
        load_writer,
        read_stop,
        text_tokens,
    )

    prompt_template = None if template is None else PROMPTS[template]
    texts = [*(prompt or ()), *_lines(prompts)]
    if not (texts or input):
        raise InputError(
            "`prompt` must be given, got none. Pass --prompt, or --prompts or --input "
            "with a file."
        )
    choice = _choice(temperature, top_k, top_p, beams, length_penalty)
    writer = load_writer(model, adapter, mesh)
    tokens = (
        (lambda text: chat_tokens(text, writer.tokenizer))
        if chat
        else (lambda text: text_tokens(text, writer.tokenizer, prompt_template))
    )
    asked = [Request(i, text, tokens(text)) for i, text in enumerate(texts)]
    if input is not None:
        asked += read_requests(input, writer, prompt_template, chat)
    ends = [read_stop(word, writer.tokenizer) for word in stop or ()]
    requests = Requests(asked, writer, choice, max_new_tokens, seed, ends, batch_size)
    if not (json or input or output):
        for batch in requests.texts():
            for _, text in batch:
                _show(text)
        return
    with JsonLines(
        output, {} if output is None else requests.identity, overwrite
    ) as lines:
        for batch in requests.texts(lines.done):
            lines.add(
                [
                    {"id": one.id, "prompt": one.prompt, "text": text}
                    for one, text in batch
                ]
            )


def _spelled(found: re.Match[str]) -> str:
    """Returns a control character in visible ones."""
    return repr(found[0])[1:-1]


def _show(text: str) -> None:
    """Prints what a model wrote."""
    # A terminal obeys control characters; a program at the other end of a pipe gets
    # the text as it is.
    text = _CONTROL.sub(_spelled, text) if sys.stdout.isatty() else text
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _choice(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    beams: int | None,
    length_penalty: float | None,
) -> "Choice":
    """Returns the choice that the options describe."""
    from sparse_jax.generation.beams import Beams
    from sparse_jax.generation.choice import Greedy, Sample

    is_random = any(value is not None for value in (temperature, top_k, top_p))
    if beams is not None and is_random:
        raise InputError(
            f"`beams` must be left out with --temperature, --top-k and --top-p, got "
            f"{beams}. Beam search draws nothing at random."
        )
    if beams is None and length_penalty is not None:
        raise InputError(
            f"`length_penalty` must be left out without --beams, got {length_penalty}."
        )
    if beams is not None and beams < 2:
        raise InputError(
            f"`beams` must be at least 2, got {beams}. Leave it out for the likeliest "
            "token at a time."
        )
    if beams is not None:
        return Beams(beams, 1.0 if length_penalty is None else length_penalty)
    if is_random:
        return Sample(1.0 if temperature is None else temperature, top_k, top_p)
    return Greedy()


def _lines(path: str | None) -> list[str]:
    """Returns the lines of a file that are not empty."""
    if path is None:
        return []
    # Not `splitlines`, which also breaks at characters that occur in sentences.
    lines = (line.removesuffix("\r") for line in read_text(Path(path)).split("\n"))
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InputError(
            f"`prompts` must be a file with one text per line, got {brief(path)}, "
            "which has no text."
        )
    return texts
