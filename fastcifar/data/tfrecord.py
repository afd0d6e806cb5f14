"""DALI's files: one split as a TFRecord file of raw pixels, and the index that DALI wants beside it.

A record is its length, that length's checksum, a protocol buffer, and the checksum of that. A line of the index is
where the record starts and how many bytes it takes.
"""

import importlib
import struct
from pathlib import Path
from types import ModuleType

import numpy as np

from fastcifar.data.dataset import Progress, Split
from fastcifar.data.official import ROW_BYTES
from fastcifar.errors import DataError, UsageError

FRAME_BYTES = 8 + 4 + 4  # what a record takes beside its protocol buffer


def import_tfrecord() -> ModuleType:
    """The tfrecord package. Raises UsageError: it is not installed, or cannot be imported."""
    try:
        return importlib.import_module("tfrecord")
    except Exception as error:  # ImportError, and TypeError or VersionError from a protobuf that does not fit
        raise UsageError(
            f"TFRecord files cannot be used here: {error}.", "make loaders, or: pip install 'fastcifar[dali]'"
        ) from error


def index_of(file: Path) -> Path:
    return file.with_suffix(".index")


def write_tfrecord(file: Path, split: Split, progress: Progress | None = None) -> None:
    """Write `split` in its order, and the index: the same bytes each time. Raises UsageError: no tfrecord package.

    TFRecordWriter.write would do, but it lets protobuf order the two features as the process's hash seed has it.
    """
    tfrecord = import_tfrecord()
    pb, masked_crc = tfrecord.example_pb2, tfrecord.TFRecordWriter.masked_crc
    with open(file, "wb") as out, open(index_of(file), "w") as index:
        for i, (image_HWC, label) in enumerate(zip(split.images_NHWC, split.labels_N.tolist(), strict=True), start=1):
            features = {
                "image": pb.Feature(bytes_list=pb.BytesList(value=[image_HWC.tobytes()])),
                "label": pb.Feature(int64_list=pb.Int64List(value=[label])),
            }
            record = pb.Example(features=pb.Features(feature=features)).SerializeToString(deterministic=True)
            length = struct.pack("<Q", len(record))
            index.write(f"{out.tell()} {len(record) + FRAME_BYTES}\n")
            out.write(length + masked_crc(length) + record + masked_crc(record))
            if progress and i % 1000 == 0:
                progress(f"writing {file.name}", i, len(split))


def read_tfrecord(file: Path, progress: Progress | None = None) -> tuple[np.ndarray, list[int]]:
    """The images, uint8 [N, 32, 32, 3], and the labels of one file and its index.

    Raises UsageError: no tfrecord package. DataError: a record is none of ours, or the index does not fit.
    """
    tfrecord = import_tfrecord()
    index = index_of(file).read_bytes().splitlines()
    images, labels, start = [], [], 0
    try:
        for record in tfrecord.reader.tfrecord_iterator(str(file)):
            where = f"{file}: record {len(labels)}"
            features = tfrecord.example_pb2.Example.FromString(record.tobytes()).features.feature
            image, label = features["image"].bytes_list.value, features["label"].int64_list.value
            if len(image) != 1 or len(label) != 1 or len(image[0]) != ROW_BYTES:
                raise DataError(f"{where} should hold one image of {ROW_BYTES} bytes and one label.")
            if index[len(labels) : len(labels) + 1] != [b"%d %d" % (start, size := len(record) + FRAME_BYTES)]:
                raise DataError(f"{where} is {size:,} bytes at {start:,}, and {index_of(file)} does not say so.")
            images.append(np.frombuffer(image[0], np.uint8))
            labels.append(label[0])
            start += size
            if progress and len(labels) % 1000 == 0:
                progress(f"reading {file.name}", len(labels), len(index))
    except (DataError, OSError):
        raise
    except Exception as error:  # RuntimeError from the package, DecodeError from protobuf, MemoryError, OverflowError
        raise DataError(f"{file} is no file of TFRecords: {type(error).__name__}: {error}.") from error
    if not images or len(images) != len(index):
        raise DataError(f"{file} holds {len(images):,} records, {index_of(file)} lists {len(index):,}.")
    return np.stack(images).reshape(-1, 32, 32, 3), labels
