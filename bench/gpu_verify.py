"""`fastcifar verify-kernels`, an operator each in a process of its own: compiling hundreds of kernels is a CPU's work.

    python bench/gpu_verify.py

What each says is printed as soon as it has ended; the exit code is 1 if any found a miss.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from fastcifar_kernels.verify import OPERATORS


def main() -> None:
    with ThreadPoolExecutor(len(OPERATORS)) as pool:
        ends = [pool.submit(verify, op) for op in OPERATORS]
        missed = 0
        for end in as_completed(ends):
            done = end.result()
            print(done.stdout, flush=True)
            missed += done.returncode != 0
    raise SystemExit(bool(missed))


def verify(op: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastcifar", "verify-kernels", "--op", op]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


if __name__ == "__main__":
    main()
