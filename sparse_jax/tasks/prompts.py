"""Prompts: how an instruction and its input become one text."""

from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["ALPACA", "LLM_ADAPTERS", "PROMPTS", "PromptTemplate"]


@dataclass(frozen=True)
class PromptTemplate:
    """A text with places for `{instruction}` and `{input}`.

    Example:
      >>> template = PromptTemplate("{instruction}: {input} ->", "{instruction} ->")
      >>> template.fill("Add", "1, 2"), template.fill("Sing")
      ('Add: 1, 2 ->', 'Sing ->')
    """

    with_input: str
    without_input: str

    def fill(self, instruction: str, input: str = "") -> str:
        """Returns the prompt of an instruction."""
        template = self.with_input if input else self.without_input
        return template.format(instruction=instruction, input=input)


_TASK = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."

ALPACA = PromptTemplate(
    f"{_TASK}{_INPUT}{_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n"
    "### Input:\n{input}\n\n### Response:",
    f"{_TASK}{_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:",
)
"""The prompt of Stanford Alpaca (`train.py`); the response follows the colon."""

# The spaces are those of a triple-quoted string inside a function, blank lines and
# ends of lines included: published numbers were trained with them.
_INDENT = " " * 16
_GAP = f"\n{_INDENT}\n{_INDENT}"
LLM_ADAPTERS = PromptTemplate(
    f"{_TASK}{_INPUT}{_REQUEST} \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}"
    f"{_GAP}### Input:\n{_INDENT}{{input}}{_GAP}### Response:\n{_INDENT}",
    f"{_TASK}{_REQUEST}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}"
    f"{_GAP}### Response:\n{_INDENT}",
)
"""The prompt that the commonsense models of LLM-Adapters and IST were trained with.

Its first version had `# noqa: E501` in the text. The evaluation of LLM-Adapters has
no spaces in blank lines, and one after the first line.
"""

PROMPTS = MappingProxyType({"alpaca": ALPACA, "llm_adapters": LLM_ADAPTERS})
"""The prompts by their names on the command line."""
