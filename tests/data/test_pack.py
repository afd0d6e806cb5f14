"""Packs: what is written is what is read, with the real libraries; whatever is wrong with one is named."""

import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from fastcifar.cli import main
from fastcifar.data import pack as pack_module
from fastcifar.data import shapes10
from fastcifar.data.beton import import_ffcv, read_beton
from fastcifar.data.cache import cache_folder
from fastcifar.data.dataset import SPLITS
from fastcifar.data.pack import FORMATS, is_pack, open_pack, pack_for, write_pack
from fastcifar.data.source import load
from fastcifar.data.tfrecord import import_tfrecord, read_tfrecord
from fastcifar.errors import DataError, UsageError

MAIN = {"ffcv": "{}.beton", "dali": "{}.tfrecord"}  # the file with a split's pixels
READ = {"ffcv": read_beton, "dali": read_tfrecord}


def _need(format):
    try:
        {"ffcv": import_ffcv, "dali": import_tfrecord}[format]()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def small(small_cifar):
    return load("cifar10", small_cifar)


@pytest.fixture(scope="module", params=FORMATS)
def good(request, small, tmp_path_factory):
    """A pack that no test may change."""
    _need(request.param)
    return write_pack(small, request.param, tmp_path_factory.mktemp("packs") / request.param)


