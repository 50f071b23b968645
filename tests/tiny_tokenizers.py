"""Small tokenizers for causal language models: characters, and a few merges."""

import string

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = [*string.ascii_letters, *string.digits, *" .,:;#?!'<>|_/-=+*\n", "▁"]
MERGES = [(":", "\n"), ("▁", "a"), ("a", "b")]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def characters(*, adds_space=False, adds_begin=True, **options):
    """Returns a tokenizer of characters in which ":\\n", "▁a" and "ab" are one."""
    vocabulary = [*SPECIAL, *CHARACTERS, *("".join(merge) for merge in MERGES)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=MERGES))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if adds_space:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Fuse()
    if adds_begin:
        begin = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        tokenizer.post_processor = begin
    names = {"bos_token": "<s>", "eos_token": "</s>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
