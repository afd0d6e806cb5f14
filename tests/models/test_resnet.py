"""Weights from a file: the right ones are taken over, all others refused by name, and nothing is executed."""

import os

import pytest
import torch
from torch import nn

from fastcifar.data.download import import_torchvision
from fastcifar.errors import DataError
from fastcifar.models.conv import Conv2d
from fastcifar.models.resnet import build_resnet34

import_torchvision()

from torchvision import models  # noqa: E402


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "resnet34.pth"
    torch.save(models.resnet34().state_dict(), file)
    return file


def test_all_but_the_last_layer_is_taken_over(imagenet):
    saved, model = torch.load(imagenet, weights_only=True), build_resnet34(100, str(imagenet))
    for name, value in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, saved[name]), name
    assert model.state_dict()["fc.weight"].shape == (100, 512)


def test_files_without_batch_counts_are_taken_as_well(imagenet, tmp_path):
    saved = torch.load(imagenet, weights_only=True)
    torch.save({name: value for name, value in saved.items() if "num_batches" not in name}, tmp_path / "old.pth")
    build_resnet34(10, str(tmp_path / "old.pth"))


def test_it_is_torchvisions_network_with_our_convolutions():
    own, theirs = build_resnet34(10), models.resnet34(num_classes=10)
    theirs.load_state_dict(own.state_dict())
    assert {type(part) for part in own.modules() if isinstance(part, nn.Conv2d)} == {Conv2d}
    x_NCHW = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(own.eval()(x_NCHW), theirs.eval()(x_NCHW))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_another_architecture_is_named(name, tmp_path):
    torch.save(getattr(models, name)().state_dict(), tmp_path / "other.pth")
    with pytest.raises(DataError, match=f"weights of {name}, not of resnet34"):
        build_resnet34(100, str(tmp_path / "other.pth"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a file of tensors"),
        (b"PK not really", "not a file of tensors"),
        (Evil(), "not a file of tensors"),
        ([1, 2], "something else than named tensors"),
        ({"a": torch.ones(2)}, "weights of no ResNet"),
    ],
    ids=["empty", "garbage", "evil", "list", "stranger"],
)
def test_other_files_are_refused(content, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=said):
        build_resnet34(100, "w.pth")
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*nowhere\.pth"):
        build_resnet34(100, str(tmp_path / "nowhere.pth"))