@pytest.fixture
def pack(good, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(good.folder, tmp_path / "a pack")
    return dataclasses.replace(good, folder=tmp_path / "a pack")


def _edit_about(pack, **changes):
    about = json.loads(pack.file("about.json").read_bytes()) | changes
    pack.file("about.json").write_text(json.dumps({key: value for key, value in about.items() if value is not None}))


def _sign(pack):
    """Make about.json agree with the files, as someone who forges a pack would."""
    files = {name: pack.file(name) for name in pack.about["files"]}
    entries = {n: {"bytes": f.stat().st_size, "sha256": pack_module._sha256(f)} for n, f in files.items()}
    _edit_about(pack, files=entries)


def _assert_same_split(got, expected):
    np.testing.assert_array_equal(got.images_NHWC, expected.images_NHWC)
    np.testing.assert_array_equal(got.labels_N, expected.labels_N)


def _run(code, *words, **environment):
    """Run `code` in a process of its own, with what most of these tests import."""
    code = f"""if True:
        import os, pathlib, signal, sys
        from fastcifar.data import shapes10
        from fastcifar.data.pack import open_pack, write_pack
        {code}
    """
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


# Round trips


def test_a_pack_is_one_more_packaging(good, small):
    again = load("cifar10", good.folder)
    for split in SPLITS:
        _assert_same_split(getattr(again, split), getattr(small, split))
    assert again.digests == small.digests == good.about["digests"]
    assert again.class_names == small.class_names
    assert (again.mean_C, again.std_C) == (small.mean_C, small.std_C)
    assert again.origin == f"{good.format.upper()} files in {good.folder}"
    assert again.title == "not CIFAR-10"
    assert f"image 0 of {MAIN[good.format].format('train')} (labelled " in again.warning


def test_class_names_are_part_of_a_pack(good, small, tmp_path):
    names = ("aeroplane", *small.class_names[1:])
    write_pack(dataclasses.replace(small, class_names=names), good.format, tmp_path / "pack")
    again = load("cifar10", tmp_path / "pack")
    assert again.class_names == names
    assert "class 0 is called aeroplane, should be airplane" in again.warning


def test_images_stay_in_the_order_of_the_data_set(good, tmp_path):
    shapes = shapes10.generate(300, 100)  # not ordered by digest, as CIFAR is
    pack = write_pack(shapes, good.format, tmp_path / "pack")
    for split in SPLITS:
        images_NHWC, labels = READ[good.format](pack.file(MAIN[good.format].format(split)))
        np.testing.assert_array_equal(images_NHWC, getattr(shapes, split).images_NHWC)
        assert labels == getattr(shapes, split).labels_N.tolist()


def test_the_same_bytes_each_time(good, small_cifar, tmp_path):
    """In another process: within one, a hash seed would go unnoticed."""
    code = """from fastcifar.data.source import load
        write_pack(load("cifar10", pathlib.Path(sys.argv[1])), sys.argv[2], pathlib.Path(sys.argv[3]))
    """
    done = _run(code, small_cifar, good.format, tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the library draws no bar of its own"
    for file in good.files:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_dali_reads_what_was_written(small, tmp_path):
    _need("dali")
    dali = pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, tfrecord

    pack = write_pack(small, "dali", tmp_path / "pack")

    @dali.pipeline_def(batch_size=500, num_threads=1, device_id=None)
    def read():
        record: Any = fn.readers.tfrecord(
            path=str(pack.file("test.tfrecord")),
            index_path=str(pack.file("test.index")),
            features={
                "image": tfrecord.FixedLenFeature([], tfrecord.string, ""),
                "label": tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
            },
        )
        return record["image"], record["label"]

    pipeline = read()
    pipeline.build()
    images, labels = (np.stack([np.array(part[i]) for i in range(500)]) for part in pipeline.run())
    np.testing.assert_array_equal(images.reshape(-1, 32, 32, 3), small.test.images_NHWC)
    np.testing.assert_array_equal(labels[:, 0], small.test.labels_N)


@pytest.mark.parametrize("good", ["dali"], indirect=True)
def test_records_have_checksums_and_sorted_features(good):
    """DALI checks no checksum, other readers do. Protobuf orders the features anew in each process if it may."""
    masked_crc = import_tfrecord().TFRecordWriter.masked_crc
    raw, end = good.file("test.tfrecord").read_bytes(), 0
    for line in good.file("test.index").read_text().splitlines():
        start, size = map(int, line.split())
        record, end = raw[start : start + size], start + size
        assert struct.unpack_from("<Q", record) == (size - 16,)
        assert record[8:12] == masked_crc(record[:8])
        assert record[-4:] == masked_crc(record[12:-4])
        assert record.index(b"\x05image") < record.rindex(b"\x05label")
    assert end == len(raw)


def test_progress_is_reported(good, small, tmp_path):
    calls = []

    def progress(*call):
        calls.append(call)

    write_pack(small, good.format, tmp_path / "pack", progress)
    name = MAIN[good.format].format("train")
    assert [call for call in calls if call[0] == f"writing {name}"] == [
        (f"writing {name}", done, 2000) for done in (1000, 2000)
    ]


# The command


def test_data_write_and_verify(good, small_cifar, cache, tmp_path, capsys):
    words = ["--format", good.format, "--data", str(small_cifar)]
    assert main(["data", "write", *words]) == 0
    printed = capsys.readouterr().out
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert re.fullmatch(f"cifar10-{good.format}-[0-9a-f]{{12}}", folder.name)
    assert f"fastcifar train --loader {good.format} --data {folder}\n" in printed
    assert {file.name for file in folder.iterdir()} == {file.name for file in good.files}
    for name, entry in good.about["files"].items():
        assert f"{entry['bytes']:,} bytes" in printed, name
    assert main(["data", "verify", "--data", str(folder)]) == 3  # whole, but no official CIFAR-10
    assert "train: NOT verified: 2,000 images, CIFAR-10 has 50,000" in capsys.readouterr().out
    assert main(["data", "write", *words, "--out", str(tmp_path / "new" / "here")]) == 0
    assert open_pack(tmp_path / "new" / "here").about["files"] == good.about["files"]


@pytest.mark.parametrize("words", [["write"], ["info", "--format", "ffcv"], ["info", "--out", "here"]])
def test_format_and_out_belong_to_write(words, capsys):
    assert main(["data", *words]) == 2
    assert "--format" in capsys.readouterr().err


@pytest.mark.parametrize("format", FORMATS)
def test_without_the_library(format, small_cifar, cache, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, {"ffcv": "ffcv", "dali": "tfrecord"}[format], None)
    assert main(["data", "write", "--format", format, "--data", str(small_cifar)]) == 2
    assert f"pip install 'fastcifar[{format}]'" in capsys.readouterr().err
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


# Damage


def _refused(pack, capsys, *fragments, dataset="cifar10"):
    """`data verify` ends with 3, says this, and tells what to type; `load` and `open_pack` refuse it too."""
    assert main(["data", "verify", "--dataset", dataset, "--data", str(pack.folder)]) == 3
    printed = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in printed
    assert "\n  try: fastcifar data " in printed
    with pytest.raises(DataError):
        load(dataset, pack.folder)
    return printed


def test_every_byte_counts(pack, small_cifar, capsys):
    """A byte flipped, cut off or added in any file, or the file gone: the file is named. The hint mends the pack."""
    hint = f"fastcifar data write --format {pack.format} --dataset cifar10 --out {shlex.quote(str(pack.folder))}"
    for name in pack.about["files"]:
        file = pack.file(name)
        raw = file.read_bytes()
        for at in (0, len(raw) // 2, len(raw) - 1):
            file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            printed = _refused(pack, capsys, f"{file} is damaged: its SHA-256 is not the one that about.json recorded")
            assert hint in printed
        file.write_bytes(raw[:-7])
        _refused(pack, capsys, f"{file} is cut short: {len(raw) - 7:,} of {len(raw):,} bytes", hint)
        file.write_bytes(raw + b"\0")
        _refused(pack, capsys, f"{file} is too long", hint)
        file.unlink()
        _refused(pack, capsys, f"{pack.folder} is not complete: {name} is missing", hint)
        file.write_bytes(raw)
    assert open_pack(pack.folder) == pack

    pack.file(name).write_bytes(raw[:100])
    assert main([*shlex.split(hint)[1:], "--data", str(small_cifar)]) == 0
    assert open_pack(pack.folder) == pack


def test_the_hint_leads_away_from_a_damaged_pack_in_the_environment(pack, monkeypatch):
    monkeypatch.setenv("FASTCIFAR_DATA", str(pack.folder))
    pack.files[0].unlink()
    with pytest.raises(DataError) as caught:
        load("cifar10")
    assert caught.value.hint.startswith("env -u FASTCIFAR_DATA fastcifar data write --format")


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04\xff", b"{", b"[" * 200_000, b'{"a": 1}', b"[1]", b"null", None])
def test_about_that_is_none(raw, pack, capsys):
    pack.file("about.json").unlink()
    complaint = "about.json is missing"
    if raw is not None:
        pack.file("about.json").write_bytes(raw)
        complaint = f"{pack.file('about.json')} is "
    assert not is_pack(pack.folder)
    _refused(pack, capsys, complaint, f"fastcifar data write --format {pack.format} --dataset NAME")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"fastcifar_pack": 2}, "was written in version 2 of the format, this fastcifar reads version 1"),
        ({"fastcifar_pack": "1"}, "was written in version '1' of the format"),
        ({"fastcifar_pack": True}, "was written in version True of the format"),
        ({"format": "webdataset"}, "does not say all"),
        ({"format": ["ffcv"]}, "does not say all"),
        ({"files": None}, "does not say all"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "does not say all"),
        ({"ordered": {"train": ""}}, "does not say all"),
        ({"counts": {"train": "2000", "test": 500}}, "does not say all"),
        ({"class_names": "ten of them"}, "does not say all"),
        ({"class_names": [1] * 10}, "does not say all"),
        ({"verified": 1}, "does not say all"),
        ({"dataset": 10}, "does not say all"),
    ],
)
def test_about_that_says_something_else(changes, complaint, pack, capsys):
    _edit_about(pack, **changes)
    assert is_pack(pack.folder)
    _refused(pack, capsys, complaint)


def test_about_with_one_file_more(pack, capsys):
    (pack.folder.parent / "secret").touch()
    entry = {"bytes": 0, "sha256": pack_module._sha256(pack.folder.parent / "secret")}
    _edit_about(pack, files=pack.about["files"] | {"../secret": entry})
    _refused(pack, capsys, "does not say all")


def test_about_with_too_few_class_names(pack, capsys):
    _edit_about(pack, class_names=["cat"])
    _refused(pack, capsys, "names 1 classes, CIFAR-10 has 10")


def test_is_pack_of_anything(tmp_path):
    (tmp_path / "about.json").mkdir()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "about.json"):
        assert not is_pack(path)
    (tmp_path / "file").touch()
    assert not is_pack(tmp_path / "file")


