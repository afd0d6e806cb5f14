"""The reports' recipes, reproduced: a record that is small and true, and a table in the README that follows it."""

import json
from pathlib import Path

import pytest

from fastcifar.cli import main
from fastcifar.display import format_s
from fastcifar.recipes import NAMED, Claim
from fastcifar.studies.reproduce import HEADINGS, MARKERS, between_markers, write_claim, write_table

README = Path(__file__).parents[2] / "README.md"
TINY = ["--dataset", "shapes10", "--device", "cpu", "--steps", "4", "--batch-size", "100"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce") / "record"
    assert main(["reproduce", "mlp", *TINY, "--out", str(folder)]) == 0
    return folder


def test_the_table_says_what_the_runs_say(record):
    results, looks = {}, {}
    for way in ("as-reported", "fast"):
        run = record / "mlp" / way / "seed0"
        results[way] = json.loads((run / "result.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        looks[way] = max(row["val_accuracy"] for row in rows)
    reported, fast = results["as-reported"], results["fast"]
    expected = (
        "| `mlp`, shapes10, --steps 4 --batch_size 100 | 55.82 / 55.40 % "
        f"| {looks['as-reported']:.2%} / {reported['test_acc']:.2%} | {reported['wall_s']:.0f} s "
        f"| {fast['test_acc']:.2%} / {fast['test_acc_tta']:.2%} | {format_s(fast['wall_s'])} |"
    )
    lines = (record / "table.md").read_text().splitlines()
    assert lines[2].replace(" %", "") == expected.replace(" %", "").replace("%", "")
    told = json.loads((record / "reproduce.json").read_text())["recipes"][0]
    assert told["as-reported"]["mean"]["best_val_acc"] == looks["as-reported"]
    assert told["fast"]["seeds"][0]["test_acc_tta"] == fast["test_acc_tta"]


def test_the_two_ways_are_the_two_recipes(record):
    import yaml

    for way in ("as-reported", "fast"):
        config = yaml.safe_load((record / "mlp" / way / "seed0" / "config.yaml").read_text())
        assert config["as_reported"] == (way == "as-reported")
        assert config["validate"]
        recipe = NAMED["mlp"].reported if way == "as-reported" else NAMED["mlp"].recipe
        assert recipe is not None
        assert config["label_smoothing"] == recipe.label_smoothing


def test_the_record_keeps_no_weights_and_is_not_trained_again(record):
    for way in ("as-reported", "fast"):
        names = {path.name for path in (record / "mlp" / way / "seed0").iterdir()}
        assert names == {"config.yaml", "metrics.jsonl", "result.json"}
    before = {path: path.read_bytes() for path in record.rglob("*") if path.is_file()}
    assert main(["reproduce", "mlp", *TINY, "--out", str(record)]) == 0
    assert {path: path.read_bytes() for path in record.rglob("*") if path.is_file()} == before


def test_a_record_of_another_command_is_refused(record, capsys):
    assert main(["reproduce", "mlp", *TINY, "--seeds", "2", "--out", str(record)]) == 2
    assert "another study" in capsys.readouterr().err


def test_the_readme_follows(record, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text())
    assert main(["reproduce", "mlp", *TINY, "--out", str(record), "--readme", str(readme)]) == 0
    row = (record / "table.md").read_text().splitlines()[2]
    old, new = README.read_text().splitlines(), readme.read_text().splitlines()
    assert [line for line in new if line not in old] == [row]
    assert [line for line in old if line not in new] == [], "with other flags it is another row"
    assert "`mlp`" in capsys.readouterr().out


def test_rows_and_ways_that_were_not_run_stay_as_they_were(tmp_path):
    readme = tmp_path / "README.md"
    rows = ["| `mlp` | 1 | 2 | 3 s | 4 | 5 s |", "| `resnet34`, CIFAR-100 | a | b | c | d | e |"]
    head = ["| " + " | ".join("abcdef") + " |", "|---|" * 6]
    readme.write_text("\n".join(["before", MARKERS[0], *head, *rows, MARKERS[1], "after | `mlp` |", ""]))
    write_table(readme, [["`mlp`", "10", "", "", "40", "50 s"], ["`resnet34-pretrained`", "none", "", "", "6", "7 s"]])
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["before", MARKERS[0]]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == list(HEADINGS)
    assert lines[4:] == [
        "| `mlp` | 10 | 2 | 3 s | 40 | 50 s |",
        rows[1],
        "| `resnet34-pretrained` | none | not measured | | 6 | 7 s |",
        MARKERS[1],
        "after | `mlp` |",
    ]
    once = readme.read_text()
    write_table(readme, [["`mlp`", "10", "", "", "", ""]])
    assert readme.read_text() == once


def test_other_flags_are_another_row(tmp_path):
    readme = tmp_path / "README.md"
    old = "| `mlp` | 1 | 2 | 3 s | 4 | 5 s |"
    readme.write_text("\n".join([MARKERS[0], old, MARKERS[1], ""]))
    write_table(readme, [["`mlp`, --epochs 1", "1", "", "", "40", "50 s"]])
    assert readme.read_text().splitlines()[3:5] == [old, "| `mlp`, --epochs 1 | 1 | not measured | | 40 | 50 s |"]


def test_the_readme_gives_every_claim():
    table = between_markers(README)[1]
    claims = {row.split("`")[1]: row.split("|")[2].strip() for row in table.splitlines() if row.startswith("| `")}
    assert claims == {name: write_claim(named.claim) for name, named in NAMED.items() if named.reported}


def test_claims_are_shares():
    for named in NAMED.values():
        claim = named.claim
        shares = [claim.val, claim.val_best, claim.test, claim.test_best]
        assert all(0.3 < share < 1 for share in shares if share is not None)
        assert named.reported is not None or claim == Claim()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speed"], "speed comes from no report"),
        (["nosuch"], "nosuch"),
        (["mlp", "--only", "slow"], "--only"),
        (["mlp", "--as-reported"], "--as_reported"),
        (["mlp", "--seeds", "0"], "--seeds"),
        (["mlp", "--seed", "3"], "--seed: cannot be given"),
        (["mlp", "--steps", "0"], "--steps"),
        (["mlp", "--patience", "3"], "--patience: cannot be given"),
        (["mlp", "--bogus", "1"], "unrecognized arguments: --bogus 1\n  try: fastcifar reproduce --help"),
        (["--only", "fast", "mlp"], "unrecognized arguments: mlp\n  try: fastcifar reproduce --help"),
        (["mlp", "cnn2", "--model.hidden", "64"], "model.hidden"),
        (["mlp", "--readme", "nowhere.md"], "nowhere.md"),
        (["mlp", "--readme", str(Path(__file__).parents[2] / "LICENSE")], "has no lines <!-- reproduce -->"),
    ],
)
def test_wrong_usage_ends_with_2_before_any_training(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words, "--out", "record"]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing may be left behind"
