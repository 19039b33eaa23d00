"""The Pythons of this machine that fastinit supports: those on PATH, and those that pyenv and uv have installed.

python tools/pythons.py
"""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def supported():
    """The minor versions that pyproject.toml names, as "3.10"."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


def installed():
    """Executables by full version, as {"3.10.13": Path}, ascending; the first on PATH of those of one version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", "~/.local/share/uv/python")).expanduser()
    folders = [*map(Path, os.get_exec_path()), *sorted(pyenv.glob("versions/*/bin")), *sorted(uv.glob("*/bin"))]
    found = {}
    for folder in folders:
        for executable in sorted(folder.glob("python3*")):
            if re.fullmatch(r"python3(\.\d+)?", executable.name):
                found.setdefault(version_of(executable), executable)
    usable = [version for version in found if version and minor(version) in supported()]
    return {version: found[version] for version in sorted(usable, key=lambda text: [*map(int, text.split("."))])}


def version_of(executable):
    """As "3.10.13"; None for what does not run, as pyenv's shims of versions that are not chosen, or has no venv."""
    program = "import sys, ensurepip, venv; print('%d.%d.%d' % sys.version_info[:3])"
    try:
        done = subprocess.run([executable, "-I", "-c", program], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def minor(version):
    return version.rpartition(".")[0]


def missing():
    """Supported minor versions that this machine does not have."""
    return [each for each in supported() if each not in map(minor, installed())]


if __name__ == "__main__":
    for version, executable in installed().items():
        print(version, executable)
    print("missing:", ", ".join(missing()) or "none")
