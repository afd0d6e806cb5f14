"""The Dockerfile, as far as it can be judged without Docker; bench/run_dockerfile.py goes further."""

import subprocess
import sysconfig
from pathlib import Path

from dockerfile_parse import DockerfileParser

REPOSITORY = Path(__file__).parents[1]


def test_linter_finds_nothing():
    linter = Path(sysconfig.get_path("scripts"), "hadolint")
    done = subprocess.run([linter, "Dockerfile"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_base_image_has_one_fixed_version():
    (base,) = DockerfileParser(str(REPOSITORY)).parent_images
    assert base.partition(":")[2].partition("-")[0].count(".") == 2