def test_pack_of_another_data_set(pack, capsys):
    for dataset in ("cifar100", "cifar10"):
        _edit_about(pack, dataset="cifar10" if dataset == "cifar100" else "cifar100")
        held, asked = ("CIFAR-10", "CIFAR-100") if dataset == "cifar100" else ("CIFAR-100", "CIFAR-10")
        printed = _refused(pack, capsys, f"which holds {held}, not {asked}.", dataset=dataset)
        other = "cifar10" if dataset == "cifar100" else "cifar100"
        assert f"--dataset {other} --data {shlex.quote(str(pack.folder))}" in printed
    _edit_about(pack, dataset="shapes10")
    assert "data prepare --dataset shapes10\n" in _refused(pack, capsys, "which holds shapes10, not CIFAR-10.")


# Forgery: about.json agrees with the files


def _forge_beton(pack, change):
    """Let `change` edit header, fields, description of the images and table of where they are in train.beton."""
    ffcv = import_ffcv()
    file = pack.file("train.beton")
    raw: Any = bytearray(file.read_bytes())
    header: Any = np.frombuffer(raw, ffcv.reader.HeaderType, 1)
    fields = np.frombuffer(raw, ffcv.reader.FieldDescType, 2, header.nbytes)
    kind = ffcv.reader.get_metadata_type([ffcv.fields.RGBImageField(), ffcv.fields.IntField()])
    table = np.frombuffer(raw, ffcv.reader.ALLOC_TABLE_TYPE, 2000, int(header["alloc_table_ptr"][0]))
    change(header, fields, np.frombuffer(raw, kind, 2000, header.nbytes + fields.nbytes), table)
    file.write_bytes(raw)
    _sign(pack)


