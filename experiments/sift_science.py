"""Why do a few entries suffice?  Gradients, landscape and supports of a real model.

    python -m experiments.sift_science share --model FOLDER --tasks mrpc=FOLDER
    python -m experiments.sift_science landscape --model FOLDER --tasks mrpc=FOLDER
    python -m experiments.sift_science overlap --model FOLDER --tasks mrpc=FOLDER rte=..
        [--scale tiny] [--updates 20] [--learning-rate 2e-5] [--density 0.05]
        [--seed 0] [--output runs/sift_science]

FOLDER is an encoder, with tasks of GLUE, or a decoder, with `causal=FILE`.

`share`: the part |g_S| / |g| of the gradient's norm that is in its largest entries S,
of all layers together, of each, and over full training by AdamW; for the pre-trained
weights and for random ones. The paper's abstract says that 1 % of the entries hold 99 %
of the gradient. A gradient of independent normal numbers stands beside it. The tables
of words and positions are apart: most of their rows are in no batch.

`landscape`: the loss at w + a d for the pre-trained and for random weights w of the
layers. A random d is normal and has the norm of w in every column of every matrix
(filter normalization, Li et al., 2018); the direction of the negative gradient has the
norm of w in all. So a = 1 moves the weights by their own norm.

`overlap`: the entries that two supports share, as a fraction of those in either:
for two tasks, two batches, the means of several batches, and before and after training;
with the overlap of random supports beside it, density / (2 - density) on average.

Each writes a PNG and a JSON of its name.
"""

import argparse
import functools
import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from experiments.command import run_command
from experiments.pictures import COLORS, canvas, save
from experiments.problem import SCALES, load
from sparse_jax import Adapter, compare_supports, top_k_support
from sparse_jax.models.functional import Params
from sparse_jax.params.names import leaves_by_name

FRACTIONS = np.logspace(-4, 0, 41)
ONE_PERCENT = 20  # its place among them
STARTS = {"pre-trained": COLORS[1], "random": COLORS[3]}
DIRECTIONS = 3


def coverage(arrays: Sequence[np.ndarray]) -> list[float]:
    """Returns the share of the norm in the largest entries, one for each fraction."""
    squares = np.concatenate([np.square(array).ravel() for array in arrays])
    total = np.cumsum(np.sort(squares)[::-1], dtype=np.float64)
    ends = np.ceil(FRACTIONS * squares.size).astype(int) - 1
    return np.sqrt(total[ends] / total[-1]).tolist()


def normal_coverage(fraction: float) -> float:
    """Returns the share of the norm in the largest entries of normal numbers.

    Example:
      >>> round(normal_coverage(0.01), 3)
      0.291
    """
    if fraction >= 1:
        return 1.0
    normal = NormalDist()
    z = normal.inv_cdf(1 - fraction / 2)
    return math.sqrt(2 * z * normal.pdf(z) + fraction)


