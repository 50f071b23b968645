"""MMLU: questions with four choices of 57 subjects, as its authors ask them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sparse_jax.data.conversations import Conversation, Piece
from sparse_jax.data.read_rows import read_table
from sparse_jax.errors import InputError, brief

__all__ = ["LETTERS", "MMLU_SUBJECTS", "ChoiceQuestion", "load_subject", "mmlu_prompt"]

LETTERS = ("A", "B", "C", "D")
_COLUMNS = ("question", *LETTERS, "answer")

_BY_CATEGORY = {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry "
    "college_computer_science college_mathematics college_physics computer_security "
    "conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics "
    "machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history "
    "high_school_world_history international_law jurisprudence logical_fallacies "
    "moral_disputes moral_scenarios philosophy prehistory professional_law "
    "world_religions",
    "social sciences": "econometrics high_school_geography "
    "high_school_government_and_politics high_school_macroeconomics "
    "high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology "
    "us_foreign_policy",
    "other": "anatomy business_ethics clinical_knowledge college_medicine global_facts "
    "human_aging management marketing medical_genetics miscellaneous nutrition "
    "professional_accounting professional_medicine virology",
}
MMLU_SUBJECTS = MappingProxyType(
    {
        subject: category
        for category, subjects in _BY_CATEGORY.items()
        for subject in subjects.split()
    }
)
"""The category of each subject."""


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with four choices, and the letter of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: str

    def stated(self) -> str:
        """Returns question and choices, up to where the letter is missing."""
        named = zip(LETTERS, self.choices, strict=True)
        lines = [self.question, *(f"{letter}. {choice}" for letter, choice in named)]
        return "\n".join([*lines, "Answer:"])

    def responses(self, prompt: str) -> list[Conversation]:
        """Returns a prompt with each letter as its response, to be ranked."""
        pieces = [
            (Piece(prompt, False), Piece(f" {letter}", True)) for letter in LETTERS
        ]
        # The letter alone is scored: the text goes on after it.
        return [Conversation(one, is_ended=True) for one in pieces]


def load_subject(folder: str | Path, subject: str, split: str) -> list[ChoiceQuestion]:
    """Returns the questions of a subject, from `folder/SPLIT/SUBJECT_SPLIT.csv`.

    Args:
      folder: with the folders `dev`, `val` and `test`.
      subject: one of `MMLU_SUBJECTS`.
      split: one of the folders.

    Raises:
      InputError: if there is no such file, or a line has not six columns or an answer
        that is none of the letters.
    """
    if subject not in MMLU_SUBJECTS:
        raise InputError(
            f"`subject` must be one of the {len(MMLU_SUBJECTS)} of MMLU, got "
            f"{brief(subject)}. They are named as their files are."
        )
    rows = read_table(Path(folder) / split / f"{subject}_{split}.csv", _COLUMNS)
    found = []
    for number, record in rows.numbered:
        question, *choices, answer = map(str, record.values())
        if answer not in LETTERS:
            raise InputError(
                f"{rows.source.at(number)} must have an answer among "
                f"{', '.join(LETTERS)}, got {brief(answer)}."
            )
        found.append(ChoiceQuestion(question, tuple(choices), answer))
    if not found:
        raise InputError(f"{rows.source.name} must have questions, got an empty file.")
    return found


def mmlu_prompt(
    subject: str, examples: Sequence[ChoiceQuestion], question: ChoiceQuestion
) -> str:
    r"""Returns the prompt of a question after some answered ones.

    Word for word that of the published evaluation, its two spaces included.

    Example:
      >>> question = ChoiceQuestion("1 + 1?", ("1", "2", "3", "4"), "B")
      >>> print(mmlu_prompt("college_physics", [question], question))
      The following are multiple choice questions (with answers) about  college physics.
      <BLANKLINE>
      1 + 1?
      A. 1
      B. 2
      C. 3
      D. 4
      Answer: B
      <BLANKLINE>
      1 + 1?
      A. 1
      B. 2
      C. 3
      D. 4
      Answer:
    """
    begin = "The following are multiple choice questions (with answers) about"
    shots = [f"{example.stated()} {example.answer}\n\n" for example in examples]
    name = subject.replace("_", " ")
    return f"{begin}  {name}.\n\n{''.join(shots)}{question.stated()}"