BETON_BYTES = 16_825_216  # of 2,000 images


def _set(part, key, value, row=0, inner=None):
    def change(*parts):
        column = parts[part][key] if inner is None else parts[part][key][inner]
        column[row] = value

    return change


BETON_FORGERIES = {
    "pointer beyond the end": (_set(2, "f0", 2**63, 7, "data_ptr"), "image 7 is said to lie at byte 9,223,372"),
    "pointer that overflows": (_set(2, "f0", 2**64 - 1, 7, "data_ptr"), "image 7 is said to lie at byte 18,446,744"),
    "last bytes beyond the end": (_set(2, "f0", BETON_BYTES - 3071, 9, "data_ptr"), "image 9 is said to lie at byte"),
    "more bytes than an image has": (_set(3, "size", 2**40, 3), "its table of images does not say where"),
    "table of other places": (_set(3, "ptr", 5000, 3), "its table of images does not say where"),
    "no table": (_set(0, "alloc_table_ptr", 2**40), "is no file of FFCV's"),
    "JPEG": (_set(2, "f0", 0, 3, "mode"), "image 3 is compressed, 32 x 32 pixels"),
    "width": (_set(2, "f0", 33, 4, "width"), "image 4 is raw, 33 x 32 pixels"),
    "height": (_set(2, "f0", 0, 5, "height"), "image 5 is raw, 32 x 0 pixels"),
    "label too high": (_set(2, "f1", 10, 1999), "label 1999 is 10, CIFAR-10 has classes 0 to 9"),
    "label negative": (_set(2, "f1", -1, 6), "label 6 is -1"),
    "label of another byte": (_set(2, "f1", 256, 6), "label 6 is 256"),
    "more images than bytes": (_set(0, "num_samples", 10**6), "should hold 1,000,000 images"),
    "as many images as there are numbers": (_set(0, "num_samples", 2**64 - 1), "train.beton"),
    "no images": (_set(0, "num_samples", 0), "should hold 0 images"),
    "no fields": (_set(0, "num_fields", 0), "train.beton"),
    "version": (_set(0, "version", 3), "file format mismatch"),
    "kind of field": (_set(1, "type_id", 0, 1), "holds image (RGBImageField), label (FloatField), not"),
    "unknown kind of field": (_set(1, "type_id", 77, 1), "is no file of FFCV's: KeyError"),
    "arrays for images": (_set(1, "type_id", 4, 0), "is no file of FFCV's"),
    "name of a field": (_set(1, "name", ord("I"), 0, 0), "holds Image (RGBImageField), label (IntField), not"),
}