def share(args: argparse.Namespace) -> dict[str, Any]:
    """Measures which part of the gradient is in its largest entries."""
    problem, found = load(args.tasks[0], args.model, args.scale, args.seed), {}
    for start in STARTS:
        params = problem.start(start, args.seed)
        found[start] = {}
        for number, now in problem.train(params, args.updates, args.learning_rate):
            grads = leaves_by_name(problem.gradient(now, problem.batches[0]))
            grads = {name: np.asarray(leaf) for name, leaf in grads.items()}
            layers = [leaf for name, leaf in grads.items() if name.startswith("layers")]
            tables = [leaf for name, leaf in grads.items() if name.startswith("embed")]
            by_layer = [
                coverage([leaf[i] for leaf in layers])[ONE_PERCENT]
                for i in range(len(layers[0]))
            ]
            found[start][number] = {
                "layers": coverage(layers), "embeddings": coverage(tables),
                "by_layer": by_layer,
            }  # fmt: skip
    reference = [normal_coverage(fraction) for fraction in FRACTIONS]
    rows = [
        (start, str(number), *(f"{100 * value:.1f}" for value in (
            row["layers"][ONE_PERCENT], min(row["by_layer"]), max(row["by_layer"]),
            row["embeddings"][ONE_PERCENT],
        )))
        for start, numbers in found.items() for number, row in numbers.items()
    ]  # fmt: skip
    rows.append(("normal numbers", "", f"{100 * reference[ONE_PERCENT]:.1f}"))
    _show(
        "Share of the gradient's norm in 1 % of the entries, %",
        ("weights", "updates", "all layers", "least of a layer", "most", "embeddings"),
        rows,
    )

    figure, (left, middle, right) = canvas(3)
    for start, color in STARTS.items():
        first, last = found[start][0], found[start][args.updates]
        left.plot(100 * FRACTIONS, first["layers"], color=color, label=start)
        middle.plot(first["by_layer"], "o-", color=color, label=start)
        if args.updates:
            late = f"{start}, after {args.updates} updates"
            left.plot(100 * FRACTIONS, last["layers"], "--", color=color, label=late)
            middle.plot(last["by_layer"], "o--", color=color, label=late, mfc="white")
        ones = [row["layers"][ONE_PERCENT] for row in found[start].values()]
        right.plot([*found[start]], ones, "o-", color=color, label=start)
    left.plot(100 * FRACTIONS, reference, ":", color="black", label="normal numbers")
    for axes in (middle, right):
        axes.axhline(reference[ONE_PERCENT], linestyle=":", color="black")
    left.set(xlabel="largest entries, % of all", xscale="log",
             ylabel="share of the norm, |g_S| / |g|")  # fmt: skip
    left.set_title("All layers", loc="left")
    middle.set(xlabel="layer", ylabel="share of the norm in 1 %")
    middle.set_title("Each layer", loc="left")
    right.set(xlabel="updates of full training", ylabel="share of the norm in 1 %")
    right.set_title("Over training", loc="left")
    for axes in (middle, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, middle, right):
        axes.set_ylim(0, 1.03)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, args.output / "share.png", f"{args.model_name}, {problem.name}")
    return {"fractions": FRACTIONS.tolist(), "normal": reference, "share": found}


