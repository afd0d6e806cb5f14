"""What numba has compiled and keeps in __pycache__: thrown away when it may be of other sources than these.

numba itself compiles a loop anew when the file that the loop stands in has changed, but not when another has, from
which the loop takes functions into itself.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path


def forget_stale(folder: Path) -> None:
    """Delete what numba keeps for the loops in `folder`, unless this package is what it was at the last call.

    Only where numba keeps it beside the sources: not in a folder of NUMBA_CACHE_DIR, nor where one may not write, which
    is where packages are installed, all files of which are replaced at once.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    cache = folder / "__pycache__"
    known = cache / "fastcifar_kernels.sha256"
    with suppress(OSError):
        if not known.exists() or known.read_text() != digest.hexdigest():
            cache.mkdir(exist_ok=True)
            for compiled in cache.glob("*.nb[ci]"):
                compiled.unlink(missing_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
                file.write(digest.hexdigest())
            os.replace(file.name, known)
