"""Write fastcifar/data/known_<dataset>.bin, the table that lets `fastcifar data verify` name a wrong image.

    python bench/make_digest_table.py cifar10 PATH      # PATH: any packaging that `--data` takes

For each image of the train split, then of the test split: the first four bytes of the SHA-256 of its label (one byte)
and its 3072 bytes of RGB (row by row), sorted within the split: 240,000 bytes. Refuses data whose whole digest is not
the known one, so anyone who has the official data can make the committed tables again, byte for byte.
"""

import sys
from pathlib import Path

from fastcifar.data import digest, source
from fastcifar.data.known import OFFICIAL


def make_table(dataset: str, path: Path) -> Path:
    """Write the table of `dataset` from the data in `path`, and return where."""
    data = source.prepare(dataset, path)
    if not data.verified:
        raise SystemExit(data.warning)
    with open(OFFICIAL[dataset].table, "wb") as out:
        for split in (data.train, data.test):
            digests = digest.image_digests(split.images_NHWC, split.labels_N)
            out.writelines(sorted(each[: digest.PREFIX_BYTES] for each in digests))
    return OFFICIAL[dataset].table


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in OFFICIAL:
        raise SystemExit(__doc__)
    print(make_table(sys.argv[1], Path(sys.argv[2])))
