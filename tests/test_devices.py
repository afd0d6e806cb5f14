"""A GPU that is named becomes the one that everything else on GPUs means, streams and graphs too."""

import pytest
import torch

from fastcifar.devices import pick_device


@pytest.mark.parametrize(("name", "current"), [("cuda:1", 1), ("cuda:0", 0), ("cuda", None), ("auto", None)])
def test_the_gpu_that_was_named_is_the_current_one(monkeypatch, name, current):
    made_current = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made_current.append(device.index))
    assert pick_device(name).type == "cuda"
    assert made_current == ([] if current is None else [current])
