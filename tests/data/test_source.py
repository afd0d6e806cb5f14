import dataclasses
import hashlib
import http.server
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from fastcifar.data.dataset import RawSplit, pixel_statistics
from fastcifar.data.digest import PREFIX_BYTES, combine, content_digest, first_difference, image_digests
from fastcifar.data.download import download
from fastcifar.data.known import CIFAR10, OFFICIAL
from fastcifar.data.source import describe, load, prepare, verify
from fastcifar.errors import DataError, UsageError

REAL = os.environ.get("FASTCIFAR_DATA")  # read before the tests hide it

PACKAGINGS = {
    "official folder": lambda f, p: f.write_folder(p),
    "folder that holds the official one": lambda f, p: f.write_folder(p).parent,
    "Python 2 pickles": lambda f, p: f.write_folder(p, protocol="python 2"),
    "bytes as keys": lambda f, p: f.write_folder(p, keys=str.encode),
    "bytes as keys, protocol 2": lambda f, p: f.write_folder(p, protocol=2, keys=str.encode),
    "protocol 0": lambda f, p: f.write_folder(p, protocol=0),
    "protocol 5": lambda f, p: f.write_folder(p, protocol=5),
    "official archive": lambda f, p: f.write_archive(p),
    "archive packed with ./": lambda f, p: f.write_archive(p, prefix="./"),
    "folder that holds the archive": lambda f, p: f.write_archive(p).parent,
    "PNGs by class name": lambda f, p: f.write_pngs(p, lambda label: f.official.class_names[label]),
    "PNGs by class number": lambda f, p: f.write_pngs(p, str),
    "parquet as on the hub": lambda f, p: f.write_parquet(p),
    "parquet, image column": lambda f, p: f.write_parquet(p, image_column="image"),
    "parquet, split folders": lambda f, p: f.write_parquet(p, name="default/{}/0000.parquet"),
}


@pytest.mark.parametrize("which", ["fake", "fake100"])
@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_every_packaging_gives_the_same_arrays(packaging, which, request, tmp_path):
    fake = request.getfixturevalue(which)
    dataset = load(fake.official.name, PACKAGINGS[packaging](fake, tmp_path / "data"))
    for split in ("train", "test"):
        images, labels = fake.images[split], np.array(fake.labels[split], dtype=np.uint8)
        order = sorted(range(len(labels)), key=image_digests(images, labels).__getitem__)
        got = getattr(dataset, split)
        np.testing.assert_array_equal(got.images_NHWC, images[order])
        np.testing.assert_array_equal(got.labels_N, labels[order])
        assert got.images_NHWC.dtype == got.labels_N.dtype == np.uint8
        assert not got.images_NHWC.flags.writeable
        assert not got.labels_N.flags.writeable
        assert dataset.digests[split] == content_digest(images, labels)
    assert dataset.class_names == fake.official.class_names
    assert dataset.cache_file is not None


def test_one_folder_may_hold_both_data_sets(fake, fake100, tmp_path):
    for each in (fake, fake100):
        each.write_folder(tmp_path)
    assert load("cifar10", tmp_path).train.labels_N.max() == 9
    assert load("cifar100", tmp_path).train.labels_N.max() == 49
    for each in (fake, fake100):
        each.write_parquet(tmp_path / "hub", name=each.official.name + "/{}-0.parquet")
    assert len(load("cifar10", tmp_path / "hub").train) == 50
    assert len(load("cifar100", tmp_path / "hub").train) == 50


def test_a_modified_set_loads_and_says_so(fake, tmp_path):
    dataset = load("cifar10", fake.write_folder(tmp_path))
    assert dataset.title == "not CIFAR-10"
    assert not dataset.verified
    assert dataset.warning.startswith("not CIFAR-10: train: 50 images, CIFAR-10 has 50,000; image 0 of data_batch_1")
    rows = dict(describe(dataset))
    assert rows["official"] == "no"
    assert rows["train"] == "50 images, 5 a class"


