"""train.py: what a run writes, resuming to the bit, signals, NaN, refusals, every arm.

Most runs are made inside this process by `cli`, which executes the script as `__main__` and so sees
exit statuses, messages and warnings (errors here) as a shell would, without the start of Python.
"""

import collections
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors
from matplotlib.figure import Figure

import autograd as ag
import osa_minimal
import relatives
import train
from fast.gpu import find_device
from training import checkpoint, data, optimizers, resume

ROOT = Path(train.__file__).parent
NAME = "checkpoint.safetensors"
FILES = [NAME, "config.json", "curves.png", "metrics.csv", "summary.json"]
COLUMNS = """step epoch lr train_loss train_accuracy validation_accuracy gradient_norm max_S_norm
orthogonality_error seconds""".split()
BUDGET = "--preset tiny --limit-data 200 --max-steps 4 --log-every 2 --threads 1".split()
# 150 images in batches of 50: an epoch has 3 steps.  49 tokens, more than the rank 2 d_v = 16.
SMALL = """--preset tiny --width 16 --patch 2 --batch-size 50 --limit-data 150 --epochs 3 --warmup 2
--log-every 1 --threads 1 --device cpu""".split()

SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no POSIX signals")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options of a small run, the last one the path of an .npz file: 300 + 100 images 14 × 14 that
    can be learnt, noise around 4 patterns."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (4, 14, 14))
    arrays = {}
    for part, n in (("train", 300), ("test", 100)):
        y = rng.permutation(np.arange(n) % 4)
        x = patterns[y] + rng.integers(0, 56, (n, 14, 14))
        arrays |= {f"x_{part}": x.astype(np.uint8), f"y_{part}": y.astype(np.uint8)}
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, **arrays)
    return [*SMALL, "--data", path]


Result = collections.namedtuple("Result", "code out err")


def touch(figure, path, **kw):
    Path(path).touch()


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def cli(*arguments, encoding="utf-8", stream=io.TextIOWrapper):
    """`python train.py ARGUMENTS` inside this process; signal handlers and variables are put back.

    An exception that the script lets through, which a user would see as a traceback, is raised.
    Drawing takes longer than these short runs, so curves.png stays empty.
    """
    out, err = (stream(io.BytesIO(), encoding=encoding, write_through=True) for _ in "oe")
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    argv, environ = sys.argv, dict(os.environ)
    sys.argv = ["train.py", *map(str, arguments)]
    code = 0
    quick = mock.patch.object(Figure, "savefig", touch)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quick:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environ)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Result(code, *(s.buffer.getvalue().decode(encoding) for s in (out, err)))


