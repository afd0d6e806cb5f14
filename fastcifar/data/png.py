"""Decode one image of a PNG tree or a parquet file."""

import io

import numpy as np

from fastcifar.errors import DataError

# Lossless optimisers store a grey CIFAR image as L or P; anything deeper than 8 bits cannot be CIFAR.
_MODES = ("RGB", "RGBA", "P", "L", "1")


def decode_png(content: bytes, where: str) -> np.ndarray:
    """uint8 [32, 32, 3]. Raises DataError: no PNG, not 32 x 32, not 8 bits deep."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            # Before decoding: a few hundred bytes of PNG can stand for gigabytes of pixels.
            if image.size != (32, 32):
                raise DataError(f"{where} is {image.width} x {image.height} pixels, CIFAR's images are 32 x 32.")
            if image.mode not in _MODES:
                raise DataError(f"{where} is a PNG of mode {image.mode}, CIFAR's images are 8-bit RGB.")
            return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise DataError(f"{where} is not a readable PNG: {error}.") from error