def test_class_names_are_part_of_the_data(fake, tmp_path):
    fake.official = dataclasses.replace(fake.official, class_names=("aeroplane", *CIFAR10.class_names[1:]))
    dataset = load("cifar10", fake.write_folder(tmp_path))
    assert dataset.class_names[0] == "aeroplane"
    assert "class 0 is called aeroplane, should be airplane" in dataset.warning


# Where to look


def test_environment_variable(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIFAR_DATA", str(fake.write_folder(tmp_path)))
    assert len(load("cifar10").train) == 50
    with pytest.raises(DataError, match=r"\$FASTCIFAR_DATA .* holds CIFAR-10, not CIFAR-100"):
        load("cifar100")  # no falling through to the network


def test_data_flag_wins_and_does_not_fall_through(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIFAR_DATA", str(fake.write_folder(tmp_path / "good")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no CIFAR-10"):
        load("cifar10", tmp_path / "empty")


@pytest.mark.parametrize("write", ["write_folder", "write_archive"])
def test_cache_folder_is_searched(fake, cache, write):
    getattr(fake, write)(cache)
    assert len(load("cifar10").train) == 50


def test_unknown_data_set_and_generated_one_with_a_path(tmp_path):
    with pytest.raises(UsageError, match="cifar10, cifar100, shapes10"):
        load("mnist")
    with pytest.raises(UsageError, match="leave out --data"):
        load("shapes10", tmp_path)


def test_importing_is_light():
    heavy = "{'torch', 'torchvision', 'numba', 'pyarrow', 'PIL', 'matplotlib'}"
    code = f"import sys, fastcifar.data.source; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# The cache


def _file(dataset) -> Path:
    assert dataset.cache_file is not None
    return dataset.cache_file


def test_cache_file_is_reused_until_the_source_changes(fake, tmp_path, caplog):
    folder = fake.write_folder(tmp_path)
    first = _file(load("cifar10", folder)).stat().st_mtime_ns
    assert _file(load("cifar10", folder)).stat().st_mtime_ns == first
    assert _file(prepare("cifar10", folder)).stat().st_mtime_ns > first

    fake.images["train"][0] = 0
    shutil.rmtree(folder)
    fake.write_folder(tmp_path)
    changed = load("cifar10", folder)
    assert (changed.train.images_NHWC == 0).all(axis=(1, 2, 3)).sum() == 1
    assert len(list(_file(changed).parent.iterdir())) == 1
    assert not caplog.records


def test_cache_file_is_a_safetensors_file(fake, tmp_path):
    dataset = load("cifar10", fake.write_folder(tmp_path))
    arrays = safetensors.numpy.load_file(_file(dataset))
    np.testing.assert_array_equal(arrays["train.images"], dataset.train.images_NHWC)
    np.testing.assert_array_equal(arrays["test.labels"], dataset.test.labels_N)


def _flip(at):
    def damage(raw):
        raw = bytearray(raw)
        raw[at(raw)] ^= 1
        return bytes(raw)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"no safetensors",
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        _flip(lambda raw: 0),
        _flip(lambda raw: len(raw) - 1),
        _flip(lambda raw: len(raw) // 2),
        _flip(lambda raw: raw.index(b"airplane")),
        _flip(lambda raw: raw.index(b"[153600, ") + 1),
        _flip(lambda raw: raw.index(b"mean_C") + 12),
    ],
)
def test_damaged_cache_file_is_written_again(damage, fake, tmp_path, caplog):
    folder = fake.write_folder(tmp_path)
    good = load("cifar10", folder)
    raw = _file(good).read_bytes()
    _file(good).unlink()  # `good` still maps it
    _file(good).write_bytes(damage(raw))
    with caplog.at_level(logging.WARNING):
        again = load("cifar10", folder)
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(again.train.images_NHWC, good.train.images_NHWC)
    assert again.class_names == good.class_names
    assert _file(again).read_bytes() == raw