@pytest.mark.parametrize("good", ["ffcv"], indirect=True)
@pytest.mark.parametrize("forgery", BETON_FORGERIES)
def test_forged_beton(forgery, pack, capsys):
    assert pack.file("train.beton").stat().st_size == BETON_BYTES
    change, complaint = BETON_FORGERIES[forgery]
    _forge_beton(pack, change)
    _refused(pack, capsys, str(pack.file("train.beton")), complaint)


@pytest.mark.parametrize("good", ["ffcv"], indirect=True)
def test_beton_cut_short_and_signed(pack, capsys):
    raw = pack.file("train.beton").read_bytes()
    for part in (0, 10, 1000, 3000, 9_000_000):
        pack.file("train.beton").write_bytes(raw[:part])
        _sign(pack)
        _refused(pack, capsys, f"{pack.file('train.beton')} is no file of FFCV's")


def _forge_records(pack, records, index=None):
    """train.tfrecord of these features (image, label), with an index that fits unless another is given."""
    tfrecord = import_tfrecord()
    writer, lines = tfrecord.TFRecordWriter(str(pack.file("train.tfrecord"))), []
    for features in records:
        start = writer.file.tell()
        writer.write(features)
        lines.append(f"{start} {writer.file.tell() - start}\n")
    writer.close()
    pack.file("train.index").write_text("".join(lines) if index is None else index)
    _sign(pack)


GOOD_RECORD = {"image": (bytes(3072), "byte"), "label": (3, "int")}
RECORD_FORGERIES = {
    "short image": ([GOOD_RECORD, GOOD_RECORD | {"image": (bytes(3071), "byte")}], None, "record 1 should hold one"),
    "two images": ([GOOD_RECORD | {"image": ([bytes(3072)] * 2, "byte")}], None, "record 0 should hold one"),
    "no label": ([{"image": (bytes(3072), "byte")}], None, "record 0 should hold one"),
    "label is a fraction": ([GOOD_RECORD | {"label": (0.5, "float")}], None, "record 0 should hold one"),
    "label too high": ([GOOD_RECORD, GOOD_RECORD | {"label": (10, "int")}], None, "label 1 is 10"),
    "label negative": ([GOOD_RECORD | {"label": (-1, "int")}], None, "label 0 is -1"),
    "no records": ([], None, "holds 0 records"),
    "index beyond the end": ([GOOD_RECORD] * 2, "0 3126\n99999999 3126\n", "train.index does not say so"),
    "index too short": ([GOOD_RECORD] * 2, "0 3126\n", "train.index does not say so"),
    "index too long": ([GOOD_RECORD], "0 3126\n3126 3126\n", "train.index lists 2"),
    "index of letters": ([GOOD_RECORD], "zero many\n", "train.index does not say so"),
}


@pytest.mark.parametrize("good", ["dali"], indirect=True)
@pytest.mark.parametrize("forgery", RECORD_FORGERIES)
def test_forged_records(forgery, pack, capsys):
    records, index, complaint = RECORD_FORGERIES[forgery]
    _forge_records(pack, records, index)
    _refused(pack, capsys, "train.tfrecord", complaint)


