"""`fastcifar bench kernels`, on a shape that takes no time."""

import json

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from fastcifar.cli import main
from fastcifar_kernels import bench, verify
from fastcifar_kernels.weighted_sum import weighted_sum_reference

SHAPE = (2, 3, 16, 4, 4)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "CPU_SHAPES", (SHAPE,))
    monkeypatch.setattr(bench, "ROUNDS", {"cpu": 2})
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_every_operator_is_measured_beside_eager_and_compiled(tmp_path, capsys):
    assert main(["bench", "kernels", "--out", str(tmp_path / "new" / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    measured = {(row["op"], row["pass"], row["candidate"]) for row in rows}
    directions = {op: ("forward",) if op == "batch_statistics" else ("forward", "backward") for op in bench.UNITS}
    names = "kernel", "eager", "compiled"
    assert measured == {(op, way, name) for op, ways in directions.items() for way in ways for name in names}
    assert len(rows) == len(measured)
    for row in rows:
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["implementation"] == "numba"
        assert row["peak_memory_bytes"] is None
    said = capsys.readouterr().out
    assert "need a GPU: not measured" in said
    assert said.count("Geometric means") == 1


def test_bytes_are_those_of_the_docstrings():
    """K = 3 experts of 2 x 16 x 4 x 4 values, two bytes each."""
    rows = {(r[0]["op"], r[0]["pass"]): r[0]["bytes"] for r in bench.rows("cpu", (SHAPE,), torch.bfloat16)}
    one = 2 * 16 * 4 * 4 * 2
    assert rows["weighted_sum", "forward"] == (3 + 1) * one
    assert rows["weighted_sum", "backward"] == (3 + 1 + 3) * one
    assert rows["scaled_copies", "forward"] == (1 + 3) * one
    assert rows["scaled_copies", "backward"] == (3 + 1 + 1) * one
    assert rows["batch_statistics", "forward"] == 3 * one
    assert rows["bn_relu_weighted_sum", "forward"] == (3 + 3 + 1) * one
    assert rows["bn_relu_weighted_sum", "backward"] == (3 + 1 + 3 + 1 + 3) * one
    assert rows["bn_relu_pool", "forward"] == (1 + 1 + 1) * one
    assert rows["bn_relu_pool, pool", "backward"] == 2 * (1 + 0.25) * one + one
    assert rows["bn_gelu", "forward"] == (1 + 1 + 1) * one
    assert rows["bn_gelu", "backward"] == (2 + 1 + 2 + 1) * one
    filters = 16 * 9 * 3 * 3 * 2
    assert rows["aggregate_weights", "forward"] == (3 + 2) * filters


def test_a_gpu_times_every_operator_on_the_shapes_that_it_meets():
    shapes = {
        op: [s for s in bench.GPU_SHAPES if bench.suits(op, s)] for op in ("crop_flip", "bn_gelu", "weighted_sum")
    }
    assert shapes["crop_flip"] == [(2000, 1, 3, 32, 32)]
    assert shapes["weighted_sum"] == list(bench.GPU_SHAPES[4:])
    assert shapes["bn_gelu"] == list(bench.GPU_SHAPES[1:])
    assert bench.GPU_UNITS["bn_gelu"](2000, 1) == (1 + 1 + 1, 2 + 2 + 1)
    assert bench.GPU_UNITS["crop_flip, reflect"](2000, 1) == (1 + 2, 0)


def test_without_a_compiler_the_rest_is_measured(monkeypatch, capsys):
    def refuse(*_):
        raise BackendCompilerFailed(refuse, RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    assert bench.run(None, None) == 0
    assert "torch.compile found no C++ compiler" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed_and_what_was_timed_is_kept(monkeypatch, tmp_path, capsys):
    def wrong_on_three_images(y_NKCHW, *others):
        return weighted_sum_reference(y_NKCHW, *others) * (-1 if len(y_NKCHW) == 3 else 1)

    monkeypatch.setattr(bench, "CPU_SHAPES", (SHAPE, (3, *SHAPE[1:])))
    monkeypatch.setattr(verify, "weighted_sum", wrong_on_three_images)
    assert bench.run(tmp_path / "rows.jsonl", None) == 1
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["op"] for row in rows} == {*bench.UNITS}
    assert {tuple(row["shape_NKCHW"]) for row in rows} == {SHAPE}
    assert "weighted_sum is wrong, so it is not timed" in capsys.readouterr().err


def test_verify_kernels_is_the_packages_own(monkeypatch):
    asked = []
    monkeypatch.setattr(verify, "main", lambda words: asked.append(words) or 1)
    assert main(["verify-kernels"]) == 1
    assert main(["verify-kernels", "--op", "weighted_sum", "scaled_copies"]) == 1
    assert asked == [[], ["--op", "weighted_sum", "scaled_copies"]]
