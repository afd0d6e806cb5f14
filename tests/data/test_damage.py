"""Whatever is wrong with the data, it is a DataError that names it; nothing half-written stays, nothing is run."""

import os
import pickle
import random
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastcifar.data.known import CIFAR10
from fastcifar.data.official import read_folder
from fastcifar.data.safe_pickle import read_dict
from fastcifar.data.source import load
from fastcifar.errors import EXIT_DATA, DataError


def _refuses(path, *fragments, dataset="cifar10") -> DataError:
    """`load` refuses `path`, in one paragraph with these words in it and a command to type; the cache stays empty."""
    with pytest.raises(DataError) as caught:
        load(dataset, path)
    error = caught.value
    for fragment in fragments:
        assert fragment in error.message
    assert "\n" not in error.message
    assert error.hint
    assert error.exit_code == EXIT_DATA
    cache = os.environ["FASTCIFAR_CACHE"]
    assert not os.path.exists(cache) or not os.listdir(cache)
    return error


def _edit(file, **changes):
    batch = pickle.loads(file.read_bytes())
    for key, change in changes.items():
        batch[key] = change(batch[key])
    file.write_bytes(pickle.dumps({key: value for key, value in batch.items() if value is not None}))


BATCH_DAMAGE = {
    "no images": ({"data": lambda d: None}, "data_batch_2 has no 'data'"),
    "no labels": ({"labels": lambda y: None}, "data_batch_2 has no 'labels'"),
    "dtype": ({"data": lambda d: d.astype(np.float32)}, "should be an array of uint8, are float32"),
    "list": ({"data": lambda d: d.tolist()}, "should be an array of uint8, are list"),
    "row length": ({"data": lambda d: d[:, :-1]}, "shape (10, 3071)"),
    "one row": ({"data": lambda d: d[0]}, "shape (3072,)"),
    "empty": ({"data": lambda d: d[:0], "labels": lambda y: []}, "shape (0, 3072)"),
    "objects": ({"data": lambda d: d.astype(object)}, "an array of objects"),
    "structured": ({"data": lambda d: d.view("u1,u1,u1")}, "type 'V3'"),
    "label too high": ({"labels": lambda y: [*y[:-1], 10]}, "label 9 is 10, CIFAR-10 has classes 0 to 9"),
    "label negative": ({"labels": lambda y: [-1, *y[1:]]}, "label 0 is -1"),
    "label huge": ({"labels": lambda y: [10**5000, *y[1:]]}, "whole numbers"),
    "label fraction": ({"labels": lambda y: [0.5, *y[1:]]}, "whole numbers"),
    "label text": ({"labels": lambda y: "0123456789"}, "whole numbers"),
    "fewer labels": ({"labels": lambda y: y[:-1]}, "has 10 images but 9 labels"),
}


@pytest.mark.parametrize("damage", BATCH_DAMAGE)
def test_damaged_batch(damage, fake, tmp_path):
    changes, complaint = BATCH_DAMAGE[damage]
    folder = fake.write_folder(tmp_path)
    _edit(folder / "data_batch_2", **changes)
    _refuses(folder, str(folder), "data_batch_2", complaint)


def test_labels_may_be_an_array(fake, tmp_path):
    folder = fake.write_folder(tmp_path)
    good = load("cifar10", folder).digests
    _edit(folder / "data_batch_2", labels=np.array)
    assert load("cifar10", folder).digests == good


@pytest.mark.parametrize("name", CIFAR10.files)
def test_missing_file(name, fake, tmp_path):
    folder = fake.write_folder(tmp_path)
    (folder / name).unlink()
    _refuses(folder, str(folder), f"{name} missing")


@pytest.mark.parametrize("raw", [b"", b"\x80", b"<html>404</html>", pickle.dumps([1, 2]), pickle.dumps({})])
def test_file_that_is_no_batch(raw, fake, tmp_path):
    folder = fake.write_folder(tmp_path)
    (folder / "data_batch_4").write_bytes(raw)
    _refuses(folder, "data_batch_4")


@pytest.mark.parametrize("names", [None, ["cat"], [1] * 10, "cat"])
def test_wrong_class_names(names, fake, tmp_path):
    folder = fake.write_folder(tmp_path)
    _edit(folder / "batches.meta", label_names=lambda _: names)
    _refuses(folder, "batches.meta")


# Archives