@pytest.mark.parametrize("good", ["dali"], indirect=True)
@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 3111, 3109, 0])
def test_forged_length_of_a_record(length, pack, capsys):
    raw = bytearray(pack.file("train.tfrecord").read_bytes())
    assert struct.unpack_from("<Q", raw) == (3110,)
    struct.pack_into("<Q", raw, 0, length)
    pack.file("train.tfrecord").write_bytes(raw)
    _sign(pack)
    _refused(pack, capsys, "train.tfrecord")


def test_forged_pixels_are_no_cifar(pack, small, capsys):
    """Another image under the digests of the true ones: `load` tells by its own digests, `pack_for` refuses."""
    file = pack.file(MAIN[pack.format].format("train"))
    raw = bytearray(file.read_bytes())
    raw[raw.index(small.train.images_NHWC[5].tobytes())] ^= 1
    file.write_bytes(raw)
    _sign(pack)
    loaded = load("cifar10", pack.folder)
    assert loaded.digests["train"] != small.digests["train"]
    with pytest.raises(DataError, match="its train images are not those of not CIFAR-10") as caught:
        pack_for(loaded, pack.format, pack.folder)
    assert caught.value.hint == f"fastcifar data write --format {pack.format} --dataset cifar10"


# Which pack a loader gets


def test_pack_for_keeps_one_in_the_cache_folder(good, small):
    pack = pack_for(small, good.format, None)
    assert pack.folder.parent == cache_folder()
    assert pack.about == good.about
    written_ns = pack.files[0].stat().st_mtime_ns
    assert pack_for(small, good.format, None) == pack
    assert pack.files[0].stat().st_mtime_ns == written_ns


@pytest.mark.parametrize("damage", ["cut short", "no about.json", "garbage"])
def test_pack_in_the_cache_folder_is_mended_with_a_warning(damage, good, small, caplog):
    pack = pack_for(small, good.format, None)
    if damage == "cut short":
        os.truncate(pack.files[0], 1000)
    elif damage == "no about.json":
        pack.file("about.json").unlink()
    else:
        pack.file("about.json").write_text("no JSON")
        (pack.folder / "more").touch()
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert pack_for(small, good.format, None) == pack
    (record,) = caplog.records
    assert {"cut short": f"{pack.files[0]} is cut short: 1,000 of"}.get(damage, "about.json") in record.getMessage()
    assert open_pack(pack.folder) == pack
    assert sum(path.is_dir() for path in pack.folder.parent.iterdir()) == 1


def test_pack_for_takes_the_pack_that_is_named(good, small, cache, monkeypatch):
    assert pack_for(small, good.format, good.folder) == good
    monkeypatch.setenv("FASTCIFAR_DATA", str(good.folder))
    assert pack_for(small, good.format, None) == good
    assert not cache.exists()
    other = next(format for format in FORMATS if format != good.format)
    _need(other)
    assert pack_for(small, other, good.folder).folder.parent == cache_folder()


def test_pack_for_refuses_a_damaged_pack_that_is_named(pack, small):
    os.truncate(pack.files[0], 1000)
    with pytest.raises(DataError, match="is cut short"):
        pack_for(small, pack.format, pack.folder)


def test_pack_for_refuses_other_images_and_another_order(good, small, monkeypatch):
    other = shapes10.generate(100, 50)
    with pytest.raises(DataError, match="its train images are not those of shapes10 from generated"):
        pack_for(other, good.format, good.folder)
    order = np.arange(500)[::-1]
    turned = dataclasses.replace(
        small,
        test=dataclasses.replace(
            small.test, images_NHWC=small.test.images_NHWC[order], labels_N=small.test.labels_N[order]
        ),
    )
    with pytest.raises(DataError, match="its test images are in another order"):
        pack_for(turned, good.format, good.folder)
    monkeypatch.setenv("FASTCIFAR_DATA", str(good.folder))
    assert pack_for(other, good.format, None).about["dataset"] == "shapes10"  # which is never read from there


# Writing


