"""Accuracy, precision, recall, F1, confusion and test-time augmentation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastcifar.data.dataset import Split
from fastcifar.evaluate import evaluate, judge, looks_an_image, predict, predict_views, scores, top_confusions
from fastcifar.loaders.resident import ResidentLoader
from fastcifar.models.speednet import SpeedNet
from fastcifar.settings import Tta


@pytest.fixture
def loader() -> ResidentLoader:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (130, 32, 32, 3), np.uint8), rng.integers(0, 5, 130).astype(np.uint8))
    return ResidentLoader(split, batch_size=50, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def model() -> SpeedNet:
    torch.manual_seed(0)
    return SpeedNet(5, (8, 8, 8))


def test_scores_by_hand():
    confusion = np.array([[8, 2, 0], [1, 6, 0], [0, 0, 0]])
    _, precision, recall, f1 = scores(confusion)
    assert precision == pytest.approx([8 / 9, 6 / 8, 0])
    assert recall == pytest.approx([8 / 10, 6 / 7, 0])
    assert f1 == pytest.approx([16 / 19, 12 / 15, 0])


def test_top_confusions_are_the_largest_cells_off_the_diagonal():
    confusion = np.array([[50, 3, 0], [7, 40, 1], [0, 0, 30]])
    assert top_confusions(confusion, ("cat", "dog", "ship")) == [
        ("dog", "cat", 7),
        ("cat", "dog", 3),
        ("dog", "ship", 1),
    ]


def test_evaluation_without_augmentation_is_the_plain_answer(model, loader):
    model.eval()
    answers = torch.cat([predict(model, x) for x, _ in loader.epoch(0)]).argmax(1)
    expected = (answers == loader.labels_N).float().mean().item()
    found = evaluate(model, loader, 5, Tta(share=0.0))
    assert found.accuracy == found.accuracy_tta == pytest.approx(expected)
    assert judge(model, loader).accuracy == pytest.approx(expected)
    assert found.confusion_KK.sum() == 130
    assert np.diag(found.confusion_KK).sum() == pytest.approx(expected * 130)


def test_the_loss_of_a_judgement_is_the_mean_over_all_images(model, loader):
    """Batches of 50, 50 and 30."""
    model.eval()
    with torch.no_grad():
        logits = model(loader.take(torch.arange(130)))
    expected = torch.nn.functional.cross_entropy(logits, loader.labels_N).item()
    assert judge(model, loader).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("shifts", "moves"), [
    ("sides", [(0, 1), (2, 1), (1, 0), (1, 2)]),
    ("corners", [(0, 0), (2, 2)]),
])  # fmt: skip
@pytest.mark.parametrize("px", [1, 2])
def test_full_augmentation_is_the_weighted_mean_of_all_views(shifts, moves, px, model, loader):
    model.eval()
    x = loader.take(torch.arange(130))
    padded = torch.nn.functional.pad(x, (px,) * 4, "reflect")
    views = [(x, 1 / 4)]
    for down, right in moves:
        top, left = px * down, px * right
        views.append((padded[:, :, top : top + 32, left : left + 32], 1 / 4 / len(moves)))
    with torch.no_grad():
        logits = [weight * (model(view) + model(view.flip(3))) for view, weight in views]
    expected = torch.stack(logits).sum(0).softmax(1)
    tta = Tta(px, shifts, share=1.0)
    torch.testing.assert_close(predict_views(model, x, tta), expected)
    found = evaluate(model, loader, 5, tta)
    np.testing.assert_allclose(found.probability_NK, expected, atol=1e-5)


@pytest.mark.parametrize("tta", [Tta(share=0.5), Tta(shifts="corners", share=0.5), Tta(shift_px=0), Tta(share=0.0)])
def test_looks_are_counted_as_they_are_taken(tta, model, loader, monkeypatch):
    images, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda x: images.append(len(x)) or forward(x))
    evaluate(model, loader, 5, tta)
    assert sum(images) == 130 * looks_an_image(tta)


@pytest.mark.parametrize(("left_s", "share"), [(1000.0, 0.5), (52.0, 0.4), (0.0, 0.0), (-5.0, 0.0)])
def test_there_are_as_many_second_looks_as_time_is_left_for(left_s, share, model, loader, monkeypatch):
    """A first look at 130 images takes 13 s, so that ten more at each of them would take 130."""
    monkeypatch.setattr("fastcifar.evaluate.time", SimpleNamespace(monotonic=iter([100.0, 113.0]).__next__))
    found = evaluate(model, loader, 5, Tta(share=0.5), deadline_s=113 + left_s)
    assert found.tta_share == found.summary()["tta_share"] == pytest.approx(share)
    monkeypatch.undo()
    expected = evaluate(model, loader, 5, Tta(share=share)).probability_NK
    np.testing.assert_array_equal(found.probability_NK, expected)


def test_only_the_least_sure_images_are_looked_at_again(model, loader):
    plain = evaluate(model, loader, 5, Tta(share=0.0)).probability_NK
    half = evaluate(model, loader, 5, Tta(share=0.5)).probability_NK
    changed = np.abs(plain - half).max(1) > 1e-9
    assert changed.sum() == 65
    assert plain.max(1)[changed].max() <= plain.max(1)[~changed].min()
