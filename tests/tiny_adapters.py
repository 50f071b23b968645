"""Adapters as runs write them, and ways to damage their files."""

import json
import struct

import jax
import numpy as np
from safetensors.numpy import load, save
from test_adapters_laws import shaken

from sparse_jax import Adapter, Settings
from sparse_jax.methods.registry import METHODS
from sparse_jax.supports.roles import DENSE, SPARSE, map_roles
from sparse_jax.training.build import method_of

# method -> options; random and magnitude are sift with another score
RUNS = {word: {} for word in METHODS if word not in ("random", "magnitude", "lift")} | {
    "lora": {"rank": 3, "alpha": 3.0, "rslora": True},
    "dora": {"rank": 3, "where": ("mlp/up", "query")},
    "series": {"size": 3, "activation": "tanh"},
    "parallel": {"size": 3, "where": ("mlp",)},
    "prefix": {"prefix_length": 3},
    "sift": {"density": 0.08},
}


def run_adapter(params, method, **options):
    """Returns an adapter of random numbers with all that a run of `cola` writes."""
    options = options or RUNS[method]
    settings = Settings(model="m", task="cola", output="o", method=method, **options)
    made = method_of(settings, ("^classifier/",))
    kept = ("learning_rate", "batch_size", "dtype", "seed")
    return random_adapter(
        params,
        made,
        word=method,
        settings={**{n: getattr(settings, n) for n in kept}, "max_length": 16},
        base_model="base",
        base_hash="ab" * 32,
        task="cola",
        labels=("no", "maybe", "yes"),
    )


def random_adapter(params, method, **about):
    """Returns an adapter of random numbers with all that a method trains."""
    random, support, values, dense = np.random.default_rng(0), {}, {}, {}

    def collect(role, leaf):
        if role.kind == DENSE:
            dense[role.name] = random.normal(size=leaf.shape).astype(leaf.dtype)
        elif role.kind == SPARSE:
            shape = role.packed_shape(leaf.shape, method.support_size(role))
            rows = [
                np.sort(random.choice(role.size, shape[-1], replace=False))
                for _ in range(shape[0] if role.stacked else 1)
            ]
            support[role.name] = np.array(rows, np.int32).reshape(shape)
            values[role.name] = random.normal(size=shape).astype(leaf.dtype)

    map_roles(collect, method.roles(params), params)
    added = shaken(method.added(params, jax.random.key(0))) or {}
    arrays = jax.tree.map(np.asarray, added)
    return Adapter(support, values, dense, arrays, method, **about)


def words_of(data):
    """Returns what a file says beside its arrays."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["sparse_jax"])


def with_words(data, words):
    """Returns a file that says something else about the same arrays."""
    text = words if isinstance(words, str) else json.dumps(words)
    return save(load(data), metadata={"sparse_jax": text})


def as_format_1(data):
    """Returns a file as earlier versions wrote it: with the options of a run."""
    words = words_of(data)
    names = {"length": "prefix_length"}
    made = words.pop("method_settings")
    options = {names.get(name, name): value for name, value in made.items()}
    for name in ("stack", "score", "feedforward", "scale"):
        options.pop(name, None)
    del words["digest"]
    words["settings"] |= {**options, "dense": None}  # the head
    return with_words(data, {**words, "format": "sparse_jax adapter 1"})


def damaged(data, random):
    """Returns a file with some of its bytes changed, cut off, repeated or added."""
    at, length = int(random.integers(len(data))), int(random.integers(1, 40))
    # Half of them in the header, which is a small part.
    at = at if random.random() < 0.5 else int(random.integers(min(len(data), 1500)))
    kinds = {
        "flip": data[:at] + bytes([data[at] ^ (1 << int(random.integers(8)))]),
        "write": data[:at] + random.bytes(length),
        "cut": data[:at],
        "leave out": data[:at],
        "repeat": data[: at + length] + data[at : at + length],
    }
    kind = random.choice([*kinds])
    used = {"flip": 1, "cut": len(data)}.get(kind, length)
    return kinds[kind] + data[at + used :]


_VALUES = (
    None, True, -1, 0, 3, 7.5, 1e300, float("nan"), 10**30, "", "x", "relu", "lora",
    "(", [], [1], ["x"], ["("], {}, {"a": {"b": []}},
)  # fmt: skip


def misworded(data, random):
    """Returns a file with one word or setting changed, left out or added."""
    words = words_of(data)
    place = random.choice(["settings", "method_settings"])
    inside = words[place] if random.random() < 0.6 else words
    name = str(random.choice([*inside]))
    kind = random.choice(["change", "leave out", "rename"])
    if kind == "change":
        inside[name] = _VALUES[int(random.integers(len(_VALUES)))]
    elif kind == "leave out":
        del inside[name]
    else:
        inside[f"{name}s"] = inside.pop(name)
    return with_words(data, words)


def reshaped(data, random):
    """Returns a file of before checksums with one array changed in its form."""
    arrays, words = load(data), words_of(data)
    del words["digest"]
    name = str(random.choice(sorted(arrays)))
    array = arrays.pop(name)
    kinds = {
        "leave out": {},
        "rename": {f"{name[:-3]}{name[-2:]}": array},
        "add": {name: array, f"{name}/more": array},
        "elsewhere": {name: array, name.replace("attention", "mlp") + "s": array},
        "type": {name: array.astype(random.choice(["f8", "f2", "i8", "u1", "?"]))},
        "turn": {name: np.ascontiguousarray(array.T)},
        "flatten": {name: array.reshape(-1)},
        "wrap": {name: array[None]},
        "first": {name: array[:1]},
        "fewer": {name: np.ascontiguousarray(array[..., :-1])},
        "twice": {name: np.concatenate([array, array])},
        "number": {name: np.array(1, array.dtype)},
        "nan": {name: np.full(array.shape, np.nan, np.float32)},
    }
    kind = random.choice([*kinds])
    changed = {**arrays, **kinds[kind]}
    return save(changed, metadata={"sparse_jax": json.dumps(words)})