def test_an_existing_pack_is_replaced_and_an_empty_folder_taken(good, tmp_path):
    for seed in (1, 2):
        shapes = shapes10.generate(20, 10, seed)
        write_pack(shapes, good.format, tmp_path / "pack")
        assert open_pack(tmp_path / "pack").about["digests"] == shapes.digests
    other = next(format for format in FORMATS if format != good.format)
    _need(other)
    write_pack(shapes, other, tmp_path / "pack")
    assert MAIN[good.format].format("test") not in os.listdir(tmp_path / "pack")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write_pack(shapes, good.format, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    open_pack(tmp_path / "empty")
    assert not list(tmp_path.glob("*.part"))


def test_what_is_no_pack_is_never_replaced(pack, small_cifar, tmp_path, capsys):
    def refused(folder):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} or folder.read_bytes()
        assert main(["data", "write", "--format", pack.format, "--data", str(small_cifar), "--out", str(folder)]) == 2
        assert f"--out is {folder}, which " in capsys.readouterr().err
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} or folder.read_bytes()
        assert before == after

    (pack.folder / "notes.txt").write_text("mine")
    refused(pack.folder)  # the pack would be replaced, the notes lost
    (pack.folder / "notes.txt").unlink()
    pack.file("about.json").write_text("{}")
    refused(pack.folder)
    pack.file("about.json").unlink()
    refused(pack.folder)
    refused(small_cifar)
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file")


def test_no_room_is_found_before_writing(good, small_cifar, tmp_path, monkeypatch, capsys):
    words = ["data", "write", "--format", good.format, "--data", str(small_cifar)]
    load("cifar10", small_cifar)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    assert main([*words, "--out", str(tmp_path / "pack")]) == 3
    printed = capsys.readouterr().err
    assert f"There is no room left in {tmp_path}" in printed
    assert "this pack needs 48 MB there" in printed
    assert f"try: fastcifar data write --format {good.format} --dataset cifar10 --out /folder" in printed
    assert main(words) == 3
    assert "export FASTCIFAR_CACHE=/folder/with/room" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


# The end of the last page of pixels is where a full disk takes a part and reports nothing.
@pytest.mark.parametrize("limit", [50_000, 16_000_000, 16_777_216])
def test_disk_that_becomes_full(limit, good, tmp_path):
    """A limit on the size of files, which needs no root, ends a write as a full disk does."""
    limit = min(limit, good.files[0].stat().st_size - 1)
    code = """import resource
        shapes = shapes10.generate(2000, 500)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
        try:
            write_pack(shapes, sys.argv[1], pathlib.Path(sys.argv[2]) / "pack")
        except Exception as error:
            print(type(error).__name__, error)
    """
    (tmp_path / "out").mkdir()
    done = _run(code, good.format, tmp_path / "out", limit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"DataError There is no room left in {tmp_path / 'out'} (File too large)"), (
        done.stdout
    )
    assert done.stderr == ""
    assert not list((tmp_path / "out").iterdir())


