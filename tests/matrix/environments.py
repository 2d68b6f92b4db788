"""One virtual environment per Celery version, in `.venvs/`, with every pool's library and this package."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("5.4", "5.5", "5.6", "5.7")


def python_of(version: str) -> Path:
    """The interpreter of the environment for Celery `version`; made, or made again, when its recipe is another."""
    folder = ROOT / ".venvs" / f"celery-{version}"
    python = folder / "bin" / "python"
    # celery[redis]==5.4.0 names a kombu without that extra's client: our own extra asks kombu for it
    requirements = ["--editable", f"{ROOT}[redis]", f"celery=={version}.*", "gevent>=24", "eventlet>=0.36"]
    requirements += ["pytest>=8.3", "pytest-asyncio>=1.0", "pytest-timeout>=2.3"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [sys.version, *requirements, *project["dependencies"], *project["optional-dependencies"]["redis"]]
    recipe = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    done = folder / "recipe"
    if not done.exists() or done.read_text() != recipe:
        print(f"Installing Celery {version} into {folder} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        command = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *requirements]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        done.write_text(recipe)
    return python


if __name__ == "__main__":
    for wanted in sys.argv[1:] or VERSIONS:
        print(python_of(wanted))