def test_processes_may_prepare_at_once(fake, cache, tmp_path):
    folder = fake.write_folder(tmp_path)
    code = """if True:
        import sys, pathlib
        from fastcifar.data.source import load, prepare
        for _ in range(20):
            digests = {prepare("cifar10", pathlib.Path(sys.argv[1])).digests["train"],
                       load("cifar10", pathlib.Path(sys.argv[1])).digests["train"]}
            assert len(digests) == 1
        print(digests)
    """
    runs = [subprocess.Popen([sys.executable, "-c", code, folder], stdout=-1, stderr=-1, text=True) for _ in range(2)]
    outputs = [run.communicate() for run in runs]
    assert outputs[0] == outputs[1]
    assert content_digest(fake.images["train"], np.array(fake.labels["train"])) in outputs[0][0]
    assert len(list(cache.iterdir())) == 1


# Is it CIFAR?


@pytest.fixture
def claimed(fake, tmp_path):
    """An official data set that consists of the fake images."""
    table = b""
    digests = {}
    for split in ("train", "test"):
        each = sorted(image_digests(fake.images[split], np.array(fake.labels[split])))
        digests[split] = combine(each)
        table += b"".join(digest[:PREFIX_BYTES] for digest in each)
    (tmp_path / "table.bin").write_bytes(table)
    counts = {"train": 50, "test": 10}
    return dataclasses.replace(fake.official, digests=digests, counts=counts, table=tmp_path / "table.bin")


def _difference(official, images, labels, split="train"):
    labels = np.array(labels, dtype=np.uint8)
    raw = RawSplit(images, labels, lambda i: f"image {i}")
    return first_difference(official, split, raw, image_digests(images, labels))


def test_difference_of_nothing(claimed, fake):
    backwards = _difference(claimed, fake.images["train"][::-1], fake.labels["train"][::-1])
    assert backwards == ""


def test_differences_are_named(claimed, fake):
    images, labels = fake.images["train"], fake.labels["train"]
    assert _difference(claimed, images[1:], labels[1:]) == "49 images, CIFAR-10 has 50"

    changed = images.copy()
    changed[[7, 11], 0, 0, 0] ^= 1
    text = _difference(claimed, changed, labels)
    assert text == "image 7 (labelled horse) is not an image of CIFAR-10 (and 1 more like it)"

    text = _difference(claimed, images, [*labels[:16], 3, *labels[17:]])
    assert text == "the label of image 16 should be frog, is cat"

    changed = images.copy()
    changed[30] = images[10]
    assert _difference(claimed, changed, labels) == "image 30 (labelled airplane) is there twice: it is also image 10"

    changed = images.copy()
    changed[5] = fake.images["test"][5]
    text = _difference(claimed, changed, labels)
    assert text == "image 5 (labelled dog) belongs to the test images of CIFAR-10"

    more = np.concatenate([images, images[:1]])
    text = _difference(claimed, more, [*labels, 0])
    assert text == "51 images, CIFAR-10 has 50; image 50 (labelled airplane) is there twice: it is also image 0"


def test_verify_names_the_file(fake, tmp_path):
    def first(path):
        return verify("cifar10", path)[0].text.split("; ")[1]

    assert first(fake.write_folder(tmp_path / "a")).startswith("image 0 of data_batch_1 (labelled airplane) is not")
    assert first(fake.write_archive(tmp_path / "b")).startswith("image 0 of data_batch_1 ")
    assert first(fake.write_pngs(tmp_path / "c", str)).startswith("train/0/0.png (labelled airplane) is not")
    assert first(fake.write_parquet(tmp_path / "d")).startswith("row 0 of plain_text/train-00000-of-00001.parquet ")


def test_verify_reads_the_source_not_the_cache(fake, tmp_path):
    folder = fake.write_folder(tmp_path)
    load("cifar10", folder)
    batch = folder / "test_batch"
    stat, raw = batch.stat(), bytearray(batch.read_bytes())
    raw[-1000] = 255
    batch.write_bytes(raw[:-500])
    os.utime(batch, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="test_batch is damaged"):
        verify("cifar10", folder)


