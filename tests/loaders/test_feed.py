"""Loaders by name, and the choice among them."""

import sys

import pytest
import torch

from fastcifar.errors import UsageError
from fastcifar.loaders import feed as feeds
from fastcifar.loaders.feed import LOADERS, images_per_s, import_loader, open_feed, pick_feed

USUAL = {"batch_size": 10, "shuffle": True}


def pick(feed, needed_per_s: float):
    tried = []

    def open_named(name):
        tried.append(name)
        return feed(name)

    return tried, pick_feed(needed_per_s, open_named, lambda feed: feed.loader("train", **USUAL))


def test_auto_takes_the_first_that_keeps_the_step_fed(feed):
    tried, (found, loader, why) = pick(feed, 0.0)
    assert tried == ["resident"]
    assert found.name == "resident"
    assert type(loader) is import_loader("resident")
    assert "loader resident" in why


def test_auto_takes_the_fastest_if_none_is_fast_enough(feed, monkeypatch):
    for name in LOADERS:
        feed(name)  # skips this test where one is missing
    rates = {"ResidentLoader": 3.0, "FfcvLoader": 7.0, "DaliLoader": 5.0, "TorchLoader": 1.0}
    monkeypatch.setattr(feeds, "images_per_s", lambda loader: rates[type(loader).__name__])
    tried, (found, _, why) = pick(feed, 100.0)
    assert tried == list(LOADERS)
    assert found.name == "ffcv"
    assert "7 images/s, a step takes about 100" in why


def test_auto_passes_over_what_is_not_installed(feed, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastcifar.loaders.ffcv", None)
    monkeypatch.setattr(feeds, "images_per_s", lambda loader: float(type(loader).__name__ == "TorchLoader"))
    opened = []

    def open_named(name):
        import_loader(name)
        opened.append(name)
        return feed(name)

    _, loader, why = pick_feed(100.0, open_named, lambda feed: feed.loader("train", **USUAL))
    assert "ffcv" not in opened
    assert opened[0] == "resident"
    assert opened[-1] == "torch"
    assert type(loader).__name__ == "TorchLoader"
    assert "loader torch" in why


def test_a_missing_library_says_what_to_do(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastcifar.loaders.dali", None)
    with pytest.raises(UsageError) as caught:
        open_feed("dali", dataset, workers=1, device=torch.device("cpu"), dtype=torch.float32)
    assert caught.value.exit_code == 2
    assert "--loader dali cannot be used here" in caught.value.message
    assert caught.value.hint == "make loaders, or: pip install 'fastcifar[dali]'"


def test_an_unknown_name():
    with pytest.raises(UsageError, match="there are resident, ffcv, dali, torch"):
        import_loader("webdataset")


@pytest.mark.parametrize("name", LOADERS)
def test_rates_are_positive(feed, name):
    assert images_per_s(feed(name).loader("train", **USUAL)) > 0
