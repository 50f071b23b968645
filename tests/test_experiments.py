"""Every experiment can be built, and the sweep runs and continues."""

import importlib
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import write_data, write_model
from tiny_text import write_decoder

from experiments import (
    commonsense,
    forgetting,
    glue,
    instruct,
    mmlu,
    mmlu_parity,
    proofreading,
    questions,
    quickstart,
    report,
    sift_science,
    sweep,
    tables,
    when_to_select,
)
from experiments.benchmarks import __main__ as all_benchmarks
from experiments.benchmarks import against_qwix, against_torch, generation, workers
from experiments.benchmarks import compile as compiling
from experiments.benchmarks.__main__ import BENCHMARKS
from experiments.benchmarks.result import Panel, Result, finish
from experiments.report import Report
from sparse_jax import InputError, Settings
from sparse_jax.data.glue import find_task
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.families.bert import ROBERTA
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.planning.abstract import read_model
from sparse_jax.supports.roles import SPARSE, map_roles
from sparse_jax.training.build import head_rules, method_of
from sparse_jax.training.results import count_trained

ROOT = Path(quickstart.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_an_experiment_executes_nothing_when_imported(module, capsys):
    assert importlib.import_module(module).__doc__
    assert capsys.readouterr().out == ""


def test_a_command_ends_in_one_line_on_wrong_input():
    paths = {*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")}
    # The sandbox is run by another program.
    texts = {path: path.read_text() for path in paths - {ROOT / "sandbox.py"}}
    guard = 'if __name__ == "__main__":\n'
    ends = {path: text.partition(guard) for path, text in texts.items()}
    assert not [
        path.name for path, (_, is_command, end) in ends.items()
        if is_command and end != "    run_command(main)\n"
    ]  # fmt: skip


def test_the_settings_of_the_paper_train_what_it_counts():
    # RoBERTa-large: 24 layers, 96 matrices of 1024 x 1024, 96 biases of 1024.
    config = EncoderConfig(
        vocab_size=50265, hidden_size=1024, num_layers=24, num_heads=16,
        intermediate_size=4096, max_positions=512, position_offset=2,
        type_vocab_size=1, pad_id=1,
    )  # fmt: skip
    params = Model(SequenceClassifier, ROBERTA, config).abstract()
    settings = glue.paper_settings("mrpc", "sift")
    method = method_of(settings, ("^classifier/",))
    sizes = map_roles(
        lambda role, leaf: leaf.shape[0] * method.support_size(role),
        method.roles(params), params, only=(SPARSE,),
    )  # fmt: skip
    # 806,208 in the released code, whose count is the same here: 0.008 of neither
    # 1024 x 1024 nor 1024 is whole.
    assert sum(jax.tree.leaves(sizes)) == 806_208


def test_every_published_number_belongs_to_a_setting():
    assert glue.PUBLISHED.keys() == glue.RELEASED.keys()
    for task in glue.RELEASED:
        assert find_task(task).name == task


def test_the_share_of_the_norm_in_the_largest_entries():
    # 4 of (1, 2, 2, 4) is 4 / 5 of the norm, and a quarter of the entries.
    found = sift_science.coverage([np.array([[1.0, -4.0]]), np.array([2.0, 2.0])])
    shares = dict(zip(sift_science.FRACTIONS.round(4), found, strict=True))
    assert shares[0.01] == shares[0.0001] == pytest.approx(0.8)
    assert shares[1.0] == 1
    # Of normal numbers, by as many of them.
    normal = np.random.default_rng(0).normal(size=400_000)
    one = sift_science.coverage([normal])[sift_science.ONE_PERCENT]
    assert sift_science.normal_coverage(0.01) == pytest.approx(one, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("question", sift_science.QUESTIONS)
def test_the_questions_about_sift_are_answered(question, tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", max_positions=32)
    data = write_data(tmp_path / "data")
    words = (
        f"sift_science {question} --model {model} --tasks sst2={data} sst2={data} "
        f"--scale tiny --updates 2 --output {tmp_path}"
    )
    monkeypatch.setattr(sys, "argv", words.split())
    sift_science.main()
    report = json.loads((tmp_path / f"{question}.json").read_text())
    assert question == "landscape" or report[question]
    picture = (tmp_path / f"{question}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_instruction_tuning_has_the_settings_of_the_paper():
    # density, learning rate, micro-batch of an update of 128, of SIFT.
    sift = {"7b": (0.05, 2e-4, 4), "13b": (0.04, 9e-5, 4), "33b": (0.03, 8e-5, 2)}
    for size, (density, rate, rows) in sift.items():
        found = instruct.settings_of(size, "sift")
        assert (found.density, found.learning_rate) == (density, rate)
        assert (found.batch_size, found.batch_size // found.accumulate) == (128, rows)
        assert (found.epochs, found.warmup, found.dtype) == (3, 0.03, "bfloat16")
    lora = instruct.settings_of("33b", "lora")
    assert (lora.rank, lora.alpha, lora.learning_rate) == (128, 256.0, 1e-4)
    assert "full" not in instruct.SIZES["33b"].rates


def test_ways_are_compared_where_they_come_down_to_a_loss():
    way = forgetting.Way((3.0, 2.0, 2.5, 1.0), (0.0, 0.2, 0.1, 0.4), (1, 2, 3, 4), 9)
    # Halfway between the first two, whatever comes later.
    assert forgetting.at_loss(way, 2.5) == pytest.approx((0.1, 1.5))
    assert forgetting.at_loss(way, 3.5) == (0.0, 1)
    assert forgetting.at_loss(way, 0.5) is None


def test_a_way_that_begins_below_the_loss_of_the_comparison_says_so(tmp_path, capsys):
    slow = forgetting.Way((3.0, 2.0), (0.01, 0.02), (1.0, 1.25), 9)
    fast = forgetting.Way((1.5, 1.0), (0.125, 0.25), (1.5, 2.0), 9)
    ways = {"slow": {1e-3: [slow]}, "fast": {1e-3: [fast]}}
    forgetting.show_ways(ways, "title", tmp_path / "forgetting")
    cells = capsys.readouterr().out.split("│")
    shown = [cell.strip() for cell in cells if "0.0200" in cell or "0.1250" in cell]
    assert shown == ["0.0200", "0.0200", "<= 0.1250"]


def test_a_picture_leaves_no_series_out(tmp_path):
    way = forgetting.Way((3.0, 2.0), (0.01, 0.02), (1.0, 1.25), 9)
    labels = []
    save = lambda figure, *_: labels.extend(
        text.get_text() for text in figure.axes[0].get_legend().get_texts()
    )
    with mock.patch.object(forgetting, "save", save):
        ways = {name: {1e-3: [way]} for name in "abcdefgh"}
        forgetting.show_ways(ways, "title", tmp_path / "forgetting")
    assert labels == [*"abcdefgh"]


def test_the_quickstart_compares_equal_budgets(tmp_path):
    layers, width = 4, 192
    of = lambda row: quickstart.settings_of(row, quickstart.BUNDLED, tmp_path, tmp_path)
    assert of("SIFT").density == of("random support").density
    lora = layers * 4 * of("LoRA").rank * 2 * width
    entries = layers * 4 * (width * width + width)
    assert abs(lora - of("SIFT").density * entries) < 1e-9 * lora


def test_the_quickstart_cannot_be_solved_by_a_bag_of_words(tmp_path):
    task, words = quickstart.write_task(tmp_path), [*"abcdefgh"]
    changed = quickstart.swapped(words, random.Random(0))
    assert sorted(changed) == words
    assert sum(a != b for a, b in zip(changed, words, strict=True)) == 6
    for split in ("train", "validation"):
        lines = (task / f"{split}.jsonl").read_text().splitlines()
        labels = [json.loads(line)["label"] for line in lines]
        assert abs(labels.count("swapped") - labels.count("in order")) <= 1


def test_other_weights_than_those_of_the_release_are_refused(tmp_path, monkeypatch):
    package = tmp_path / quickstart.PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="SHA-256 must be 53aa.*, got d9298a10"):
        quickstart.encoder_of(None)


def test_the_quickstart_has_an_encoder_without_any_package(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert quickstart.encoder_of(None) is quickstart.BUNDLED


@pytest.mark.parametrize("row", sorted({*proofreading.ROWS} - {"head", "full"}))
def test_every_rule_of_proofreading_trains_what_lora_does(row, tmp_path):
    model = read_model(str(quickstart.BUNDLED.path), "classification")
    settings = proofreading.settings_of_row(
        row, quickstart.BUNDLED, tmp_path, tmp_path, rate=1e-3
    )
    head = head_rules(("classifier",), ())
    params, method = model.abstract(jnp.float32), method_of(settings, head)
    added = jax.eval_shape(method.added, params, jax.random.key(0))
    trained = count_trained(method, params, added, head).trained_without_head
    kernels = 4 * 4  # of as many layers
    # By lanes 6 entries, not 5.3, of each column of two groups of up to 128 rows.
    expected = kernels * (12 * 192 + 12) if row == "lanes" else kernels * 2 * 4 * 192
    assert trained == pytest.approx(expected, rel=0.005)


@pytest.mark.slow
def test_proofreading_makes_each_run_once_and_shows_all(tmp_path, capsys):
    rows = ["lora", "sift", "sift-sum"]
    words = f"--model {quickstart.BUNDLED.path} --rows {' '.join(rows)} --seeds 0"
    more = f"--learning-rates 1e-3 --max-steps 9 --output {tmp_path}"
    proofreading.main([*words.split(), *more.split()])
    found = json.loads((tmp_path / "proofreading.json").read_text())
    assert [*found["rows"]] == rows
    sizes = [
        note["trained, no head"].replace(",", "") for note in found["notes"].values()
    ]
    assert max(map(int, sizes)) < 1.01 * min(map(int, sizes))
    runs = sorted(path.parent.name for path in tmp_path.glob("*/metrics.json"))
    assert runs == sorted(f"{row}-lr0.001-seed0" for row in rows)


@pytest.mark.slow
def test_a_sweep_continues_where_it_was(tmp_path, monkeypatch, capsys):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    words = (
        f"sweep --model {model} --task sst2 --data {data} --densities 0.2 "
        f"--ranks 1 --seeds 0 --learning-rates 1e-3 --max-steps 1 --max-length 8 "
        f"--output {tmp_path / 'out'}"
    )
    monkeypatch.setattr(sys, "argv", words.split())
    sweep.main()
    first = capsys.readouterr().out
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    stored = tmp_path / "out" / "sift-0.2-lr0.001-seed0" / "metrics.json"
    metrics = json.loads(stored.read_text())
    stored.write_text(json.dumps({**metrics, "eval": {"accuracy": 0.123}}))
    sweep.main()
    assert "12.3" in capsys.readouterr().out and "12.3" not in first


ROW_OF_24 = {"trained, no head": "1,544", "rate": "0.001"}


def test_a_report_shows_ours_with_its_spread_above_the_papers(tmp_path, capsys):
    rows = {"sift": {"mrpc": [0.5, 0.7], "rte": [0.2, 0.4]}}
    published = {"SIFT": {"mrpc": 90.4, "rte": 85.9}}
    report = Report(
        title="GLUE", rows=rows, notes={"sift": ROW_OF_24}, published=published
    )
    report.show()
    shown = capsys.readouterr().out
    # Means of the seeds are 35 and 55: 45, and 14.1 apart from it by the deviation.
    for cell in ("1,544", "60.0 ± 14.1", "30.0 ± 14.1", "45.0 ± 14.1", "88.2"):
        assert cell in shown, cell
    report.save(tmp_path / "glue")
    assert json.loads((tmp_path / "glue.json").read_text())["rows"] == rows
    assert (tmp_path / "glue.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_at_equal_budget_trains_as_many_entries_as_lora():
    base = Settings(model="", task="mrpc", output="", max_steps=4)
    settings = glue.settings_of("sift", base, 1e-3, 384)
    assert settings.density is not None
    assert round(settings.density * (384 * 384 + 384)) == 2 * glue.RANK * 384
    assert glue.settings_of("released", base, 1e-3, 384).optimizer is not None


def test_a_table_collects_the_runs_that_it_has_made(tmp_path, monkeypatch):
    made = []

    def run_once(settings):
        made.append(Path(settings.output).name)
        return {"trained_parameters_without_head": 8, "eval": {"accuracy": 0.5}}

    monkeypatch.setattr(glue, "run_once", run_once)
    words = "glue --tasks rte --rows sift --learning-rates 1e-3 1e-2 --seeds 0 1"
    tables.main([*words.split(), "--output", str(tmp_path)])
    assert made == [
        "sift-rte-lr0.001-seed0", "sift-rte-lr0.01-seed0",
        "sift-rte-lr0.001-seed0", "sift-rte-lr0.001-seed1",
    ]  # fmt: skip
    assert (tmp_path / "glue-tiny.json").is_file()


def test_differences_are_those_of_the_same_questions():
    right = np.array([True, True, False, True])
    other = {"a": right, "b": ~right}
    # Equal accuracies of the same answers differ by nothing, without an error.
    assert questions.paired([other], [other])["all"] == (0.0, 0.0)
    # One question of four, in one seed of two: 1 / 8 of a set of two.
    ours = [{"a": right | True, "b": ~right}, other]
    found = questions.paired(ours, [other, other])
    assert found["a"] == pytest.approx((1 / 8, 1 / 8))
    assert found["b"] == (0.0, 0.0)
    assert found["all"] == pytest.approx((1 / 16, 1 / 16))


def test_rows_on_questions_train_as_many_entries_as_lora(tmp_path):
    args = questions.parser_of("Table.", commonsense.BENCHMARK).parse_args([])
    args.model = str(write_decoder(tmp_path))
    changes = {"rank": 1, "answer_by": "cloze"}
    report.fill_in(args, {**questions.SCALES["small"], **changes})
    rows = questions.rows_of(args, commonsense.BENCHMARK)
    assert [*rows] == [*args.rows][1:]
    # 4 layers, 16 wide: query 16, key and value 8 and up and down 24 the other way.
    sides = (16 + 16) + 2 * (16 + 8) + 2 * (16 + 24)
    sizes = 16 * 16 + 2 * 16 * 8 + 2 * 16 * 24
    assert rows["sift"].density == pytest.approx(sides / sizes)
    assert (rows["lora+ist"].sampler, rows["lora+random"].sampler) == ("ist", "uniform")


def test_methods_beside_pytorch_run_with_what_they_are_compared_with():
    ours, theirs = "sparse_jax", "PyTorch"
    assert against_torch.programs_of(["SIFT + IST", "SIFT"]) == (
        ("LoRA", theirs), ("SIFT", ours), ("SHiRA", theirs), ("SIFT + IST", ours),
    )  # fmt: skip
    methods = [method for method, _ in against_torch.PROGRAMS]
    assert against_torch.programs_of(methods) == against_torch.PROGRAMS


def test_programs_are_compared_with_their_peers_round_by_round():
    def updates(*seconds, peak):
        rest = {"loss": 9.0, "trained": 5, "peak": peak, "read": 8, "since_start": 3.0}
        return [{"seconds": one, **rest} for one in (100.0, 50.0, *seconds)]

    rows = {
        ("LoRA", "sparse_jax"): updates(1.0, 3.0, peak=30),
        ("LoRA", "PyTorch"): updates(2.0, 2.0, peak=20),
        ("SIFT + IST", "sparse_jax"): updates(1.0, 1.0, peak=10),
    }
    lora, peer, ist = against_torch.summary(rows)
    # The first two updates, which compile and warm up, do not count.
    assert (lora["seconds"], lora["ratio"], lora["peak_ratio"]) == (2.0, 1.0, 1.5)
    assert lora["quartiles"] == [0.75, 1.25]
    # Beside the 8 of libraries and model.
    assert (lora["added"], lora["added_ratio"]) == (22, 22 / 12)
    assert (peer["ratio"], peer["quartiles"]) == (1.0, [1.0, 1.0])
    assert (ist["peer"], ist["ratio"], ist["peak_ratio"]) == ("LoRA", 0.5, 0.5)


def test_all_that_runs_beside_qwix_is_compared_with_its_lora():
    def updates(*seconds, added):
        rest = {"loss": 9.0, "trained": 5, "peak": 8 + added, "read": 8}
        starts = zip((100.0, 50.0, *seconds), (100.0, 150.0, 0.0, 0.0), strict=True)
        return [{"seconds": one, "since_start": at} | rest for one, at in starts]

    rows = {
        ("SIFT", "sparse_jax"): updates(1.0, 2.0, added=1),
        ("LoRA", "qwix"): updates(2.0, 2.0, added=4),
        ("SIFT", "tunix"): updates(4.0, 4.0, added=8),
    }
    ours, peer, theirs = against_qwix.summary(rows)
    assert (ours["time"], ours["added_ratio"]) == ("0.75", 0.25)
    assert (peer["time"], peer["spread"], peer["start"]) == ("1", "", 150.0)
    assert (theirs["time"], theirs["added_ratio"]) == ("2.00", 2.0)


def test_sift_beside_qwix_trains_as_many_entries_as_its_lora():
    shaped = lambda name, *shape: SimpleNamespace(**{name: np.zeros(shape)})
    # 4 wide, two heads of 3, 5 wide between.
    attn = SimpleNamespace(
        q_proj=shaped("w", 4, 2, 3), o_proj=shaped("w", 2, 3, 4), scale=1.0
    )
    mlp = SimpleNamespace(up_proj=shaped("kernel", 4, 5))
    layers = [SimpleNamespace(attn=attn, mlp=mlp)]
    network = SimpleNamespace(config=SimpleNamespace(embed_dim=4), layers=layers)
    entries = against_qwix.RANK * ((4 + 6) + (6 + 4) + (4 + 5))
    expected = entries / (4 * 6 + 6 * 4 + 4 * 5)
    assert against_qwix.density_of(network) == pytest.approx(expected)


def test_what_a_benchmark_lacks_is_named_with_what_brings_it(monkeypatch, capsys):
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    monkeypatch.setattr(workers.Path, "exists", lambda path: True)
    assert not workers.are_there("qwix", "tunix")
    told = "skipped: needs qwix, tunix; `pip install qwix google-tunix`.\n"
    assert capsys.readouterr().out == told


def test_texts_and_choices_that_differ_end_the_comparison():
    firsts = {
        (generation.WRITE, "sparse_jax"): {"found": [[1, 2], [3, 4]]},
        (generation.WRITE, "PyTorch"): {"found": [[1, 2], [3, 5]]},
    }
    with pytest.raises(SystemExit, match="PyTorch finds the same in 1 of 2"):
        generation.check(firsts)


def test_what_is_twice_as_slow_has_the_ratio_two():
    def steps(*seconds, scores):
        rest = {"found": [1, 0], "scores": scores, "peak": 10, "since_start": 9.0}
        return [{"seconds": one, **rest} for one in (7.0, 2.0, *seconds)]

    rows = {
        (generation.RANK, "sparse_jax"): steps(1.0, 1.0, scores=[-1.0, -2.0]),
        (generation.RANK, "PyTorch"): steps(2.0, 2.0, scores=[-1.0, -2.5]),
    }
    ours, theirs = generation.summary(rows, {generation.RANK: 6})
    assert (ours["rate"], ours["ratio"], ours["compile"]) == (6.0, 1.0, 6.0)
    assert (theirs["rate"], theirs["ratio"], theirs["nats"]) == (3.0, 2.0, 0.5)
    shown = generation.result_of([ours, theirs], "both")
    assert shown.name_of(shown.rows[1]) == "rank, PyTorch"


@pytest.mark.parametrize(
    ("shots", "subjects"), [(0, [0, 1, 2, 0, 1, 2]), (5, [0, 0, 0, 1, 1, 1])]
)
def test_a_step_of_questions_after_examples_is_of_one_subject(
    shots, subjects, tmp_path, monkeypatch
):
    names = ["anatomy", "astronomy", "virology"]
    monkeypatch.setattr(mmlu_parity, "MMLU_SUBJECTS", dict.fromkeys(names))
    monkeypatch.setattr(mmlu_parity, "CHUNK", 3)
    for part, count in (("dev", 5), ("test", 9)):
        (tmp_path / part).mkdir()
        for name in names:
            lines = [f"{name} {part} {i}?,1,2,3,4,A\n" for i in range(count)]
            (tmp_path / part / f"{name}_{part}.csv").write_text("".join(lines))
    found = mmlu_parity.questions_of(tmp_path, 6, shots)
    first = [question.question.split()[0] for _, question in found]
    assert first == [names[i] for i in subjects]
    assert all(prompt.count("dev") == shots for prompt, _ in found)


def test_choices_that_differ_are_counted_with_the_distance_of_the_letters():
    steps = lambda scores: [{"seconds": 1.0, "peak": 1, "scores": [scores]}] * 3
    rows = {
        ("mmlu", "sparse_jax"): steps([-1.0, -2.0, -3.0, -4.0]),
        ("mmlu", "PyTorch"): steps([-1.5, -1.25, -3.0, -4.0]),
    }
    asked = [("prompt", mmlu.ChoiceQuestion("Who?", (*"abcd",), "B"))] * 3
    ours, theirs = mmlu_parity.summary(rows, asked)
    assert (ours["same"], ours["margin"], ours["accuracy"]) == (3, None, 0.0)
    assert (theirs["same"], theirs["margin"], theirs["accuracy"]) == (0, 0.25, 1.0)
    assert theirs["nats"] == 0.75


def test_what_is_added_to_all_scores_does_not_move_the_area_under_the_roc_curve(
    tmp_path, monkeypatch
):
    positive = {"negative": [0.4, 0.2, 0.1], "positive": [0.9, 0.3]}  # 5 of 6 pairs
    line = lambda label, p: {
        "label": label,
        "scores": {"negative": 1 - p, "positive": p},
    }

    def predict(run, *, output, overwrite):
        lines = [line(label, p) for label in positive for p in positive[label]]
        output.write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(when_to_select, "predict", predict)
    area = when_to_select.area_of(tmp_path)
    assert area == pytest.approx(5 / 6)
    shifted = lambda p: 1 / (1 + (1 - p) / p * np.exp(9.0))
    positive = {label: [*map(shifted, of)] for label, of in positive.items()}
    assert when_to_select.area_of(tmp_path) == area


@pytest.mark.slow
@pytest.mark.parametrize(("method", "programs"), [("full", 1), ("SIFT", 2)])
def test_a_method_that_selects_compiles_a_selection_beside_its_update(method, programs):
    args = SimpleNamespace(shape="llama-tiny", batch_size=1, length=8)
    found = compiling.start(method, args)
    assert found["programs"] == programs
    assert min(found["tracing"], found["compiling"], found["peak"]) > 0


def test_all_benchmarks_are_named_once_and_are_modules():
    names = [one.name for one in BENCHMARKS]
    assert len(names) == len({*names})
    assert {f"experiments.benchmarks.{name}" for name in names} <= {*MODULES}


def test_benchmarks_beside_a_library_run_only_where_it_is_asked_for(
    tmp_path, monkeypatch, capsys
):
    commands = []

    def run(words):
        commands.append(words[2].rpartition(".")[2])
        stem = Path(words[words.index("--output") + 1])
        stem.with_suffix(".json").write_text("{}")
        return SimpleNamespace(returncode=int(commands[-1] == "lane"))

    monkeypatch.setattr(all_benchmarks.subprocess, "run", run)
    only = all_benchmarks.run_all([], ["lane", "memory"], tmp_path)
    assert (only, commands) == (1, ["memory", "lane"])
    shown = capsys.readouterr().out
    assert "memory.json" in shown and "failed, exit code 1" in shown
    commands.clear()
    all_benchmarks.run_all([], [], tmp_path)
    assert "against_torch" not in commands and "step_time" in commands
    commands.clear()
    all_benchmarks.run_all(["torch"], [], tmp_path)
    assert commands[-2:] == ["against_torch", "generation"]
    all_benchmarks.run_all(["torch", "qwix"], [], tmp_path)
    assert commands[-3:] == ["against_torch", "generation", "against_qwix"]


def test_a_result_is_a_table_a_file_and_a_picture(tmp_path, capsys):
    rows = [
        {"method": "SIFT", "ms": 2.0, "ratio": 0.5, "low": 0.4, "high": 0.6},
        {"method": "LoRA", "ms": 4.0, "ratio": 1.0, "low": 1.0, "high": 1.0},
    ]
    columns = {"method": "{method}", "ms": "{ms:.1f}", "ratio": "{ratio:.2f}"}
    panel = Panel("ratio", "ratio to LoRA", ("low", "high"), floor=1)
    result = Result(title="steps", rows=rows, columns=columns, panels=(panel,))
    finish(tmp_path / "new" / "steps", result)
    assert "│ SIFT   │ 2.0 │  0.50 │" in capsys.readouterr().out
    kept = json.loads((tmp_path / "new" / "steps.json").read_text())
    assert kept["rows"] == rows and kept["versions"]["jax"]
    assert (tmp_path / "new" / "steps.png").read_bytes().startswith(b"\x89PNG")
