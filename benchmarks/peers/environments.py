"""Python environments in which the peers are installed, made when they are asked for, so that none enters ours.

Torch comes first and by itself, and nothing after it may bring another: packages are installed with `--no-deps`, and
what they need besides is named here. The repository root on PYTHONPATH is all that they see of this project.
`python -m benchmarks.peers.environments` makes them all beforehand.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path("bench-results") / "environments"
TORCH = "torch==2.13.0"
DEPENDENCIES_OF_TORCH = ("numpy", "psutil")

ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "dlrover": (
        "dlrover==0.6.1",
        "psutil",
        "pynvml",
        "nvidia-ml-py",
        "deprecated",
        "wrapt",
        "requests",
        "urllib3",
        "idna",
        "certifi",
        "charset-normalizer",
        "packaging",
        "protobuf",
        "grpcio",
    ),
    "lm-resiliency": ("lm-resiliency==0.2.0",),
    "bytecheckpoint": (
        "bytecheckpoint==0.0.2",
        "grpcio==1.69.0",
        "protobuf==3.20.3",
        "mmh3==4.1.0",
        "universal_pathlib",
        "pathlib_abc",
        "cachetools",
        "safetensors",
    ),
    "torch-checkpointing": ("torch-checkpointing==0.1.1", "safetensors"),
}
"""name -> what is installed after torch, without dependencies."""


class EnvironmentSetupError(Exception):
    """An environment that could not be made; the message says what the installer said."""


def python(name: str, directory: Path = ROOT) -> Path:
    """The interpreter of an environment under `directory`; made if it is not there or was made of something else."""
    root = (directory / name).absolute()
    wanted = "\n".join((TORCH, *DEPENDENCIES_OF_TORCH, *ENVIRONMENTS[name]))
    stamp, interpreter = root / "installed", root / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        _run(sys.executable, "-m", "venv", "--clear", str(root))
        install = (str(interpreter), "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
        _run(*install, TORCH, *DEPENDENCIES_OF_TORCH)
        _run(*install, "--no-deps", *ENVIRONMENTS[name])
        stamp.write_text(wanted)
    return interpreter


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired:
        raise EnvironmentSetupError(f"not done after 900 s: {' '.join(command)}") from None
    if done.returncode != 0:
        raise EnvironmentSetupError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def main() -> int:
    failed = 0
    for name in ENVIRONMENTS:
        try:
            print(python(name))
        except EnvironmentSetupError as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