@given(st.randoms(use_true_random=False))
def test_digest_ignores_the_order(random):
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    order = random.sample(range(6), 6)
    assert content_digest(images[order], labels[order]) == content_digest(images, labels)
    assert content_digest(images[order], labels) != content_digest(images, labels) or order == sorted(order)


def test_pixel_statistics():
    images = np.random.default_rng(0).integers(0, 256, (1201, 32, 32, 3), dtype=np.uint8)
    mean, std = pixel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-10)


def test_progress_is_reported(fake, tmp_path):
    calls = []
    prepare("cifar10", fake.write_pngs(tmp_path, str), lambda what, done, total: calls.append((what, done, total)))
    assert ("reading train PNGs", 50, 50) in calls
    assert ("reading test PNGs", 10, 10) in calls


@pytest.mark.skipif(not REAL, reason="FASTCIFAR_DATA is not set")
@pytest.mark.parametrize("name", OFFICIAL)
def test_real_cifar(name):
    """The shipped tables and digests, on the real images."""
    official = OFFICIAL[name]
    assert REAL is not None
    try:
        dataset = load(name, Path(REAL))
    except DataError as error:
        pytest.skip(str(error))
    assert dataset.verified, dataset.warning
    assert all(finding.verified for finding in verify(name, Path(REAL)))
    images, labels = dataset.train.images_NHWC.copy(), dataset.train.labels_N.copy()
    right = labels[711]
    labels[711] = (right + 1) % len(official.class_names)
    assert _difference(official, images, labels).startswith(
        f"the label of image 711 should be {official.class_names[right]}, is {official.class_names[labels[711]]}"
    )
    labels[711] = right
    images[711, 5, 5, 1] ^= 1
    assert "is not an image of" in _difference(official, images, labels)
    images[711] = images[3]
    labels[711] = labels[3]
    assert "is there twice" in _difference(official, images, labels)


def test_a_folder_that_was_not_wholly_extracted_does_not_hide_the_archive(fake, tmp_path):
    archive = fake.write_archive(tmp_path)
    folder = tmp_path / fake.official.folder
    folder.mkdir()
    assert len(load("cifar10", tmp_path).train) == 50
    whole = archive.parent / "to_pack" / folder.name
    for name in fake.official.files[:3]:
        (folder / name).write_bytes((whole / name).read_bytes())
    assert load("cifar10", tmp_path).origin == f"official archive {archive}"
    archive.unlink()
    with pytest.raises(DataError, match=fake.official.files[3]):
        load("cifar10", tmp_path)


# Download


@pytest.fixture
def server(fake, tmp_path):
    """The fake archive, and a copy that breaks off, on a web server of our own; (address, MD5 of the archive)."""
    raw = fake.write_archive(tmp_path / "served").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw[:1000] if "broken" in self.path else raw)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", hashlib.md5(raw).hexdigest()
        httpd.shutdown()


def test_download(server, fake, cache):
    address, md5 = server
    archive = download(f"{address}/{fake.official.archive}", md5, cache)
    assert archive == cache / fake.official.archive
    assert len(load("cifar10").train) == 50
    size = archive.stat().st_size
    archive.unlink()
    killed = cache / "fastcifar-1.part"  # a download of another day
    killed.mkdir()
    (killed / archive.name).touch()
    os.utime(killed, (0, 0))
    (cache / "mine.part").touch()
    os.utime(cache / "mine.part", (0, 0))
    for url, wrong_md5, complaint in [
        (f"{address}/{archive.name}", "0" * 32, f"^The {size:,} bytes .* MD5 is not"),
        (f"{address}/broken/{archive.name}", md5, "^The 1,000 bytes .* broke off"),
        (f"http://127.0.0.1:1/{archive.name}", md5, "Is there a network"),
    ]:
        with pytest.raises(DataError, match=complaint):
            download(url, wrong_md5, cache)
        assert {path.suffix for path in cache.iterdir()} == {".safetensors", ".part"}
        assert [path.name for path in cache.glob("*.part")] == ["mine.part"]
