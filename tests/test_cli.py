"""The command line as a person meets it: a process, its output, its exit code."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from fastcifar.cli import with_underscores
from fastcifar.errors import UsageError
from fastcifar.parsers import STUDIES, named_recipe, parse, read_job
from fastcifar.recipes import NAMED
from fastcifar.settings import ResNet34Model


def fastcifar(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fastcifar", *words], capture_output=True, text=True, **options)


def job_of(*words: str):
    return read_job(parse(["train", *map(with_underscores, words)])["train"])


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["ablate", "--help"],
        ["reproduce", "mlp", "--help"],
        ["recipes", "list"],
        ["--version"],
    ],
)
def test_what_needs_no_torch_does_not_import_it(words):
    script = (
        f"import sys; from fastcifar.cli import main\ntry: main({words})\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_verb_stands_in_the_help():
    shown = fastcifar("--help").stdout
    verbs = ("train", "plan", "eval", "data", "recipes", "bench", *STUDIES, "verify-kernels", "doctor")
    assert [verb for verb in verbs if not re.search(rf"^ +{verb}\b", shown, re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fly"], "fly"),
        (["train", "--bogus", "1"], "--bogus"),
        (["train", "--recipe", "nosuch"], "nosuch"),
        (["train", "--rec", "cnn4"], "--rec"),  # shortened, it would train another recipe's network
        (["train", "--budget", "5"], "--budget"),
        (["train", "--budget", "5min", "--epochs", "3"], "--budget and --epochs"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--seed", "-1"], "--seed"),
        (["train", "--target", "94"], "--target"),
        (["train", "--patience", "0"], "--patience"),
        (["train", "--optim.muon_lr", "-1"], "optim.muon_lr"),
        (["train", "--optim.muon_lr", "fast"], "optim.muon_lr"),
        (["train", "--as-reported"], "--as-reported"),
        (["train", "--recipe", "mlp", "--optim.lr", "-1"], "optim.lr"),
        (["train", "--recipe", "mlp", "--optim.muon_steps", "1"], "optim.muon_steps"),
        (["train", "--recipe", "mlp", "--optim.name", "lion"], "optim.name"),
        (["train", "--recipe", "mlp", "--model.dropout", "1.5"], "model.dropout"),
        (["train", "--recipe", "cnn2", "--model.blocks", "[[64],[]]"], "model.blocks"),
        (["train", "--recipe", "cnn2", "--stages", '[{"image_px": 20, "until": 1}]'], "stages"),
        (["train", "--model.widths", "[3,5]"], "model.widths"),
        (["train", "--augment.flip", "sometimes"], "augment.flip"),
        (["train", "--batch-size", "0"], "batch_size"),
        (["train", "--stages", '[{"image_px": 20, "until": 0.5}]'], "stages"),
        (["train", "--dataset", "mnist"], "dataset"),
        (["train", "--loader", "carrier-pigeon"], "loader"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["eval", "nowhere"], "nowhere"),
        (["recipes", "show", "nosuch"], "nosuch"),
    ],
)
def test_wrong_usage_names_the_flag_and_ends_with_2(words, said, tmp_path):
    done = fastcifar(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "abacus", "mps"])
def test_a_device_that_is_not_there_ends_with_5(device, small_cifar, tmp_path):
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    done = fastcifar("train", "--device", device, "--data", str(small_cifar), "--out", str(tmp_path / "run"))
    assert done.returncode == 5, done.stderr
    assert "--device" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_data_ends_with_3(tmp_path):
    done = fastcifar("train", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "run"))
    assert done.returncode == 3
    assert str(tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_batch_larger_than_the_set_ends_with_2(small_cifar, tmp_path):
    done = fastcifar("train", "--data", str(small_cifar), "--batch-size", "2001", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "2001" in done.stderr
    assert "2000 training images" in done.stderr


def test_a_target_needs_images_to_hold_out(small_cifar, tmp_path):
    done = fastcifar("train", "--data", str(small_cifar), "--target", "0.9", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "--target, --patience and --validate hold out 5000 training images, cifar10 has 2000" in done.stderr


def test_divergence_ends_with_4(small_cifar, tmp_path):
    words = ["--steps", "20", "--batch-size", "125", "--model.widths", "[8,8,8]", "--optim.head_lr", "1e38"]
    done = fastcifar("train", "--data", str(small_cifar), "--device", "cpu", *words, "--out", str(tmp_path / "run"))
    assert done.returncode == 4, done.stderr
    assert "step" in done.stderr


def test_the_fallback_is_announced_at_both_ends_and_in_the_result(small_cifar, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")  # no network, whatever this machine has
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path / "cache"))
    refused = fastcifar("train", "--out", str(tmp_path / "refused"))
    assert refused.returncode == 3
    assert "Is there a network?" in refused.stderr
    words = ["--fallback-dataset", "shapes10", "--steps", "2", "--batch-size", "50", "--model.widths", "[8,8,8]"]
    done = fastcifar("train", *words, "--device", "cpu", "--out", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    assert "training on shapes10 instead" in done.stderr
    assert "because cifar10 was not there" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["dataset"], result["fallback_from"], result["data_verified"]) == ("shapes10", "cifar10", False)
    # The run is one on shapes10 for good, also when CIFAR-10 has come to this machine since.
    monkeypatch.setenv("FASTCIFAR_DATA", str(small_cifar))
    judged = fastcifar("eval", str(tmp_path / "run"), "--json")
    assert json.loads(judged.stdout.splitlines()[-1])["dataset"] == "shapes10", judged.stderr


def test_a_wrong_path_is_not_fallen_back_from(tmp_path):
    words = ["--fallback-dataset", "shapes10", "--data", str(tmp_path / "typo")]
    assert fastcifar("train", *words, "--out", str(tmp_path / "run")).returncode == 3


def test_eval_repeats_the_runs_own_figures(small_cifar, tmp_path):
    words = ["--steps", "20", "--batch-size", "125", "--model.widths", "[16,16,16]", "--tta.share", "1"]
    run = tmp_path / "run"
    trained = fastcifar("train", "--data", str(small_cifar), "--device", "cpu", *words, "--out", str(run), "--json")
    assert trained.returncode == 0, trained.stderr
    judged = fastcifar("eval", str(run), "--device", "cpu", "--json")
    assert judged.returncode == 0, judged.stderr
    result, again = (json.loads(done.stdout.splitlines()[-1]) for done in (trained, judged))
    for key in ("test_acc", "test_acc_tta", "macro_precision", "macro_recall", "macro_f1"):
        assert again[key] == pytest.approx(result[key], abs=1e-9)
    assert sum(map(sum, again["confusion"])) == 500
    assert set(again["classes"]) == {
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    }

    other = fastcifar("eval", str(run), "--device", "cpu", "--loader", "torch", "--workers", "1", "--json")
    assert other.returncode == 0, other.stderr
    found = json.loads(other.stdout.splitlines()[-1])
    assert again["loader"] == "resident"
    assert found["loader"] == "torch"
    assert found["confusion"] == again["confusion"]

    (run / "model.safetensors").write_bytes(b"no model")
    broken = fastcifar("eval", str(run))
    assert broken.returncode == 2
    assert "model.safetensors" in broken.stderr


def test_a_folder_with_a_run_is_not_overwritten(small_cifar, tmp_path):
    for name in ("result.json", "checkpoint.safetensors"):
        (tmp_path / name).touch()
        done = fastcifar("train", "--data", str(small_cifar), "--out", str(tmp_path))
        assert done.returncode == 2
        assert "already holds a run" in done.stderr
        (tmp_path / name).unlink()


def test_a_run_that_never_began_leaves_no_folder(small_cifar, tmp_path):
    for words, code in ((["--device", "abacus"], 5), (["--budget", "1s"], 2)):
        done = fastcifar("train", "--data", str(small_cifar), *words, "--out", str(tmp_path / "run"))
        assert done.returncode == code, done.stderr
        assert not (tmp_path / "run").exists()


def test_recipe_fields_are_overridden_by_dotted_name_and_by_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: speed\nbatch_size: 100\noptim:\n  muon_lr: 0.5\nseed: 3\n")
    job = job_of("--config", str(file), "--optim.muon-lr", "0.6", "--augment.cutout_px=8")
    assert job.settings.batch_size == 100
    assert job.settings.optim == replace(NAMED["speed"].recipe.optim, muon_lr=0.6)
    assert job.settings.augment.cutout_px == 8
    assert job.settings.stages == NAMED["speed"].recipe.stages
    assert job.seed == 3


def test_with_a_field_given_nothing_is_planned(tmp_path):
    (tmp_path / "mine.yaml").write_text("batch_size: 512")
    assert job_of("--budget", "5min").planned
    assert not job_of("--budget", "5min", "--dtype", "bfloat16").planned  # though it is the default
    assert not job_of("--budget", "5min", "--config", str(tmp_path / "mine.yaml")).planned
    assert not job_of().planned


def test_what_show_prints_is_a_config(tmp_path):
    shown = fastcifar("recipes", "show", "speed")
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    whole = job_of("--config", str(tmp_path / "shown.yaml"))
    assert whole.settings == NAMED["speed"].recipe
    assert yaml.safe_load(shown.stdout)["recipe"] == "speed"
    for limit, value in ("budget", "5min"), ("steps", 3):
        limited = job_of(f"--{limit}={value}", "--config", str(tmp_path / "shown.yaml"))
        assert limited == replace(whole, **{limit: value}), "what is typed goes before what a file says"


@pytest.mark.parametrize("content", ["a: [", "\udcff", "recipe: [a]", "- 1"])
def test_a_damaged_config_is_named(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content.encode(errors="surrogateescape"))
    for words in (["train", "--config", "config.yaml"], ["train", "--resume", "."], ["eval", "."]):
        done = fastcifar(*words, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "config" in done.stderr or "[" in done.stderr


def test_weights_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = job_of("--recipe", "resnet34-pretrained", "--model.weights", "mine.pth").settings.model
    assert model == ResNet34Model(str(tmp_path / "mine.pth"))
    assert job_of("--recipe", "resnet34-pretrained").settings.model == ResNet34Model("imagenet")


def test_what_is_resumed_may_find_its_data_elsewhere_and_changes_nothing_else(small_cifar, tmp_path):
    (tmp_path / "moved").symlink_to(small_cifar)
    words = ["--steps", "40", "--batch-size", "125", "--model.widths", "[8,8,8]", "--device", "cpu"]
    where = ["--data", str(tmp_path / "moved"), "--out", str(tmp_path / "run")]
    script = "import os, signal; from fastcifar import looks; from fastcifar.cli import main\n"
    script += "looks.Looks.due = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
    done = subprocess.run([sys.executable, "-c", f"{script}main({['train', *words, *where]})"], capture_output=True)
    assert b"--resume" in done.stderr, done.stderr
    (tmp_path / "moved").unlink()
    (tmp_path / "here").symlink_to(small_cifar)
    resume = ["train", "--resume", str(tmp_path / "run")]
    lost = fastcifar(*resume)
    assert lost.returncode == 3
    changed = fastcifar(*resume, "--epochs", "3")
    assert changed.returncode == 2
    assert "--epochs" in changed.stderr
    found = fastcifar(*resume, "--data", "here", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"] == str(tmp_path / "here")
    assert json.loads(found.stdout.splitlines()[-1])["steps"] == 40


def test_a_job_survives_its_config_file(tmp_path):
    from fastcifar.run import RunFolder

    words = ["--budget", "1h30m", "--data", "here", "--model.widths", "[8,16,24]", "--target", "0.9"]
    job = job_of(*words, "--patience", "3", "--track", "tensorboard,mlflow", "--augment.policy", "randaugment")
    folder = RunFolder.create(tmp_path / "run", "speed")
    folder.write_config(job.config())
    assert job_of("--config", str(tmp_path / "run/config.yaml")) == job


def test_named_recipe_is_found_before_parsing(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: other\n")
    assert named_recipe(["train", "--config", str(file)]) == ("other", False)
    assert named_recipe(["train", "--config", str(file), "--recipe=speed"]) == ("speed", False)
    assert named_recipe(["train"]) == ("speed", False)


def test_data_verify_and_info(small_cifar):
    verified = fastcifar("data", "verify", "--data", str(small_cifar))
    assert verified.returncode == 3
    assert "train: NOT verified: 2,000 images" in verified.stdout
    info = fastcifar("data", "info", "--data", str(small_cifar))
    assert info.returncode == 0
    assert "not CIFAR-10" in info.stdout


def test_doctor_tries_things():
    done = fastcifar("doctor")
    assert done.returncode == 0, done.stderr
    for part in ("allocator", "threads", "loader resident", "loader torch", "works", "GPU"):
        assert part in done.stdout


def test_recipes_are_checked():
    with pytest.raises(UsageError, match=r"tta\.share"):
        job_of("--tta.share", "1.5")


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_out_of_memory_ends_with_5(small_cifar, tmp_path):
    """A process that may have 6 GiB of addresses, some 4 of which torch and its threads reserve, and wide layers."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)\n"
        "from fastcifar.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", "--data", str(small_cifar), "--device", "cpu", "--batch-size", "2000", "--dtype", "float32"]
    words += ["--model.widths", "[4096,32,32]", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "Out of memory with batches of 2000 images" in done.stderr
    assert "--batch_size 1000" in done.stderr
    assert "Traceback" not in done.stderr
