"""Small made-up data sets, written in every packaging; an empty cache folder for each test."""

import io
import pickle
import shutil
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from fastcifar.data.known import OFFICIAL

N = {"train": 50, "test": 10}


_Pickler: Any = pickle._Pickler  # the one written in Python; not in the type stubs in full


class Python2Pickler(_Pickler):
    """Writes text, bytes and array contents as Python 2 did, and as the official files have them: all one `str`."""

    dispatch: ClassVar[dict] = dict(_Pickler.dispatch)

    def _save_string(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = _save_string


def dump(value, protocol) -> bytes:
    if protocol == "python 2":
        file = io.BytesIO()
        Python2Pickler(file, 2).dump(value)
        return file.getvalue()
    return pickle.dumps(value, protocol)


class Fake:
    """50 training and 10 test images of noise, labelled in turn."""

    def __init__(self, name: str):
        self.official = OFFICIAL[name]
        rng = np.random.default_rng(len(self.official.class_names))
        self.images = {s: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for s, n in N.items()}
        self.labels = {s: [i % len(self.official.class_names) for i in range(n)] for s, n in N.items()}

    def write_folder(self, parent: Path, protocol=4, keys=str) -> Path:
        """The official folder; `keys=str.encode` writes the keys as bytes."""
        folder = parent / self.official.folder
        folder.mkdir(parents=True)
        for split, names in self.official.batches.items():
            parts = np.array_split(np.arange(N[split]), len(names))
            for name, part in zip(names, parts, strict=True):
                rows = np.ascontiguousarray(self.images[split][part].transpose(0, 3, 1, 2)).reshape(len(part), -1)
                labels = [self.labels[split][i] for i in part]
                batch = {"batch_label": name, self.official.labels_key: labels, "data": rows}
                (folder / name).write_bytes(dump({keys(k): v for k, v in batch.items()}, protocol))
        meta = {self.official.class_names_key: list(self.official.class_names), "num_vis": 3072}
        (folder / self.official.meta).write_bytes(dump({keys(k): v for k, v in meta.items()}, protocol))
        return folder

    def write_archive(self, parent: Path, prefix="") -> Path:
        folder = self.write_folder(parent / "to_pack")
        archive = parent / self.official.archive
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, arcname=prefix + folder.name)
        return archive

    def write_pngs(self, folder: Path, class_folder) -> Path:
        for split in N:
            for i, (image, label) in enumerate(zip(self.images[split], self.labels[split], strict=True)):
                png = folder / split / class_folder(label) / f"{i}.png"
                png.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(png)
        return folder

    def write_parquet(self, folder: Path, image_column="img", name="plain_text/{}-00000-of-00001.parquet") -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for split in N:
            cells = []
            for image in self.images[split]:
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                cells.append({"bytes": png.getvalue(), "path": None})
            label_column = "label" if self.official.name == "cifar10" else "fine_label"
            columns = {image_column: cells, label_column: pa.array(self.labels[split], pa.int64())}
            path = folder / name.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), path)
        return folder


@pytest.fixture
def fake() -> Fake:
    return Fake("cifar10")


@pytest.fixture
def fake100() -> Fake:
    return Fake("cifar100")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """No test sees the user's own data or cache."""
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # pytest would keep it, 184 MB for shapes10
