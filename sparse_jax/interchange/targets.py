"""The table of formats that an adapter can be exported to."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row of the table.

    Attributes:
      help: what is written, for the help of the command line.
      path: module:function that writes a `Source` to a folder, with the options. JAX
        takes seconds to import, and the help of the command line reads this table.
      library: whose files these are, as the Hub names it.
      relation: of what is written to the base, as the Hub names it.
      options: of `export` that apply.
      load: Python that loads the folder `{name}`, or the repository `{repo}`. `{base}`
        is the base, `{auto}` its class in transformers, `{dtype}` that of the values,
        and `{labels}` and `{options}` are what loading the base takes in transformers
        and here.
    """

    help: str
    path: str
    library: str
    relation: str = "adapter"
    options: tuple[str, ...] = ()
    load: str

    @property
    def write(self) -> Callable[..., None]:
        """The function that writes: `write(source, folder, **options)`."""
        return pkgutil.resolve_name(self.path)


TARGETS = MappingProxyType(
    {
        "merged": Target(
            help="the whole model, as transformers loads it",
            path="sparse_jax.interchange.merged:write_merged",
            library="transformers",
            relation="finetune",
            options=("dtype", "shard_size"),
            load="""\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
""",
        ),
        "peft": Target(
            help="an adapter of Hugging Face PEFT",
            path="sparse_jax.interchange.source:write_peft",
            library="peft",
            options=("peft_type",),
            load="""\
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}"{labels})
model = PeftModel.from_pretrained(base, "{repo}")
""",
        ),
        "patch": Target(
            help="new values of weights, as inference servers such as vLLM take them",
            path="sparse_jax.interchange.source:write_patch",
            library="sparse_jax",
            options=("dtype",),
            load="""\
import sparse_jax as sj
import torch
from transformers import {auto}

model = {auto}.from_pretrained("{base}"{labels}, dtype="{dtype}")
for name, _, values, indices in sj.load_patches("{name}"):
    values = torch.tensor(values.astype("float32")).to(model.dtype)
    model.state_dict()[name].view(-1)[torch.tensor(indices)] = values
""",
        ),
        "delta": Target(
            help="the adapter alone, in the format of sparse_jax",
            path="sparse_jax.interchange.source:write_delta",
            library="sparse_jax",
            load="""\
import jax
import sparse_jax as sj

adapter = sj.load_adapter("{name}")
model, params = sj.from_pretrained("{base}", {options}, key=jax.random.key(0))
params, attachment = sj.apply_adapter(params, adapter)
""",
        ),
    }
)