@pytest.mark.parametrize("part", [0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_archive(part, fake, tmp_path):
    archive = fake.write_archive(tmp_path)
    raw = archive.read_bytes()
    archive.write_bytes(raw[: int(len(raw) * part)])
    _refuses(archive, str(archive), "truncated or damaged")


def test_truncated_archive_in_the_cache_folder(fake, cache):
    archive = fake.write_archive(cache)
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(DataError, match="truncated or damaged") as caught:
        load("cifar10")
    assert caught.value.hint == f"rm -r {archive} && fastcifar data prepare --dataset cifar10"


def test_garbled_archive(fake, tmp_path):
    archive = fake.write_archive(tmp_path)
    raw = bytearray(archive.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 100] = bytes(100)
    archive.write_bytes(raw)
    _refuses(archive, str(archive), "truncated or damaged")


def test_archive_of_the_other_data_set(fake100, tmp_path):
    _refuses(fake100.write_archive(tmp_path), "data_batch_1, data_batch_2")


@pytest.mark.parametrize("name", ["../data_batch_1", "../cifar-10-batches-py/data_batch_1"])
def test_archive_cannot_name_where_to_write(name, fake, tmp_path):
    folder = fake.write_folder(tmp_path / "good")
    archive = tmp_path / "evil" / "cifar.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for file in folder.iterdir():
            tar.add(file, arcname=name if file.name == "data_batch_1" else file.name)
    before = sorted(tmp_path.rglob("*"))
    _refuses(archive, "data_batch_1 missing")
    assert sorted(tmp_path.rglob("*")) == before


def test_link_in_an_archive_is_no_batch(fake, tmp_path):
    folder = fake.write_folder(tmp_path)
    (folder / "data_batch_1").rename(tmp_path / "elsewhere")
    (folder / "data_batch_1").symlink_to(tmp_path / "elsewhere")
    with tarfile.open(tmp_path / "links.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    _refuses(tmp_path / "links.tar.gz", "data_batch_1 missing")


# Pickles


class _Touch:
    """Creates a file when it is unpickled by the real thing."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("function", [os.mkdir, eval, getattr, np.frombuffer, np.load])
def test_pickle_cannot_run_anything(function, protocol, fake, tmp_path):
    made = tmp_path / "made"
    args = {os.mkdir: (str(made),), eval: (f"__import__('os').mkdir({str(made)!r})",), getattr: (made, "mkdir")}
    evil = pickle.dumps({"data": _Touch(function, *args.get(function, (b"",)))}, protocol)
    if function is eval:
        pickle.loads(evil)  # it would indeed
        made.rmdir()
    folder = fake.write_folder(tmp_path)
    (folder / "test_batch").write_bytes(evil)
    error = _refuses(folder, "test_batch is a pickle that asks for", "nothing in it was run")
    assert function is getattr or function.__name__ in error.message
    assert not made.exists()


def test_pickle_cannot_reach_numpy_through_the_stand_ins():
    """`numpy.dtype` keeps what it is given: nothing numpy would act on, and nothing that stays for the next file."""
    for evil in (
        b"cnumpy\nndarray\n(dS'__init__'\nNsb.",  # BUILD on the class itself
        b"cnumpy.core.multiarray\n_reconstruct\n(N(dS'x'\nI1\nstb.",  # BUILD with attributes to set
        b"cnumpy\nndarray.__init__\n.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    ):
        with pytest.raises(DataError):
            read_dict(evil, "evil")
    array = np.arange(6, dtype=np.uint8)
    np.testing.assert_array_equal(read_dict(pickle.dumps({"a": array}), "good")["a"], array)


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "f4", "?"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_survive(dtype, protocol, order):
    array = np.asarray(np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(dtype), order=order)
    got = read_dict(pickle.dumps({"data": array}, protocol), "here")["data"]
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype


@pytest.mark.parametrize("code", [b"N\x96%s.", b"N\x8e%s.", b"N\x8d%s.", b"\x80\x04\x95%s"])
@pytest.mark.parametrize("size", [2**40, 2**63 - 1, 2**64 - 1])
def test_pickle_that_claims_to_be_huge(code, size):
    with pytest.raises(DataError):
        read_dict(code % size.to_bytes(8, "little"), "huge")


@pytest.fixture
def small_folder(fake, tmp_path):
    """The shortest complete data set: an image a batch."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in CIFAR10.files:
        rows = np.full((1, 3072), 7, dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [1], "label_names": list("abcdefghij")}))
    return folder


@given(seed=st.integers(0, 2**32), n_flips=st.integers(1, 4), keep=st.floats(0.5, 1), header_only=st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_pickle_raises_nothing_but_data_errors(small_folder, seed, n_flips, keep, header_only):
    batch = small_folder / "data_batch_1"
    if not batch.with_suffix(".good").exists():
        batch.with_suffix(".good").write_bytes(batch.read_bytes())
    raw = bytearray(batch.with_suffix(".good").read_bytes())
    rng = random.Random(seed)
    opcodes = [at for at in range(len(raw)) if raw[at] != 7] if header_only else range(len(raw))
    for _ in range(n_flips):
        raw[rng.choice(opcodes)] = rng.randrange(256)
    batch.write_bytes(raw[: int(len(raw) * keep)] if rng.random() < 0.3 else raw)
    try:
        shape, complaint = read_folder(CIFAR10, small_folder).splits["train"].images_NHWC.shape, ""
    except DataError as error:
        shape, complaint = None, error.message
    assert "data_batch_1" in complaint if shape is None else shape[1:] == (32, 32, 3)


# PNGs and parquet files


def test_png_of_the_wrong_size(fake, tmp_path):
    folder = fake.write_pngs(tmp_path / "pngs", str)
    Image.new("RGB", (33, 32)).save(folder / "train" / "4" / "4.png")
    _refuses(folder, "train/4/4.png is 33 x 32 pixels")


def test_png_of_sixteen_bits(fake, tmp_path):
    folder = fake.write_pngs(tmp_path / "pngs", str)
    Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(folder / "train" / "4" / "4.png")
    _refuses(folder, "train/4/4.png is a PNG of mode I")


@pytest.mark.parametrize("kind", ["jpeg", "truncated", "empty", "text"])
def test_file_that_is_no_png(kind, fake, tmp_path):
    folder = fake.write_pngs(tmp_path / "pngs", str)
    file = folder / "test" / "5" / "5.png"
    if kind == "jpeg":
        Image.open(file).save(file, "jpeg")
    else:
        file.write_bytes({"truncated": file.read_bytes()[:300], "empty": b"", "text": b"no image"}[kind])
    _refuses(folder, "test/5/5.png is not a readable PNG")


def test_folders_of_pngs_that_are_wrong(fake, tmp_path):
    folder = fake.write_pngs(tmp_path / "pngs", str)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / ".ipynb_checkpoints" / "x.png").touch()
    (folder / "train" / "3" / ".DS_Store").touch()
    load("cifar10", folder)
    os.remove(next(iter((tmp_path / "cache").iterdir())))
    (folder / "test" / "9").rename(folder / "test" / "lorry")
    _refuses(folder, "test/lorry is the folder of no class of CIFAR-10", "airplane, automobile")
    (folder / "test").rename(folder / "val")
    _refuses(folder, "has no test images")


def test_parquet_files_that_are_wrong(fake, fake100, tmp_path):
    _refuses(fake100.write_parquet(tmp_path / "other"), "no train images of CIFAR-10", "column label")
    folder = fake.write_parquet(tmp_path / "data")
    test = folder / "plain_text" / "test-00000-of-00001.parquet"
    raw = test.read_bytes()
    test.write_bytes(raw[:-10])
    _refuses(folder, str(test), "truncated or no parquet file")
    test.write_bytes(raw.replace(b"\x89PNG", b"\x89JPG"))
    _refuses(folder, "row 0 of plain_text/test-00000-of-00001.parquet is not a readable PNG")
    test.unlink()
    _refuses(folder, "no test images of CIFAR-10")
    fake.labels["test"][3] = 10
    fake.write_parquet(folder)
    _refuses(folder, str(test), "label 3 is 10")
    fake.labels["test"][3] = None
    fake.write_parquet(folder)
    _refuses(folder, str(test), "whole numbers")


def test_parquet_without_pyarrow(fake, tmp_path):
    folder = fake.write_parquet(tmp_path)
    done = _run("import sys; sys.modules['pyarrow'] = None; load('cifar10', path)", folder)
    assert "pip install 'fastcifar[parquet]'" in done


# Places


def test_paths_that_hold_nothing(fake100, tmp_path):
    _refuses(tmp_path / "nowhere", "there is no such file or folder")
    (tmp_path / "empty").mkdir()
    error = _refuses(
        tmp_path / "empty", "cifar-10-python.tar.gz", "cifar-10-batches-py", "train/CLASS/*.png", "parquet"
    )
    assert error.hint == "fastcifar data prepare --dataset cifar10"
    (tmp_path / "notes.txt").touch()
    _refuses(tmp_path / "notes.txt", "holds no CIFAR-10")
    error = _refuses(fake100.write_folder(tmp_path), "holds CIFAR-100, not CIFAR-10")
    assert "--dataset cifar100" in error.hint


def _run(code, path, **environment) -> str:
    """Run `code` in a process of its own and return the DataError that it ends with."""
    code = f"""if True:
        import pathlib, sys
        from fastcifar.data.source import load
        from fastcifar.errors import DataError
        path = pathlib.Path(sys.argv[1])
        try:
            {code}
        except DataError as error:
            print(error)
    """
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_full_disk(fake, cache, tmp_path):
    """A limit on the size of files, which needs no root, ends a write as a full disk does."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); load('cifar10', path)"
    printed = _run(limit, fake.write_folder(tmp_path))
    assert f"There is no room left in {cache}" in printed
    assert "FASTCIFAR_CACHE=" in printed
    assert list(cache.iterdir()) == []


def test_cache_folder_that_cannot_be_written_to(fake, tmp_path):
    folder = fake.write_folder(tmp_path)
    (tmp_path / "file").touch()
    printed = _run("load('cifar10', path)", folder, FASTCIFAR_CACHE=str(tmp_path / "file" / "cache"))
    assert f"Cannot write to the cache folder {tmp_path / 'file' / 'cache'}" in printed
    assert "FASTCIFAR_CACHE=" in printed


def test_an_archive_is_read_in_memory(fake, cache, tmp_path):
    archive = fake.write_archive(tmp_path)
    before = set(tmp_path.rglob("*"))
    dataset = load("cifar10", archive)
    assert set(tmp_path.rglob("*")) - before == {cache, dataset.cache_file}
