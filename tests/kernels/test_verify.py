"""The verification itself: everything passes, and each kind of fault is reported."""

import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar_kernels import verify

SHAPE = (2, 3, 4, 3, 3)


def case(kernel, op: str = "weighted_sum") -> verify.Case:
    """The first case of an operator, with another kernel in place of its own."""
    found = next(one for one in verify.cases(SHAPE, "cpu") if one.op == op)

    def call(which: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return found.call(which, tensors) if which == "reference" else kernel(tensors)

    return replace(found, call=call)


def right(tensors: dict[str, Tensor]) -> Tensor:
    return verify.call_weighted_sum("kernel", tensors)[0]


def test_the_loops_for_the_cpu_pass():
    rows = list(verify.verify("cpu", verify.SMALL, None))
    # On a CPU crop_flip is plain torch.
    assert {row.op for row in rows} == {*verify.OPERATORS, *verify.OF_THE_CPU} - {"crop_flip"}
    assert not [row for row in rows if not row.passed]


def test_the_command_passes_in_the_interpreter():
    command = [sys.executable, "-m", "fastcifar_kernels.verify"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpreter" in done.stdout.splitlines()[0]
    assert "MISS" not in done.stdout


def test_the_command_fails_if_a_row_does(monkeypatch, capsys):
    monkeypatch.setattr(verify, "MEDIUM", (SHAPE,))
    monkeypatch.setattr(verify, "weighted_sum", lambda *given: -verify.weighted_sum_reference(*given))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(verify.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    assert verify.main(["--op", "weighted_sum"]) == 1
    assert "MISS" in capsys.readouterr().out
    assert verify.main(["--op", "batch_statistics"]) == 0
    monkeypatch.setattr(verify.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    assert verify.main(["--op", "batch_statistics"]) == 1


def test_a_right_kernel_passes():
    for dtype in verify.DTYPES:
        row = verify.judge(case(lambda tensors: (right(tensors),)), dtype)
        assert row.passed
        assert row.faults == ""


def writes_outside(tensors: dict[str, Tensor]) -> tuple[Tensor]:
    coef_NK = tensors["coef"].detach()
    torch.as_strided(coef_NK, (1,), (1,), coef_NK.storage_offset() - 1).fill_(0)
    return (right(tensors),)


def writes_behind(tensors: dict[str, Tensor]) -> tuple[Tensor]:
    y_NKCHW = tensors["y"].detach()
    torch.as_strided(y_NKCHW, (1,), (1,), y_NKCHW.storage_offset() + y_NKCHW.numel() + 200).fill_(0)
    return (right(tensors),)


def changes_its_input(tensors: dict[str, Tensor]) -> tuple[Tensor]:
    found = right(tensors)
    tensors["coef"].detach().numpy()[1, 2] += 1  # unseen by autograd, as from a kernel
    return (found,)


def make_unsteady():
    calls = []

    def differs(tensors: dict[str, Tensor]) -> tuple[Tensor]:
        calls.append(0)
        return (right(tensors) * (1 + len(calls) * 2**-23),)

    return differs


def rounds_too_early(tensors: dict[str, Tensor]) -> tuple[Tensor]:
    return (right({**tensors, "coef": tensors["coef"].bfloat16()}),)


def of_another_type(tensors: dict[str, Tensor]) -> tuple[Tensor]:
    return (right(tensors).double(),)


def leaves_a_hole(tensors: dict[str, Tensor]) -> tuple[Tensor]:
    hole = torch.zeros_like(tensors["y"][:, 0])
    hole[1, 2, 0, 1] = torch.nan
    return (right(tensors) + hole,)


@pytest.mark.parametrize(("kernel", "fault"), [
    (writes_outside, "wrote outside its tensors"),
    (writes_behind, "wrote outside its tensors"),
    (changes_its_input, "changed its input"),
    (make_unsteady(), "differs when run again"),
    (of_another_type, "out is torch.float64, should be torch.float32"),
], ids=["before", "behind", "input", "unsteady", "type"])  # fmt: skip
def test_a_fault_is_named(kernel, fault):
    row = verify.judge(case(kernel), torch.float32)
    assert fault in row.faults
    assert not row.passed


@pytest.mark.parametrize("dtype", verify.DTYPES, ids=str)
def test_a_place_left_unwritten_does_not_pass(dtype):
    row = verify.judge(case(leaves_a_hole), dtype)
    assert row.error != row.error
    assert row.result == "out"
    assert not row.passed


def test_coefficients_in_low_precision_do_not_pass_in_float32():
    row = verify.judge(case(rounds_too_early), torch.float32)
    assert row.error > row.allowed
    assert not row.passed


def test_a_wrong_gradient_does_not_pass():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, number):
            return number.clone()

        @staticmethod
        def backward(ctx, *grads):
            return grads[0] / 2

    row = verify.judge(case(lambda tensors: (right({**tensors, "coef": Half.apply(tensors["coef"])}),)), torch.float32)
    assert row.result == "grad of coef"
    assert not row.passed


@pytest.mark.parametrize(("off", "passes"), [(0.9 * verify.PHI_OFF, True), (4 * verify.PHI_OFF, False)])
def test_a_gelu_that_is_further_off_than_ours_does_not_pass(off, passes):
    def approximated(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with mock.patch.object(F, "gelu", lambda u: u * (torch.special.ndtr(u) + off)):
            return verify.call_bn_gelu("reference", tensors, training=False)

    assert verify.judge(case(approximated, "bn_gelu"), torch.float32).passed == passes


@pytest.mark.parametrize("dtype", verify.DTYPES, ids=str)
def test_gradients_away_from_ties_are_most_of_them(dtype):
    """So that one which goes to the wrong pixel shows."""
    found = next(one for one in verify.cases(SHAPE, "cpu") if (one.op, one.variant) == ("conv_blocked", "pool"))
    given = {name: tensor.to(dtype) for name, tensor in found.tensors.items()}
    kept = verify.away_from_ties(found, given) != 0
    assert kept.double().mean() > 0.8


def test_reading_outside_shows():
    """A kernel that reads past the end finds NaN there."""

    def reads_on(tensors: dict[str, Tensor]) -> tuple[Tensor]:
        y_NKCHW = tensors["y"]
        beyond = torch.as_strided(y_NKCHW.detach(), (1,), (1,), y_NKCHW.storage_offset() + y_NKCHW.numel())
        return (right(tensors) + 0 * beyond.view(1, 1, 1, 1),)

    assert not verify.judge(case(reads_on), torch.float32).passed
