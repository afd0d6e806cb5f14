"""Fetch the official archive, with torchvision."""

import http.client
import importlib.util
import os
import socket
import tempfile
from pathlib import Path

from fastcifar.data.cache import FULL, PREFIX, SUFFIX, storage_error, sweep
from fastcifar.errors import DataError, DataMissing

TIMEOUT_S = 10

_declared = []  # a torch.library.Library forgets its operators when it is collected


def download(url: str, md5: str, folder: Path) -> Path:
    """Fetch `url` into `folder` and return where it lies; under its final name there is only ever the whole file.

    Raises DataMissing: no network. DataError: the wrong MD5, no room.
    """
    name = url.rsplit("/", 1)[-1]
    utils = import_torchvision().datasets.utils
    timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)  # torchvision sets none: without a network it can hang for minutes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=PREFIX, suffix=SUFFIX) as unfinished:
            try:
                utils.download_url(url, unfinished, name, md5)
            except RuntimeError as error:  # what torchvision raises for a wrong MD5
                size = (Path(unfinished) / name).stat().st_size
                raise DataError(
                    f"The {size:,} bytes that came from {url} are not the official file: their MD5 is not {md5}. "
                    "Either the download broke off, and the same command tries again, or it is another file."
                ) from error
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                if getattr(error, "errno", None) in FULL:
                    raise
                reason = getattr(error, "reason", error)
                raise DataMissing(
                    f"No --data is given, $FASTCIFAR_DATA is not set, {folder} holds no {name}, and it cannot be "
                    f"downloaded from {url}: {reason}. Is there a network?"
                ) from error
            os.replace(Path(unfinished) / name, folder / name)
    except OSError as error:
        raise storage_error(error, folder) from error
    finally:
        socket.setdefaulttimeout(timeout_s)
    return folder / name


def import_torchvision():
    """Import torchvision, also where its wheel was built for another torch (the CUDA wheel beside a CPU-only torch).

    There its compiled part cannot be loaded and the import fails with "operator torchvision::nms does not exist",
    though datasets, transforms and models need none of it. Declaring the two operators it misses is enough. Loading the
    library here tells whether it is needed: where the library loads it declares them too, and twice is an error.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec and spec.origin and not _declared:
        try:
            for library in Path(spec.origin).parent.glob("_C.*"):
                torch.ops.load_library(str(library))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)
    import torchvision.datasets.utils

    return torchvision
