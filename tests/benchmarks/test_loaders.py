"""`fastcifar bench loaders`, on few images."""

import json

import pytest
import torch

from fastcifar.benchmarks import loaders as benchmark
from fastcifar.cli import main


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, value in {"ROUNDS": 2, "STEPS": 1, "COPIES": 2}.items():
        monkeypatch.setattr(benchmark, name, value)


def test_it_measures_what_is_here_and_leaves_a_record_and_a_chart(small_cifar, tmp_path, capsys):
    words = ["--data", str(small_cifar), "--device", "cpu"]
    assert main(["bench", "loaders", *words, "--out", str(tmp_path / "result.json")]) == 0
    report = json.loads((tmp_path / "result.json").read_text())
    measured = {(row["loader"], row["workers"]) for row in report["loaders"]}
    assert {name for name, _ in measured} | set(report["not_here"]) == {"resident", "ffcv", "dali", "torch"}
    assert {workers for _, workers in measured} == set(benchmark.worker_counts())
    for row in report["loaders"]:
        assert len(row["epochs"]) == 2
        assert min(row["epochs"]) <= row["images_per_s"] <= max(row["epochs"])
    assert report["step_images_per_s"].keys() == {"20", "24", "32"}
    assert report["copy_images_per_s"] > max(report["step_images_per_s"].values())
    out = capsys.readouterr().out
    assert out.count("| resident |") == len(benchmark.worker_counts())
    assert (tmp_path / "result.png").read_bytes()[:4] == b"\x89PNG"


def test_a_loader_that_gives_other_batches_is_not_timed(monkeypatch, small_cifar):
    from fastcifar.loaders.torchvision import Drawn

    honest = Drawn.__getitem__
    monkeypatch.setattr(
        Drawn, "__getitem__", lambda self, place: (honest(self, place)[0] * 1.1, honest(self, place)[1])
    )
    with pytest.raises(ArithmeticError, match="loader torch gives other batches"):
        main(["bench", "loaders", "--data", str(small_cifar)])


def test_worker_counts_end_with_the_cores(monkeypatch):
    for cores, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(benchmark, "physical_cores", lambda cores=cores: cores)
        assert benchmark.worker_counts() == expected


def test_the_first_batch_decides():
    class Fixed:
        dtype = torch.float32

        def __init__(self, value, label):
            self.batch = torch.full((2, 3, 4, 4), value), torch.tensor([0, label])

        def epoch(self, epoch):
            return iter([self.batch])

    benchmark.refuse_wrong("x", Fixed(1.0, 3), Fixed(1.0, 3))  # type: ignore[arg-type]
    for wrong in (Fixed(1.001, 3), Fixed(1.0, 4)):
        with pytest.raises(ArithmeticError):
            benchmark.refuse_wrong("x", wrong, Fixed(1.0, 3))  # type: ignore[arg-type]


def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "set_up", lambda *_: pytest.fail("measured first"))
    (tmp_path / "file").write_text("")
    assert main(["bench", "loaders", "--out", str(tmp_path / "file" / "result.json")]) == 2
    assert "--out: cannot write" in capsys.readouterr().err