def landscape(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the loss along random directions and along the gradient."""
    problem, found = load(args.tasks[0], args.model, args.scale, args.seed), {}
    batch = problem.batches[0]
    steps = np.linspace(-1, 1, args.scale.points)

    @jax.jit
    def moved(params: Params, direction: Params, step: jax.Array) -> Params:
        return {**params, "layers": jax.tree.map(
            lambda leaf, d: leaf + step * d, params["layers"], direction
        )}  # fmt: skip

    for start in STARTS:
        params = problem.start(start, args.seed)
        keys = jax.random.split(jax.random.key(args.seed), DIRECTIONS)
        directions = [_random_direction(params["layers"], key) for key in keys]
        grads = problem.gradient(params, batch)["layers"]
        size = optax.tree.norm(params["layers"]) / optax.tree.norm(grads)
        directions.append(jax.tree.map(lambda leaf, s=size: -s * leaf, grads))
        curves = [
            [float(problem.loss(moved(params, d, a), batch)) for a in steps]
            for d in directions
        ]
        found[start] = {"random": curves[:-1], "gradient": curves[-1]}
    columns = ("weights", "at the weights", "max - min, random", "max - min, gradient")
    rows = [
        (start, *(f"{value:.3f}" for value in (
            curves["random"][0][len(steps) // 2],
            np.ptp(curves["random"], axis=1).mean(),
            np.ptp(curves["gradient"]),
        )))
        for start, curves in found.items()
    ]  # fmt: skip
    _show("Loss along directions, nats; of the random ones the mean", columns, rows)

    figure, panels = canvas(2)
    for start, color in STARTS.items():
        for number, curve in enumerate(found[start]["random"]):
            label = None if number else start
            panels[0].plot(steps, curve, "o-", color=color, label=label, markersize=3)
        curve = found[start]["gradient"]
        panels[1].plot(steps, curve, "o-", color=color, label=start, markersize=3)
    for axes, title in zip(panels, ("Random directions", "Negative gradient"),
                           strict=True):  # fmt: skip
        axes.set(xlabel="step, in norms of the weights", ylabel="loss, nats")
        axes.set_title(title, loc="left")
        axes.legend(frameon=False)
    save(figure, args.output / "landscape.png", f"{args.model_name}, {problem.name}")
    return {"steps": steps.tolist(), "loss": found}


def _random_direction(layers: Params, key: jax.Array) -> Params:
    """Returns normal numbers with the norms of the columns of some weights."""
    leaves, structure = jax.tree.flatten(layers)
    keys = jax.random.split(key, len(leaves))

    def draw(leaf: jax.Array, key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, leaf.shape, leaf.dtype)
        # A column of a kernel (L, in, out) is what one output sees.
        norm = lambda x: jnp.linalg.norm(x, axis=1, keepdims=True)
        return noise * norm(leaf) / jnp.maximum(norm(noise), 1e-30)

    return structure.unflatten(map(draw, leaves, keys))


def overlap(args: argparse.Namespace) -> dict[str, Any]:
    """Measures which entries supports of the same model have in common."""
    problems = [load(word, args.model, args.scale, args.seed) for word in args.tasks]
    pick = functools.partial(_support, density=args.density)
    first, count = problems[0], args.scale.batches
    grads = lambda problem, i: problem.gradient(problem.params, problem.batches[i])
    average = lambda trees: jax.tree.map(lambda *leaves: sum(leaves), *trees)
    one = [pick(grads(first, i)) for i in range(count)]
    found: dict[str, list[float]] = {}
    found["two tasks"] = [
        _overlap(a, b)
        for a, b in combinations([pick(grads(problem, 0)) for problem in problems], 2)
    ]
    found["two batches"] = [_overlap(a, b) for a, b in combinations(one, 2)]
    half = len(first.batches) // 2
    sides = [range(half), range(half, 2 * half)]
    means = [pick(average([grads(first, i) for i in side])) for side in sides]
    found[f"{half} batches and {half} others"] = [_overlap(*means)]
    for number, now in first.train(first.params, args.updates, args.learning_rate):
        if number:
            later = pick(first.gradient(now, first.batches[0]))
            found[f"before and after {number} updates"] = [_overlap(one[0], later)]
    layers = {"layers": first.params["layers"]}
    keys = jax.random.split(jax.random.key(args.seed), 2)
    draw = lambda key: jax.tree.map(lambda x: jax.random.uniform(key, x.shape), layers)
    found["random supports"] = [_overlap(*(pick(draw(key)) for key in keys))]
    expected = args.density / (2 - args.density)
    title = f"{args.model_name}, {', '.join(problem.name for problem in problems)}"
    found = {name: values for name, values in found.items() if values}
    rows = [
        (name, str(len(values)), f"{100 * np.mean(values):.1f}",
         f"{100 * min(values):.1f} to {100 * max(values):.1f}")
        for name, values in found.items()
    ]  # fmt: skip
    rows.append(("random supports, expected", "", f"{100 * expected:.1f}", ""))
    columns = ("supports", "pairs", "mean", "range")
    _show(f"Shared entries, % of those in either, at {args.density:g}", columns, rows)

    figure, (axes,) = canvas(1)
    for place, values in enumerate(found.values()):
        axes.barh(place, 100 * np.mean(values), color=COLORS[1], alpha=0.5)
        axes.plot([100 * value for value in values], [place] * len(values), "o",
                  color=COLORS[1], markersize=4)  # fmt: skip
    axes.axvline(100 * expected, linestyle=":", color="black",
                 label="random supports, expected")  # fmt: skip
    axes.set_yticks(range(len(found)), [*found])
    axes.invert_yaxis()
    axes.set(xlabel="shared entries, % of those in either; dots are pairs")
    axes.legend(frameon=False)
    save(figure, args.output / "overlap.png", title)
    return {"density": args.density, "expected": expected, "overlap": found}


def _support(grads: Params, density: float) -> Adapter:
    """Returns the largest entries of every matrix in every layer."""
    support = {}
    for name, leaf in leaves_by_name(grads).items():
        if name.startswith("layers/") and leaf.ndim == 3:
            k = math.ceil(density * leaf[0].size)
            found = jax.lax.map(lambda layer, k=k: top_k_support(layer, k), leaf)
            support[name] = np.asarray(found)
    return Adapter(support, {name: np.zeros(s.shape) for name, s in support.items()})


def _overlap(first: Adapter, second: Adapter) -> float:
    """Returns the shared entries of all leaves as a fraction of those in either."""
    leaves = compare_supports(first, second).values()
    shared = sum(leaf.shared for leaf in leaves)
    return shared / (sum(leaf.first + leaf.second for leaf in leaves) - shared)


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


QUESTIONS = {"share": share, "landscape": landscape, "overlap": overlap}


def main() -> None:
    """Answers one of the questions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK=DATA")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--updates", type=int)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/sift_science"))
    args = parser.parse_args()
    options = {name: str(value) for name, value in vars(args).items()}
    args.scale, args.model_name = SCALES[args.scale], Path(args.model).resolve().name
    if args.updates is None:
        args.updates = args.scale.updates
    args.output.mkdir(parents=True, exist_ok=True)
    report = QUESTIONS[args.question](args)
    path = args.output / f"{args.question}.json"
    path.write_text(json.dumps({"options": options, **report}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
