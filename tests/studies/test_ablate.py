"""Ablations: all flags checked first, each training done once, and a table that says what the run folders say."""

import json
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastcifar.cli import main
from fastcifar.recipes import AS_IT_IS, NAMED, find_recipe
from fastcifar.studies.ablate import Ablation, plan, plan_trainings, removable
from fastcifar.studies.fields import has_field, read_field

TINY = ["--dataset", "shapes10", "--device", "cpu", "--steps", "4", "--batch-size", "100"]
STUDY = ["ablate", "mlp", "--without", "dropout", "--vary", "dropout=0,0.2", "--vary", "optim.lr=1e30", "--seeds", "2"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished one: six trainings, of which two diverged."""
    folder = tmp_path_factory.mktemp("ablate") / "study"
    done = fastcifar(*STUDY, *TINY, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done


def fastcifar(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fastcifar", *words], capture_output=True, text=True)


def test_the_figures_are_those_of_the_run_folders(study):
    folder, done = study
    report = json.loads((folder / "ablation.json").read_text())
    assert (report["recipe"], report["dataset"], report["device"]) == ("mlp", "shapes10", "cpu")
    names = ["baseline", "without dropout", "dropout=0", "dropout=0.2", "optim.lr=1e30"]
    assert [entry["variant"] for entry in report["variants"]] == names
    table = (folder / "ablation.md").read_text()
    own = None
    for entry in report["variants"][:4]:
        runs = [folder / entry["folder"] / f"seed{seed}" for seed in (0, 1)]
        results = [json.loads((run / "result.json").read_text()) for run in runs]
        rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
        looks = [max(row["val_accuracy"] for row in run if "val_accuracy" in row) for run in rows]
        cells = []
        for key in ("val_acc", "best_val_acc", "test_acc", "test_acc_tta"):
            seen = looks if key == "best_val_acc" else [result[key] for result in results]
            assert [seed[key] for seed in entry["seeds"]] == seen
            assert entry["mean"][key] == pytest.approx(statistics.mean(seen))
            assert entry["spread"][key] == pytest.approx(statistics.stdev(seen))
            cells.append(f"{100 * statistics.mean(seen):.2f} ± {100 * statistics.stdev(seen):.2f}")
        assert f"| {' | '.join(cells)} |" in table
        assert all(cell in done.stdout for cell in cells)
        mean = statistics.mean(result["test_acc_tta"] for result in results)
        own = mean if own is None else own
        difference = None if entry["as_recipe"] else pytest.approx(mean - own)
        assert entry["difference"] == difference


def test_what_is_the_same_training_is_trained_once(study):
    folder, _ = study
    report = json.loads((folder / "ablation.json").read_text())
    folders = [entry["folder"] for entry in report["variants"]]
    assert folders == ["baseline", "without-dropout", "without-dropout", "baseline", "optim.lr=1e30"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(folders)
    assert [entry["as_recipe"] for entry in report["variants"]] == [True, False, False, True, False]


def test_a_variant_that_diverges_is_a_row(study):
    folder, done = study
    last = json.loads((folder / "ablation.json").read_text())["variants"][-1]
    assert all("diverged" in seed for seed in last["seeds"])
    assert (last["mean"], last["difference"]) == ({}, None)
    assert "| optim.lr=1e30 | diverged |" in (folder / "ablation.md").read_text()
    assert re.search(r"optim.lr=1e30 +diverged", done.stdout)


def test_progress_names_the_variant_and_the_time_left(study):
    said = study[1].stderr
    assert "variant 1 of 3, baseline, seed 0: 0 of 6 trainings done\n" in said
    assert re.search(r"variant 2 of 3, without dropout, seed 1: 4 of 6 trainings done; \d+ s left", said)


def test_the_picture_is_one(study):
    from PIL import Image

    with Image.open(study[0] / "ablation.png") as picture:
        picture.verify()
        assert picture.width > picture.height > 300


def test_again_it_trains_nothing(study):
    folder, _ = study
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*")}
    report = (folder / "ablation.json").read_text()
    assert main([*STUDY, *TINY, "--out", str(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*")} == before
    assert (folder / "ablation.json").read_text() == report


def test_another_command_does_not_go_on_with_it(study, capsys):
    folder, _ = study
    assert main([*STUDY, *TINY, "--epochs", "1", "--out", str(folder)]) == 2
    assert main(["ablate", "mlp", "--without", "dropout", "--out", str(folder)]) == 2
    assert (
        "holds the trainings of another study.\n  try: fastcifar ablate mlp --without dropout"
        in capsys.readouterr().err
    )
    assert main(["ablate", "mlp", "--without", "dropout", "--out", str(folder / "baseline" / "seed0")]) == 2
    assert "is no study" in capsys.readouterr().err


def test_stopped_it_goes_on(tmp_path):
    folder = tmp_path / "study"
    words = ["ablate", "mlp", "--vary", "dropout=0,0.1", *TINY, "--steps", "200", "--out", str(folder)]
    process = subprocess.Popen([sys.executable, "-m", "fastcifar", *words], stderr=subprocess.PIPE, text=True)
    first, second = folder / "dropout=0" / "seed0", folder / "dropout=0.1" / "seed0"
    while not (second / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    again = " ".join([*words[:4], "--seeds 1", *words[4:]]).replace("batch-size", "batch_size")
    assert f"Go on with: fastcifar {again}" in said
    assert "Traceback" not in said
    assert not (second / "result.json").exists()
    finished = (first / "result.json").stat().st_mtime_ns
    assert fastcifar(*words).returncode == 0
    assert (first / "result.json").stat().st_mtime_ns == finished
    steps = [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs one word before all flags, RECIPE"),
        (["mlp", "cnn4", "--without", "dropout"], "needs one word before all flags, RECIPE"),
        (["--epochs", "5", "cnn4", "--without", "dropout"], "RECIPE, not 0.\n  try: fastcifar ablate --help"),
        (["mlp"], "--without PART or --vary"),
        (["nosuch", "--without", "dropout"], "nosuch"),
        (["mlp", "--without", "mix"], "batchnorm, dropout, augmentation, label_smoothing, tta"),
        (["mlp", "--as-reported", "--without", "augmentation"], "can be taken: batchnorm, dropout."),
        (["mlp", "--without"], "--without"),
        (["mlp", "--vary", "dropout"], "FIELD=VALUE"),
        (["mlp", "--vary", "dropout=0,,1"], "FIELD=VALUE"),
        (["mlp", "--vary", "dropout=0,2"], "--model.dropout: must be from 0 to 1"),
        (["mlp", "--vary", "dropout=much"], "much"),
        (["resnet34", "--vary", "dropout=0.1"], "uses no dropout.\n  try: fastcifar recipes show resnet34"),
        (["mlp", "--vary", "model.depth=3"], "model.depth.\n  try: fastcifar recipes show mlp"),
        (["mlp", "--vary", "model.checks=3"], "no field model.checks"),
        (["mlp", "--vary", "steps=3,4"], "steps"),
        (["mlp", "--vary", "optim.lr=1e-3,-1"], "--optim.lr: must be more than 0"),
        (["mlp", "--vary", "optim.lr=fast"], "optim.lr"),
        (["mlp", "--without", "dropout", "--bogus", "1"], "unrecognized arguments: --bogus 1\n  try: fastcifar ablate"),
        (["mlp", "--without", "dropout", "stray"], "unrecognized arguments: stray"),
        (["mlp", "--without", "dropout", "--seeds", "0"], "--seeds: must be at least 1"),
        (["mlp", "--without", "dropout", "--seeds", "few"], "--seeds"),
        (["mlp", "--without", "dropout", "--seed", "1"], "--seed: cannot be given"),
        (["mlp", "--without", "dropout", "--resume=x"], "--resume: cannot be given"),
        (["mlp", "--without", "dropout", "--patience", "2"], "--patience: cannot be given"),
        (["mlp", "--without", "dropout", "--targ", "0.9"], "--targ"),
        (["mlp", "--without", "dropout", "--steps", "0"], "--steps"),
    ],
)
def test_wrong_usage_ends_with_2_before_any_training(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "try: " in error
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.parametrize("as_reported", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_every_part_of_every_recipe_can_be_taken_away(name, as_reported):
    if as_reported and NAMED[name].reported is None:
        return
    recipe = find_recipe(name, as_reported)
    parts = removable(recipe)
    flags = ["--as_reported"] if as_reported else []
    for part, fields in parts.items():
        without = plan(Ablation(name, [part], [], 1, flags))[1].job.settings
        assert {field: read_field(without, field) for field in fields} == fields
        changed = {field.split(".")[0] for field in fields}
        assert replace(without, **{field: getattr(recipe, field) for field in changed}) == recipe
        assert part not in removable(without)


def test_without_augmentation_an_image_is_as_it_is():
    flags = ["--augment.policy", "randaugment", "--augment.saturation", "0.5", "--augment.hue", "0.1"]
    for recipe in ("speed", "mlp"):
        without = plan(Ablation(recipe, ["augmentation"], [], 1, flags))[1].job.settings
        assert replace(without.augment, border=AS_IT_IS.border) == AS_IT_IS


def test_the_short_name_of_dropout_means_those_that_are_used():
    flags = {name: plan(Ablation(name, [], ["dropout=0.25"], 1, []))[0] for name in ("cnn2", "cnn4", "dynamic4")}
    assert flags["cnn2"].words[-1] == "--model.block_dropout=0.25"
    assert flags["cnn4"].words[-1] == "--model.dropout=0.25"
    assert flags["dynamic4"].words[-1] == "--model.dropouts=[0.25, 0.25]"


def test_a_method_is_no_field():
    assert has_field(find_recipe("mlp"), "augment.crop_px")
    assert not any(has_field(find_recipe("mlp"), name) for name in ("check", "augment.repaints", "model.any_size", ""))


def test_a_sweep_alone_trains_no_baseline_and_lists_are_values():
    asked = Ablation("mlp", [], ["model.hidden=[16],[512],[8,8]", "batch_size=500,5e2,100"], 2, [])
    with pytest.raises(Exception, match="batch_size"):  # 5e2 is no whole number
        plan(asked)
    asked = replace(asked, vary=[asked.vary[0], "batch_size=500,100"])
    variants = plan(asked)
    assert [variant.value for variant in variants] == ["[16]", "[512]", "[8,8]", "500", "100"]
    names = [str(training.folder) for training in plan_trainings(asked, variants, Path())]
    different = ["model.hidden=[16]", "model.hidden=[512]", "model.hidden=[8,8]", "batch_size=100"]
    assert names == [f"{name}/seed{seed}" for seed in (0, 1) for name in different]
