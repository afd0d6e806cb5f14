"""Which container should DALI read: TFRecord or WebDataset? Both take an epoch's order from an index file.

    python bench/dali_container.py --data PATH --out bench/records/DATE-dali-container/result.json

Writes the training images in both, then reads full epochs in random order, a new pipeline each, in turn, without
augmentation: only the reader differs.
"""

# DALI's type stubs do not know what its decorators return, nor the members of its types.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, tfrecord, types
from nvidia.dali.pipeline import pipeline_def

from fastcifar.benchmarks.loaders import versions
from fastcifar.data import source
from fastcifar.data.dataset import Split
from fastcifar.data.tfrecord import write_tfrecord
from fastcifar.display import Display
from fastcifar.process import physical_cores, processor
from fastcifar.run import source_commit, write_atomically

BATCH, ROUNDS = 1000, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    split = source.load("cifar10", chosen.data, Display().work).train
    containers = {"tfrecord": (write_tfrecord, read_tfrecord), "webdataset": (write_webdataset, read_webdataset)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        readers = []
        for name, (write, read) in containers.items():
            file = Path(folder) / f"{name}.data"
            began_s = time.perf_counter()
            write(file, split, None)
            written = {"container": name, "write_s": time.perf_counter() - began_s, "bytes": file.stat().st_size}
            lines = file.with_suffix(".index").read_text().splitlines()
            heading = lines[: len(lines) - len(split)]
            for workers in sorted({1, physical_cores()}):
                rows.append(written | {"workers": workers, "build_s": [], "images_per_s": []})
                readers.append((read, file, heading, lines[len(heading) :], workers))
        for epoch in range(ROUNDS + 1):
            order_N = np.random.default_rng(epoch).permutation(len(split))
            for row, reader in zip(rows, readers, strict=True):
                build_s, epoch_s, labels_N = read_epoch(*reader, order_N)
                assert np.array_equal(labels_N, split.labels_N[order_N])
                if epoch:
                    row["build_s"].append(build_s)
                    row["images_per_s"].append(len(split) / (build_s + epoch_s))
    for row in rows:
        row |= {key: statistics.median(row[key]) for key in ("build_s", "images_per_s")}
        print(json.dumps(row))
    about = {"machine": f"{processor()}, {physical_cores()} cores", "versions": versions(), "commit": source_commit()}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen.out, json.dumps(about | {"batch_size": BATCH, "rows": rows}, indent=2).encode())


def read_epoch(read, file: Path, heading: list[str], lines: list[str], workers: int, order_N):
    """(seconds to build the pipeline, seconds to read an epoch, the labels as they came)."""
    began_s = time.perf_counter()
    index = file.with_suffix(".order")
    index.write_text("\n".join(heading + [lines[place] for place in order_N]) + "\n")

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None, exec_dynamic=True)
    def pipeline():
        image, label = read(str(file), str(index))
        return fn.reinterpret(image, shape=[32, 32, 3], layout="HWC"), label

    made = pipeline()
    made.build()
    built_s, labels = time.perf_counter(), []
    for _ in range(len(order_N) // BATCH):
        images, label = made.run()
        assert torch.from_dlpack(images.as_tensor()).shape == (BATCH, 32, 32, 3)
        labels.append(np.array(label.as_tensor()).ravel())
    return built_s - began_s, time.perf_counter() - built_s, np.concatenate(labels)


def read_tfrecord(file: str, index: str):
    image = tfrecord.FixedLenFeature((), tfrecord.string, "")
    label = tfrecord.FixedLenFeature([1], tfrecord.int64, -1)
    record = fn.readers.tfrecord(path=[file], index_path=[index], features={"image": image, "label": label})
    return record["image"], record["label"]


def read_webdataset(file: str, index: str):
    return fn.readers.webdataset(paths=[file], index_paths=[index], ext=["rgb", "cls"], dtypes=[types.UINT8] * 2)


def write_webdataset(file: Path, split: Split, progress: None) -> None:
    """A tar of two members for each image, and the index that DALI's wds2idx would make of it."""
    lines = [f"v1.2 {len(split)}"]
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for n, (image_HWC, label) in enumerate(zip(split.images_NHWC, split.labels_N.tolist(), strict=True)):
            parts = []
            for ext, content in (("rgb", image_HWC.tobytes()), ("cls", bytes([label]))):
                member = tarfile.TarInfo(f"{n:05d}.{ext}")
                member.size = len(content)
                parts.append(f"{ext} {tar.offset + tarfile.BLOCKSIZE} {len(content)} {member.name}")
                tar.addfile(member, io.BytesIO(content))
            lines.append(" ".join(parts))
    file.with_suffix(".index").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