def test_folder_that_cannot_be_written_to(good, small_cifar, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "below" / "pack"
    assert main(["data", "write", "--format", good.format, "--data", str(small_cifar), "--out", str(out)]) == 3
    assert f"Cannot write to {out.parent}: Not a directory" in capsys.readouterr().err


def test_what_was_written_is_read_again(good, small, tmp_path, monkeypatch):
    kind = pack_module._FORMATS[good.format]

    def write_badly(file, split, progress):
        kind.write(file, split, progress)
        raw = bytearray(file.read_bytes())
        raw[raw.index(split.images_NHWC[5].tobytes())] ^= 1
        file.write_bytes(raw)

    def write_short(file, split, progress):
        kind.write(file, split, progress)
        os.truncate(file, file.stat().st_size // 2)

    for write, complaint in (
        (write_badly, "does not read back as it was written"),
        (write_short, "cannot be read back"),
    ):
        monkeypatch.setitem(pack_module._FORMATS, good.format, dataclasses.replace(kind, write=write))
        with pytest.raises(DataError, match=complaint):
            write_pack(small, good.format, tmp_path / "out" / "pack")
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("last", ["train", "test"])
def test_kill_while_writing(last, good, tmp_path):
    """No pack is there, nor a process; what is left is swept a day later, and nothing else is."""
    code = """def progress(what, done, total):
            if what.startswith("writing " + sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
        write_pack(shapes10.generate(2000, 1000), sys.argv[1], pathlib.Path(sys.argv[2]), progress)
    """
    done = _run(code, good.format, tmp_path / "pack", last)
    assert done.returncode == -9, done.stderr
    (left,) = (path for path in tmp_path.iterdir() if path.name != "cache")
    assert left.suffix == ".part"
    assert not is_pack(left)

    (tmp_path / "mine.part").mkdir()
    shapes = shapes10.generate(20, 10)
    write_pack(shapes, good.format, tmp_path / "pack")
    assert left.exists()
    for path in (left, tmp_path / "mine.part"):
        os.utime(path, (time.time(), time.time() - 25 * 3600))
    write_pack(shapes, good.format, tmp_path / "pack")
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"pack", "mine.part"}


def test_a_pack_may_go_while_another_writer_looks_at_it(pack, monkeypatch):
    def listdir(folder, ask=os.listdir):
        shutil.rmtree(pack.folder)
        return ask(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    write_pack(shapes10.generate(50, 20), pack.format, pack.folder)
    assert open_pack(pack.folder).about["digests"] == shapes10.generate(50, 20).digests


def test_a_pack_may_be_replaced_while_another_writer_looks_at_it(pack, good, monkeypatch):
    looked = []

    def between_two_packs(folder, ask=is_pack):
        looked.append(folder)
        if len(looked) > 1:
            return ask(folder)
        shutil.rmtree(folder)
        shutil.copytree(good.folder, folder)
        return False

    monkeypatch.setattr(pack_module, "is_pack", between_two_packs)
    write_pack(shapes10.generate(50, 20), pack.format, pack.folder)
    assert looked == [pack.folder] * 2
    assert open_pack(pack.folder).about["digests"] == shapes10.generate(50, 20).digests


def test_writers_may_write_at_once(good, tmp_path):
    code = """for _ in range(5):
            write_pack(shapes10.generate(50, 20), sys.argv[1], pathlib.Path(sys.argv[2]))
    """
    command = [
        sys.executable,
        "-c",
        f"import pathlib, sys\nfrom fastcifar.data import shapes10\n"
        f"from fastcifar.data.pack import write_pack\n{code.strip()}",
    ]
    runs = [subprocess.Popen([*command, good.format, tmp_path / "pack"], stderr=-1, text=True) for _ in range(2)]
    for run in runs:
        assert run.communicate()[1] == ""
        assert run.returncode == 0
    assert open_pack(tmp_path / "pack").about["digests"] == shapes10.generate(50, 20).digests
    assert (tmp_path / "pack").stat().st_mode & 0o777 == 0o755  # not mkdtemp's 0o700: data sets are shared
    assert not list(tmp_path.glob("*.part"))


def test_ffcv_leaves_the_threads_alone(tmp_path):
    """Neither importing nor writing changes them; an epoch changes numba's only, up to the number there are."""
    _need("ffcv")
    code = """import numba, torch
        from fastcifar.data.beton import import_ffcv
        torch.set_num_threads(3)
        numba.set_num_threads(2)
        ffcv = import_ffcv()
        assert (torch.get_num_threads(), numba.get_num_threads()) == (3, 2)
        write_pack(shapes10.generate(20, 10), "ffcv", pathlib.Path(sys.argv[1]))
        assert (torch.get_num_threads(), numba.get_num_threads()) == (3, 2)
        compiler = ffcv.pipeline.compiler.Compiler
        for asked, given in ((1, 1), (4, 4), (99, 4), (-1, 4)):
            compiler.set_num_threads(asked)
            assert (torch.get_num_threads(), numba.get_num_threads(), compiler.num_threads) == (3, given, given)
    """
    done = _run(code, tmp_path / "pack", NUMBA_NUM_THREADS="4")
    assert done.returncode == 0, done.stderr
