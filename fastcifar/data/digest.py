"""Is it really CIFAR? A digest that ignores the order of the images, and a table that names the culprit.

Each image has the SHA-256 of its label (one byte) and its 3072 bytes of RGB, row by row. A split's digest is the
SHA-256 of its images' digests, sorted: so a tar, a folder of PNGs and a parquet file of the same images agree.
`Official.table` (known_<dataset>.bin) holds the first four bytes of each official digest, sorted, train before test
(bench/make_digest_table.py wrote it): too little to call a data set official, enough to say which image is not.
"""

import hashlib
from collections import Counter

import numpy as np

from fastcifar.data.dataset import Progress, RawSplit
from fastcifar.data.known import Official

PREFIX_BYTES = 4


def image_digests(images_NHWC: np.ndarray, labels_N: np.ndarray, progress: Progress | None = None) -> list[bytes]:
    """The SHA-256 of each label and its image. 60,000 of them take 0.2 s."""
    digests = []
    for i, (image_HWC, label) in enumerate(zip(images_NHWC, labels_N.tolist(), strict=True), start=1):
        digests.append(_digest(image_HWC, label))
        if progress and i % 10_000 == 0:
            progress("hashing images", i, len(labels_N))
    return digests


def _digest(image_HWC: np.ndarray, label: int) -> bytes:
    return hashlib.sha256(bytes([label]) + image_HWC.tobytes()).digest()


def combine(digests: list[bytes]) -> str:
    """The digest of a split (hex) from those of its images, whatever their order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def content_digest(images_NHWC: np.ndarray, labels_N: np.ndarray) -> str:
    """The digest of a split (hex): images uint8 [N, 32, 32, 3], labels uint8 [N]."""
    return combine(image_digests(images_NHWC, labels_N))


def first_difference(official: Official, split: str, raw: RawSplit, digests: list[bytes]) -> str:
    """What is the first thing about this split that is not official? Empty if nothing is.

    `digests` are those of `raw`'s images, in its order.
    """
    if combine(digests) == official.digests[split]:
        return ""
    known, seen, surplus = _known_prefixes(official, split), Counter(), []
    for i, digest in enumerate(digests):
        prefix = digest[:PREFIX_BYTES]
        seen[prefix] += 1
        if seen[prefix] > known[prefix]:
            surplus.append(i)

    faults = []
    if len(digests) != official.counts[split]:
        faults.append(f"{len(digests):,} images, {official.title} has {official.counts[split]:,}")
    if surplus:
        more = f" (and {len(surplus) - 1:,} more like it)" if len(surplus) > 1 else ""
        faults.append(_describe(official, split, raw, digests, surplus[0], known, missing=known - seen) + more)
    return "; ".join(faults) or "the SHA-256 differs, in an image that its first four bytes cannot tell apart"


def _describe(official: Official, split, raw: RawSplit, digests, i: int, known: Counter, missing: Counter) -> str:
    """Why image `i` is one too many: it is there twice, wrongly labelled, of the other split, or no CIFAR at all."""
    prefix, label = digests[i][:PREFIX_BYTES], int(raw.labels_N[i])
    names, where = official.class_names, f"{raw.where(i)} (labelled {official.class_names[label]})"
    if known[prefix]:
        twin = next(j for j, digest in enumerate(digests) if digest[:PREFIX_BYTES] == prefix)
        return f"{where} is there twice: it is also {raw.where(twin)}"
    for other, name in enumerate(names):
        if missing[_digest(raw.images_NHWC[i], other)[:PREFIX_BYTES]]:
            return f"the label of {raw.where(i)} should be {name}, is {names[label]}"
    other_split = "test" if split == "train" else "train"
    if _known_prefixes(official, other_split)[prefix]:
        return f"{where} belongs to the {other_split} images of {official.title}"
    return f"{where} is not an image of {official.title}"


def _known_prefixes(official: Official, split: str) -> Counter[bytes]:
    """How often each four-byte prefix occurs among the official digests of a split."""
    table = official.table.read_bytes()
    first = 0 if split == "train" else official.counts["train"]
    rows = range(first, first + official.counts[split])
    return Counter(table[row * PREFIX_BYTES : (row + 1) * PREFIX_BYTES] for row in rows)