def shell(*arguments, python=(), **kw):
    """`python train.py ARGUMENTS` in a process of its own."""
    command = [sys.executable, *python, str(ROOT / "train.py"), *map(str, arguments)]
    kw |= {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": 120}
    done = subprocess.run(command, **kw)
    return Result(done.returncode, done.stdout, done.stderr)


def succeed(*arguments, **kw):
    result = cli(*arguments, **kw)
    assert (result.code, result.err) == (0, "")
    return result.out


def refuse(*arguments):
    """The one line on standard error with which the script refuses."""
    result, start = cli(*arguments), "train.py: error: "
    assert result.code == 2 and result.err.startswith(start), result
    assert result.err.find("\n") == len(result.err) - 1 > len(start), result.err
    return result.err


def rows_of(folder):
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def but_seconds(folder):
    return [{**row, "seconds": 0} for row in rows_of(folder)]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def json_of(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # no NaN


def weights(folder):
    return {k: a.tobytes() for k, a in checkpoint.load(folder / NAME)[0].items()}


def read_safetensors(path):
    """{name: array}, metadata."""
    with safetensors.safe_open(path, "np") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()


def prepare(small, *arguments):
    """The Run of these arguments, which has made no step."""
    given = list(map(str, [*small, *arguments]))
    config, args, _ = train.parse(train.Config, train.PRESETS, given)
    return train.Run(config, data.load(args.data))


# ------------------------------------------------------------------------------ what a run writes


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """Four steps on the bundled MNIST and an export, started in another folder with all warnings
    errors: (folder, Result)."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    result = shell(*BUDGET, "--out", "runs/a", "--export", "a.safetensors", python=["-W", "error"],
                   cwd=cwd)  # fmt: skip
    return cwd / "runs" / "a", result


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A run of five steps on the small data, and its folder."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    succeed(*small, "--max-steps", 5, "--out", folder)
    return folder


def test_a_run_warns_of_nothing_and_writes_the_documented_files_and_no_others(bundled):
    folder, result = bundled
    assert (result.code, result.err) == (0, "")
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert all(name in result.out for name in FILES)  # the last line says where they are
    raw = (folder / "curves.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and len(raw) > 10_000


def test_summary_has_the_documented_keys_and_true_values(bundled):
    folder, _ = bundled
    summary, rows = json_of(folder / "summary.json"), rows_of(folder)
    assert 0 <= summary["test_accuracy"] <= 1 and summary["steps"] == 4 and summary["seconds"] > 0
    assert 0 < summary["orthogonality_error"] <= 1e-5 and 0 < summary["max_S_norm"] < 1
    assert summary["train_loss"] == float(rows[-1]["train_loss"])
    arrays, _ = checkpoint.load(folder / NAME)
    count = sum(a.size for k, a in arrays.items() if k.startswith("model."))
    assert summary["parameters"] == count


def test_metrics_have_a_row_per_logging_step_with_the_documented_columns(bundled):
    rows = rows_of(bundled[0])
    assert list(rows[0]) == COLUMNS and [row["step"] for row in rows] == ["2", "4"]
    assert all(math.isfinite(float(v)) for row in rows for v in row.values())
    assert float(rows[0]["seconds"]) < float(rows[1]["seconds"])


def test_config_holds_every_setting_and_what_a_repetition_needs(bundled):
    about = json_of(bundled[0] / "config.json")
    assert set(about["config"]) == {f.name for f in dataclasses.fields(train.Config)}
    assert about["config"]["limit_data"] == 200 and "--max-steps 4" in about["command"]


def test_progress_lines_name_step_loss_accuracy_and_time_left(bundled):
    lines = [line for line in bundled[1].out.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in lines] == ["step 2", "step 4"]
    assert all(word in lines[-1] for word in ("loss", "train", "validation", "images/s", "left"))


def test_a_terminal_gets_a_bar_of_its_width_and_no_lines(small, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "20")
    out = succeed(*small, "--max-steps", 3, "--out", tmp_path, stream=Terminal)
    assert max(len(bar) for bar in out.splitlines() if "/9 [" in bar) < 120
    assert "3/9 [" in out and "loss" in out and "validation" in out and "step 3/" not in out
    assert out.endswith(f"files in {tmp_path}: {', '.join(FILES)}\n")


def test_eval_prints_the_test_accuracy_of_the_summary(bundled):
    folder, _ = bundled
    accuracy = json_of(folder / "summary.json")["test_accuracy"]
    out = succeed("--eval", folder / NAME, "--threads", 1, "--device", "cpu")
    assert f"testing on 10,000 images\ntest accuracy {accuracy:.2%}" in out
    assert sorted(p.name for p in folder.iterdir()) == FILES  # nothing else is written


def test_export_is_a_safetensors_file_of_the_model_and_its_configuration(bundled):
    folder, _ = bundled
    arrays, metadata = read_safetensors(folder.parent.parent / "a.safetensors")
    saved, meta = checkpoint.load(folder / NAME)
    model = {k.removeprefix("model."): a for k, a in saved.items() if k.startswith("model.")}
    assert set(arrays) == set(model)
    for name, a in arrays.items():
        assert a.shape == model[name].shape and a.tobytes() == model[name].tobytes(), name
    mean, std = meta["progress"]["statistics"]
    slope = osa_minimal.tailored_slope(2)  # eta was left to it
    about = {**meta["config"], "mean": mean, "std": std, "slope": slope}
    assert metadata == {k: str(v) for k, v in about.items()}


def test_eval_exports_the_same_file_as_training(trained, tmp_path):
    succeed("--eval", trained, "--device", "cpu", "--export", tmp_path / "m.safetensors")
    arrays, _ = read_safetensors(tmp_path / "m.safetensors")
    exported = {f"model.{k}": a.tobytes() for k, a in arrays.items()}
    assert exported.items() <= weights(trained).items()


def test_training_learns(small, tmp_path):
    options = "--patch 7 --width 64 --limit-data 200 --epochs 5 --warmup 5 --shift 0".split()
    succeed(*small, *options, "--out", tmp_path)
    summary = json_of(tmp_path / "summary.json")
    assert summary["steps"] == 20 and summary["test_accuracy"] > 0.9  # chance: 0.25
    assert summary["orthogonality_error"] <= 1e-5


def test_output_survives_a_terminal_without_the_letters_of_mathematics(small, tmp_path):
    assert "step 1/" in succeed(*small, "--max-steps", 1, "--out", tmp_path, encoding="cp1252")


def test_help_names_every_option_and_exits_0():
    out = succeed("--help")
    for field in dataclasses.fields(train.Config):
        assert "--" + field.name.replace("_", "-") in out
    for option in "device threads data max-steps log-every out resume eval export graph".split():
        assert f"--{option}" in out


# ------------------------------------------------------------------------------------ every arm


FIVE = list(relatives.ATTENTION)


@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("skip", ["none", "add"])
@pytest.mark.parametrize("attention", FIVE)
def test_two_steps_of_every_arm(attention, skip, norm, small, tmp_path):
    arm = ["--attention", attention, *["--skip"] * (skip == "add"), *["--norm"] * norm]
    succeed(*small, *arm, "--max-steps", 2, "--out", tmp_path)
    summary, rows = json_of(tmp_path / "summary.json"), rows_of(tmp_path)
    assert summary["steps"] == 2 and math.isfinite(summary["train_loss"])
    assert all(math.isfinite(float(row[k])) for row in rows for k in COLUMNS[:7])
    config = checkpoint.load(tmp_path / NAME)[1]["config"]
    assert (config["attention"], config["skip"], config["norm"]) == (attention, skip, norm)


@pytest.mark.parametrize("attention", [*relatives.LAYERS, "delta"])
def test_two_steps_of_every_relative(attention, small, tmp_path):
    """With skips and LayerNorm, which most of them assume, and the delta rule as skip; 4 tokens."""
    kind = ["--skip", "delta"] if attention == "delta" else ["--skip", "--attention", attention]
    arm = [*kind, "--norm", "--patch", 7, "--max-steps", 2]
    succeed(*small, *arm, "--out", tmp_path)
    assert all(math.isfinite(float(row[k])) for row in rows_of(tmp_path) for k in COLUMNS[:7])


@pytest.mark.parametrize("attention", FIVE[1:])
def test_one_head_is_enough_for_every_attention_without_angles(attention, small, tmp_path):
    succeed(*small, "--attention", attention, "--heads", 1, "--max-steps", 2, "--out", tmp_path)
    if attention in ("softmax", "xsa"):
        assert checkpoint.load(tmp_path / NAME)[0]["model.layers.0.W_QK"].shape == (1, 16, 32)


def test_with_one_head_the_query_and_key_weights_are_orthogonal_each(rng):
    W = relatives.ATTENTION["softmax"](16, 1, rng).parameters["W_QK"].data[0]
    for half in (W[:, :16], W[:, 16:]):
        assert abs(half.T @ half - np.eye(16)).max() < 16 * 1.2e-7


def test_the_operator_of_the_paper_trains_as_the_fast_one_does(small):
    fast, paper = (prepare(small, "--operator", name) for name in ("fast", "paper"))
    assert type(paper.model.layers[0][0]) is osa_minimal.MultiHeadOSA
    losses = [[float(run.step(t)[0]) for t in range(4)] for run in (fast, paper)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # some 100 eps
    assert (fast.weights != paper.weights).any()  # in rounding


@pytest.mark.parametrize("arm, value", [("--attention softmax", None), ("--s-norm 0", 0)])
def test_an_arm_without_rotations_says_so_and_still_has_its_curves(arm, value, small, tmp_path):
    options = [*small, *arm.split(), "--max-steps", 2, "--out", tmp_path]
    result = shell(*options, python=["-W", "error"])
    summary = json_of(tmp_path / "summary.json")
    assert (result.code, result.err) == (0, "")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert summary["orthogonality_error"] == summary["max_S_norm"] == value


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_is_a_valid_configuration(preset):
    config, _, _ = train.parse(train.Config, train.PRESETS, ["--preset", preset])
    model = train.build(config, image=(28, 28), classes=10)
    assert len(model.layers) == config.depth


# ----------------------------------------------------------------------- repeating and resuming


ARMS = {
    "muon": [],
    "adamw": ["--optimizer", "adamw", "--lr", "0.002", "--weight-decay", "0.1"],
    "two threads": [],
    "fixed-orthogonal": ["--attention", "fixed-orthogonal"],  # its matrices are not in the file
}


@pytest.fixture(scope="module", params=ARMS)
def uninterrupted(request, small, tmp_path_factory):
    """Arguments, and the folder of a run of 7 steps with them (an epoch has 3)."""
    threads = ["--threads", 2 if request.param == "two threads" else 1]
    arguments = [*SMALL[:-4], *SMALL[-2:], *ARMS[request.param], "--data", small[-1]]
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    succeed(*arguments, *threads, "--max-steps", 7, "--out", folder)
    return arguments, threads, folder


@pytest.mark.parametrize("stop", [3, 4], ids=["between epochs", "within an epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(uninterrupted, stop, tmp_path):
    arguments, threads, whole = uninterrupted
    folder = tmp_path / "run"
    succeed(*arguments, *threads, "--max-steps", stop, "--out", folder)
    assert checkpoint.load(folder / NAME)[1]["progress"]["step"] == stop
    succeed(*arguments, "--max-steps", 7, "--resume", folder)  # with as many threads
    assert weights(folder) == weights(whole)
    assert but_seconds(folder) == but_seconds(whole)
    for key in ("test_accuracy", "train_loss", "steps", "orthogonality_error", "max_S_norm"):
        assert json_of(folder / "summary.json")[key] == json_of(whole / "summary.json")[key], key


def test_a_resumed_run_reads_the_data_it_was_trained_on(trained, small, tmp_path):
    succeed(*small, "--max-steps", 2, "--out", tmp_path)
    succeed("--resume", tmp_path / NAME, "--max-steps", 5, "--log-every", 1, "--device", "cpu")
    assert weights(tmp_path) == weights(trained)


def test_the_same_seed_gives_the_same_weights_however_rarely_a_row_is_written(
    trained, small, tmp_path
):
    succeed(*small, "--log-every", 4, "--max-steps", 5, "--out", tmp_path)
    assert weights(tmp_path) == weights(trained)


def test_the_summary_alone_is_enough_to_repeat_a_run_to_the_bit(small, tmp_path):
    changed = "--seed 3 --eta 0.35 --optimizer adamw --lr 0.002 --weight-decay 0.1 --norm".split()
    succeed(*small, *changed, "--max-steps", 4, "--out", tmp_path / "a")
    summary = json_of(tmp_path / "a" / "summary.json")
    repeat, arguments = summary["repeat"], ["--device", "cpu", "--max-steps", summary["steps"]]
    for name, value in {**repeat["config"], **{k: repeat[k] for k in ("data", "threads")}}.items():
        option = "--" + name.replace("_", "-")
        arguments += [option] * value if isinstance(value, bool) else [option, value]
    succeed(*arguments, "--out", tmp_path / "b")
    assert weights(tmp_path / "b") == weights(tmp_path / "a")
    assert {"python", "numpy", "commit", "processor", "device", "data_crc32"} <= set(repeat)


def test_the_seed_decides_the_first_weights_and_the_validation_images(small):
    first, again, other = (prepare(small, "--seed", seed) for seed in "001")
    assert (again.x_val == first.x_val).all() and (other.x_val != first.x_val).any()
    for k, p in first.parameters.items():
        assert (again.parameters[k].data == p.data).all(), k
        assert (other.parameters[k].data != p.data).any() or "W_" not in k, k


def test_rows_after_a_signal_average_as_many_steps_as_without_it(small, tmp_path, monkeypatch):
    arguments = [*small, "--log-every", 2]
    succeed(*arguments, "--max-steps", 6, "--out", tmp_path / "whole")
    schedule, calls = optimizers.schedule, []

    def third(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return schedule(*args)

    monkeypatch.setattr(optimizers, "schedule", third)
    assert cli(*arguments, "--out", tmp_path / "parts").code == 130
    succeed("--resume", tmp_path / "parts", "--max-steps", 6, "--device", "cpu")  # and --log-every
    assert [row["step"] for row in rows_of(tmp_path / "parts")] == ["2", "4", "6"]
    assert but_seconds(tmp_path / "parts") == but_seconds(tmp_path / "whole")


def test_other_images_are_tested_as_the_training_images_were_but_not_trained_on(
    trained, small, tmp_path
):
    arrays, other = dict(np.load(small[-1])), ["--data", tmp_path / "dark.npz", "--device", "cpu"]
    np.savez(tmp_path / "dark.npz", **arrays | {"x_train": arrays["x_train"] // 4})
    accuracy = json_of(trained / "summary.json")["test_accuracy"]  # of the same test images
    assert f"test accuracy {accuracy:.2%}" in succeed("--eval", trained / NAME, *other)
    assert "not the images it was trained on" in refuse("--resume", trained, *other)


def test_a_checkpoint_is_saved_after_each_epoch_and_each_minute(small, tmp_path, monkeypatch):
    steps, save = [], checkpoint.save

    def seen(path, arrays, meta):
        steps.append(meta["progress"]["step"])
        save(path, arrays, meta)

    monkeypatch.setattr(checkpoint, "save", seen)
    for out, seconds in (("a", 60), ("b", -1)):
        monkeypatch.setattr(resume, "SECONDS", seconds)
        succeed(*small, "--max-steps", 7, "--out", tmp_path / out)
    assert steps == [3, 6, 7, *range(1, 8)]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_more_epochs_go_on_and_fewer_are_refused(small, tmp_path):
    succeed(*small, "--epochs", 2, "--out", tmp_path)
    out = succeed("--resume", tmp_path, "--epochs", 3, "--device", "cpu")
    assert "epochs 2 → 3" in out and json_of(tmp_path / "summary.json")["steps"] == 9
    assert [row["step"] for row in rows_of(tmp_path)] == list("123456789")
    line = refuse("--resume", tmp_path, "--epochs", 1)
    assert "epochs differs: 3 in the checkpoint, 1 here" in line


def test_colour_and_rectangular_images_train_and_are_tested_alone(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 40), ("test", 9)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (n, 8, 12, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % 4
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **{k: a for k, a in arrays.items() if k.endswith("test")})
    options = ["--patch", 4, "--epochs", 1, "--limit-data", 30, "--data", tmp_path / "a.npz"]
    succeed(*SMALL, *options, "--out", tmp_path / "run")
    accuracy = json_of(tmp_path / "run" / "summary.json")["test_accuracy"]
    out = succeed("--eval", tmp_path / "run", "--data", tmp_path / "b.npz", "--device", "cpu")
    assert f"test accuracy {accuracy:.2%}" in out


def test_rows_after_the_checkpoint_are_written_anew(small, tmp_path):
    succeed(*small, "--max-steps", 3, "--out", tmp_path)
    saved = (tmp_path / NAME).read_bytes()
    for steps in (5, 4):
        (tmp_path / NAME).write_bytes(saved)
        succeed("--resume", tmp_path, "--max-steps", steps, "--device", "cpu")
        assert [row["step"] for row in rows_of(tmp_path)] == list("12345")[:steps]


@pytest.mark.parametrize("steps", [5, 2])
def test_a_run_resumed_for_no_further_step_stays_as_it_was(steps, trained, small):
    before = weights(trained)
    out = succeed(*small, "--max-steps", steps, "--resume", trained)
    assert "\n5 steps took " in out and " s in all\n" in out
    assert weights(trained) == before and json_of(trained / "summary.json")["steps"] == 5
    assert [row["step"] for row in rows_of(trained)] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_is_float32_throughout(optimizer, small):
    run, seen = prepare(small, "--optimizer", optimizer, "--norm", "--skip"), []
    run.model.last_norm = lambda X, inner=run.model.last_norm: seen.append(X) or inner(X)
    for t in range(2):
        loss, _, norm = run.step(t)
        assert loss.dtype == norm.dtype == np.float32
    assert [X.data.dtype for X in seen] == 2 * [np.float32]  # the tokens after all layers
    state = resume.state(run.parameters, run.updates)
    assert {a.dtype for a in state.values()} == {np.dtype(np.float32)}
    assert sum(k.startswith("optimizer.") for k in state) >= len(run.parameters)
    logits = run.model(run.standardise(run.x_val[:4]))
    ag.cross_entropy(logits, run.y_val[:4]).backward()
    assert {p.grad.dtype for p in run.parameters.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("attention", FIVE)
def test_every_parameter_belongs_to_exactly_one_optimizer(attention, small):
    run, names = prepare(small, "--attention", attention, "--adam-lr", 0.02), []
    for optimizer, part, rate in run.updates:
        muon, ours = isinstance(optimizer, optimizers.Muon), optimizer.parameters
        alpha = any(k.endswith(".alpha") for k in ours)
        assert np.all(rate == (0.01 * abs(run.weights[part]) if alpha else 0.01 if muon else 0.02))
        for (k, p), w in zip(ours.items(), optimizers.views(run.weights[part], ours)):
            assert np.shares_memory(p.data, w) and (p.data == w).all()
            assert k.endswith(".alpha") == alpha
            if "W_QK" in run.model.layers[0][0].parameters:  # not another's layer
                assert muon == (k.rpartition(".")[2] in ("W_QK", "W_V", "W_O", "W_1", "W_2"))
        names += ours
    assert sorted(names) == sorted(run.model.parameters)


def test_the_steps_of_an_epoch_take_every_image_once_in_an_order_of_its_own(small):
    batches, orders = prepare(small, "--limit-data", 170).batches, []  # 20 of them wait
    assert (batches.size, batches.per_epoch) == (50, 3)
    for epoch in (0, 1):
        chosen, offsets = zip(*(batches.choose(3 * epoch + i) for i in range(3)))
        orders.append(np.concatenate(chosen))
        assert len(set(orders[-1])) == 150 and (orders[-1] < 170).all()
        assert set(np.concatenate(offsets).ravel()) == {0, 1, 2}
    assert (orders[0] != orders[1]).any()
    again, step = prepare(small, "--limit-data", 170).batches, batches.choose(4)
    assert all((a == b).all() for a, b in zip(again.choose(4), step))  # from its middle
    x, y = batches.images(np.array([7]), np.array([[0, 2]]))  # one down, one to the left
    assert (x[0] == batches.x[7, 0:14, 2:16]).all() and y == batches.y[7]


def test_the_learning_rate_of_a_row_is_that_of_the_matrices(small, tmp_path):
    for optimizer in ("muon", "adamw"):
        arguments = ["--optimizer", optimizer, "--lr", 0.5e-3, "--max-steps", 2]
        succeed(*small, *arguments, "--out", tmp_path / optimizer)
        assert [float(row["lr"]) for row in rows_of(tmp_path / optimizer)] == [0.25e-3, 0.5e-3]


# -------------------------------------------------------------------------------- signals and NaN


def start(*arguments, cwd, **kw):
    """A training process that has made its first step."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", **kw,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step "):
            return process
    raise AssertionError(f"no step was made: {process.communicate()}")


NOTED = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR2": 140}


@posix
@pytest.mark.parametrize("name, code", NOTED.items(), ids=NOTED)
def test_a_signal_leaves_a_checkpoint_from_which_resuming_goes_on(name, code, small, tmp_path):
    long, folder = [*small, "--epochs", 10_000], tmp_path / "run"
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}  # also under nohup
    process = start(*long, "--out", "run", cwd=tmp_path, **heard)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.count("\n") == 1 and name in err and "--resume run" in err
    step = checkpoint.load(folder / NAME)[1]["progress"]["step"]
    assert step >= 1 and not (folder / "summary.json").exists()
    succeed(*long, "--resume", folder, "--max-steps", step + 2)
    assert json_of(folder / "summary.json")["steps"] == step + 2
    assert [int(row["step"]) for row in rows_of(folder)] == list(range(1, step + 3))


@posix
def test_a_closed_terminal_does_not_stop_what_nohup_began(small, tmp_path):
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = start(*small, "--epochs", 10, "--out", "run", cwd=tmp_path, **ignore)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json_of(tmp_path / "run" / "summary.json")["steps"] == 30


@posix
def test_a_second_signal_stops_at_once(small, tmp_path):
    process = start(*small, "--epochs", 10_000, "--out", "run", cwd=tmp_path)
    for name in ("SIGSTOP", "SIGINT", "SIGTERM", "SIGCONT"):  # so that both arrive within one step
        process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 143) and "Traceback" not in err
    assert "stopped after step" not in err  # nothing was waited for


