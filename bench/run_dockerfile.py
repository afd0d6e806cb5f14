"""Follow the Dockerfile without Docker: every instruction, in a root folder, by chroot. Needs root and Linux.

    debootstrap --variant=minbase trixie ROOT
    .venv/bin/python bench/run_dockerfile.py ROOT . --run=--help --run=doctor --run='train --dataset shapes10 --steps 4'

ROOT stands in for the image that FROM names, and is changed. Where reaching the package registries takes more than a
network: `--bind` lends a file or folder of this machine to the root meanwhile, `--env` sets a variable.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import extract_key_values


@dataclass
class Image:
    root: Path
    context: Path
    binds: list[str]
    env: dict[str, str]
    user: str = "root"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def obey(self, instruction: str, value: str) -> None:
        match instruction:
            case "FROM" | "COMMENT":
                pass
            case "ARG" | "ENV":
                self.env |= extract_key_values(True, {}, self.env, value)
            case "USER":
                self.user = value
            case "WORKDIR":
                self.folder = value
                self.inside(value).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self.copy(*value.split())
            case "RUN":
                self.run(["/bin/sh", "-c", value])
            case "ENTRYPOINT":
                self.entrypoint = json.loads(value)
            case "CMD":
                self.command = json.loads(value)
            case _:
                sys.exit(f"run_dockerfile: {instruction} is not known here")

    def inside(self, path: str) -> Path:
        """A path of the image, as seen from this machine."""
        return self.root / Path(self.folder, path).relative_to("/")

    def copy(self, source: str, target: str) -> None:
        """`COPY SOURCE TARGET`, by way of .dockerignore; no flags, no patterns."""
        patterns = (self.context / ".dockerignore").read_text().splitlines()

        def ignore(folder: str, names: list[str]) -> list[str]:
            return [name for name in names if ignored(Path(folder, name).relative_to(self.context), patterns)]

        if (self.context / source).is_dir():
            shutil.copytree(self.context / source, self.inside(target), ignore=ignore, dirs_exist_ok=True)
        elif ignored(Path(source), patterns):
            sys.exit(f"run_dockerfile: .dockerignore leaves {source} out")
        else:
            to = self.inside(target) / source if target.endswith("/") else self.inside(target)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.context / source, to)

    def run(self, words: list[str]) -> None:
        """Run `words` in the root as the image's user; exit if they fail."""
        mounts = ["mount -t proc proc proc", "mount --rbind /dev dev"]
        for bind in self.binds:
            source, _, target = bind.partition(":")
            to = (target or source).lstrip("/")
            make = f"mkdir -p {shlex.quote(to)}"
            if not Path(source).is_dir():
                make = f"mkdir -p {shlex.quote(str(Path(to).parent))}; touch {shlex.quote(to)}"
            mounts.append(f"{make}; mount --rbind {shlex.quote(source)} {shlex.quote(to)}")
        # The mounts belong to this one process and vanish with it.
        script = "\n".join(["set -e", *mounts, 'exec chroot "$@"'])
        into = [f"--userspec={self.user}", str(self.root), "/bin/sh", "-c", 'cd "$0" && exec "$@"', self.folder]
        command = ["unshare", "--mount", "sh", "-c", script, "sh", *into, *words]
        done = subprocess.run(command, env=self.env | {"HOME": self.home()}, cwd=self.root)
        if done.returncode:
            sys.exit(f"run_dockerfile: exit code {done.returncode}")

    def home(self) -> str:
        accounts = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
        return next((home for name, _, uid, _, _, home, _ in accounts if self.user in (name, uid)), "/")


def ignored(path: Path, patterns: list[str]) -> bool:
    """As .dockerignore has it: the last pattern that fits the path, or a folder around it, decides."""
    fate = False
    for pattern in patterns:
        if any(fnmatch(str(part), pattern.removeprefix("!")) for part in [path, *path.parents]):
            fate = not pattern.startswith("!")
    return fate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder that holds a Debian or an Ubuntu")
    parser.add_argument("context", type=Path, help="the folder that holds the Dockerfile")
    parser.add_argument("--bind", metavar="SOURCE[:TARGET]", action="append", default=[])
    parser.add_argument("--env", metavar="NAME=VALUE", action="append", default=[])
    parser.add_argument(
        "--run", metavar="WORDS", action="append", default=[], help="then, as in: docker run IMAGE WORDS"
    )
    chosen = parser.parse_args()
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    env |= dict(word.split("=", 1) for word in chosen.env)
    image = Image(chosen.root.resolve(), chosen.context.resolve(), chosen.bind, env)
    steps = [(step["instruction"], step["value"]) for step in DockerfileParser(str(image.context)).structure]
    for instruction, value in steps:
        print(f"\n{instruction} {' '.join(value.split())}", flush=True)
        image.obey(instruction, value)
    for words in chosen.run:
        print(f"\ndocker run IMAGE {words}", flush=True)
        image.run(image.entrypoint + (shlex.split(words) or image.command))


if __name__ == "__main__":
    main()