def test_ctrl_c_before_training_exits_130_without_a_traceback(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    try:
        result = cli("--preset", "tiny", "--device", "cpu")
    except KeyboardInterrupt:
        pytest.fail("a traceback")
    assert result.code == 130 and result.err.count("\n") <= 1


def test_main_puts_the_handlers_of_signals_back(small, tmp_path):
    before = [signal.getsignal(s) for s in SIGNALS]
    train.main(list(map(str, [*small, "--max-steps", 1, "--out", tmp_path / "a"])))
    assert [signal.getsignal(s) for s in SIGNALS] == before


DIVERGING = [("--optimizer muon", 1), ("--optimizer adamw", 1), ("--optimizer adamw", 50)]
DIVERGING += [("--attention softmax --optimizer adamw", n) for n in (1, 50)]


@pytest.mark.parametrize("arm, log_every", DIVERGING)
def test_a_loss_that_is_not_finite_exits_1_naming_the_step(arm, log_every, small, tmp_path):
    options = ["--warmup", 0, "--lr", "1e12", "--adam-lr", "1e12", "--log-every", log_every]
    result = shell(*small, *options, *arm.split(), "--out", tmp_path)
    assert result.code == 1 and "Traceback" not in result.err, result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("train.py: ") and "at step " in last
    assert log_every > 1 or "at step 1" in last or "at step 2" in last
    saved = (tmp_path / NAME).exists()
    assert ("the last good checkpoint is" in last) == saved
    if saved:
        arrays, _ = checkpoint.load(tmp_path / NAME)
        assert all(np.isfinite(a).all() for a in arrays.values())
    assert not (tmp_path / "summary.json").exists()


# -------------------------------------------------------------------------------------- refusals


REFUSED = {
    "--dpeth 3": "--dpeth", "--dep 3": "--dep", "mnist": "mnist", "--depth": "--depth",
    "--preset mnits": "mnits|did you mean 'mnist'",
    "--attention sofmax": "sofmax|did you mean 'softmax'",
    "--optimizer adam": "adam|did you mean 'adamw'",
    "--operator slow": "slow|paper", "--device gpu": "gpu|cuda",
    "--operator paper --attention xsa": "--operator paper|osa|xsa",
    "--depth four": "--depth|four", "--depth 2.5": "--depth|2.5", "--depth 1e400": "--depth|1e400",
    "--lr 1e400": "--lr|1e400", f"--epochs 1{310 * '0'}": "--epochs|from 1 to",
    "--seed 123456789012345678901234": "--seed|from 0 to",
    "--depth 2 --eta 0.9": "eta|0.9|depth 2", "--width 64 --heads 5": "5 heads|width 64",
    "--heads 1": "heads|at least 2|1", "--patch 5": "patch|got 5|14, 14",
    "--shift 14": "shift 14|14, 14", "--limit-data 1000": "1000|300", "--graph": "--graph|GPU",
    "--threads 0": "--threads|0 is not from 1 to", "--threads ²": "--threads|²",
    "--log-every 0": "--log-every", "--max-steps 0": "--max-steps", "--max-steps -3": "--max-steps",
    "--resume a --eval b": "--resume|--eval", "--resume a --out b": "--resume|--out",
    "--eval missing.npz": "missing.npz", "--resume missing": "missing",
}  # fmt: skip
BOUNDS = {
    "depth": "0 -1", "width": "0", "heads": "0 -2", "patch": "0", "mlp-ratio": "0",
    "epochs": "0 -1", "batch-size": "0 -5", "eta": "-0.5 nan 1e400", "clip": "0 -1 nan",
    "lr": "-1 nan inf", "adam-lr": "-1 nan", "alpha-lr": "-1 nan", "weight-decay": "-1 nan",
    "s-norm": "-1 nan inf 1e300", "warmup": "-1", "shift": "-1", "limit-data": "-1", "seed": "-1",
}  # fmt: skip
REFUSED |= {f"--{k} {v}": f"--{k}" for k, values in BOUNDS.items() for v in values.split()}
EMPTY = "preset attention depth eta data out resume eval export threads".split()
REFUSED |= {f"--{name} ": f"--{name}" for name in EMPTY}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    case, small, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = case.split(" ")
    given = {a for a in arguments if a.startswith("--")}
    base = "--preset tiny --limit-data 200 --max-steps 1 --device cpu --data".split() + small[-1:]
    base = [x for k, v in zip(base[::2], base[1::2]) if k not in given for x in (k, v)]
    line = refuse(*base, *arguments)
    assert all(word in line for word in REFUSED[case].split("|")), line
    assert list(tmp_path.iterdir()) == []


def test_one_image_is_enough_to_train_on(small, tmp_path):
    succeed(*small, "--limit-data", 1, "--max-steps", 2, "--out", tmp_path)
    assert json_of(tmp_path / "summary.json")["steps"] == 2


def test_a_gpu_that_is_not_there_is_refused_with_what_to_install(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if find_device("auto")[0] is not np:
        pytest.skip("there is a GPU")
    line = refuse("--preset", "tiny", "--data", small[-1], "--device", "cuda")
    assert "pip install -r requirements-cuda12.txt" in line and list(tmp_path.iterdir()) == []


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def _alter(path):
    """Turns one bit in the last array."""
    raw = bytearray(path.read_bytes())
    raw[-300] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [Path.unlink, _truncate, _alter])
@pytest.mark.parametrize("option", ["--eval", "--resume"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(option, damage, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / NAME)
    before = contents(tmp_path)
    assert NAME in refuse(option, tmp_path)
    assert contents(tmp_path) == before


STRANGE = {
    "no configuration": lambda meta: meta.pop("config"),
    "a field less": lambda meta: meta["config"].pop("depth"),
    "a word for the depth": lambda meta: meta["config"].update(depth="four"),
    "another depth": lambda meta: meta["config"].update(depth=3),
    "a norm below 0": lambda meta: meta["config"].update(clip=-1.0),
    "an empty progress": lambda meta: meta.update(progress={}),
    "a negative deviation": dict(statistics=[0.1, -0.3]),
    "no deviation": dict(statistics=[0.1, 0.0]),
    "a sum too few": dict(sums=[1.0, 2.0]),
    "a step before the first": dict(step=-1),
    "a word for the image": dict(image=["14", 14, 1]),
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize("option", ["--eval", "--resume"])
def test_a_checkpoint_of_something_else_is_refused(option, case, trained, tmp_path):
    arrays, meta = checkpoint.load(trained / NAME)
    change = STRANGE[case]
    change(meta) if callable(change) else meta["progress"].update(change)
    checkpoint.save(tmp_path / NAME, arrays, meta)
    refuse(option, tmp_path)
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("option", ["--eval", "--resume"])
def test_another_configuration_is_refused_by_its_first_field_that_differs(option, trained):
    before = weights(trained)
    line = refuse(option, trained / NAME, "--width", 32, "--lr", 0.5)
    assert "width differs: 16 in the checkpoint, 32 here" in line and "lr" not in line
    assert weights(trained) == before


@pytest.mark.parametrize("option, words", [("--eval", "images must have shape (14, 14, 1), got"),
                                           ("--resume", "not the images it was")])  # fmt: skip
def test_a_checkpoint_of_images_of_another_size_is_refused(option, words, trained):
    assert words in refuse(option, trained / NAME, "--data", data.BUNDLED)


def test_a_state_with_nan_is_never_saved(small, tmp_path):
    run, message = prepare(small), "contains NaN or Inf, at step 0; none was saved yet"
    run.weights[7] = np.nan
    with pytest.raises(FloatingPointError, match=message):
        with resume.Saver(tmp_path, run, resume.Progress()) as saver:
            saver.save()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_folder_with_one_file_of_a_run_is_not_overwritten(name, small, tmp_path):
    (tmp_path / name).write_text("precious")
    assert "holds a run already" in refuse(*small, "--max-steps", 1, "--out", tmp_path)
    assert contents(tmp_path) == {name: b"precious"}


PLACES = ["--out file", "--out file/run", f"--out {80 * 'long'}", f"--export {NAME}"]
PLACES += [f"--export {name}" for name in ("none/m.safetensors", "file/m.safetensors", "m", "f")]


@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_written_is_refused_before_training(place, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "f").mkdir()
    out = ["--out", "run"] if "--export" in place else []
    assert place.split()[1] in refuse(*small, "--max-steps", 1, *out, *place.split())
    assert sorted(os.listdir()) == ["f", "file"] and Path("file").read_text() == "precious"
