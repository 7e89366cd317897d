"""Writes requirements.lock, and what the tests and the extra `telemetry` install besides: every version.

    python -m infra.lock python3.11 python3.12

pip resolves `pyproject.toml` for the first (the oldest Python) and holds the others to the versions it found, because
the bytes of a sample depend on them; a package that only some need carries an environment marker. torch is resolved as
its CPU build and named without a build, so that the same lock serves machines with and without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

Versions = dict[str, str]
"""Package name -> exact version."""

TORCH_REQUIRES = (
    "filelock",
    "fsspec>=0.8.5",
    "jinja2",
    "networkx>=2.5.1",
    "setuptools>=77.0.3",
    "sympy>=1.13.3",
    "typing-extensions>=4.10.0",
)
"""What the CPU build of torch 2.13 requires, on every Python."""

FROM_SOURCE = ("deepspeed",)
"""Packages that have no wheels. With DS_BUILD_OPS=0 DeepSpeed compiles nothing."""


def main(interpreters: list[str]) -> None:
    """Resolve for `interpreters` (names or paths, oldest Python first) and write both files here."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    core_roots = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    optional = project["project"]["optional-dependencies"]
    extras = {"test": [*optional["test"], *optional["train"]], "telemetry": optional["telemetry"]}
    core: dict[str, Versions] = {}
    besides: dict[str, dict[str, Versions]] = {name: {} for name in extras}
    pinned: Versions = {}
    for interpreter in interpreters:
        python = _run([interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
        core[python] = resolve(interpreter, core_roots, pinned)
        known = pinned | core[python]
        for extra, roots in extras.items():
            found = resolve(interpreter, [*core_roots, *roots], known)
            besides[extra][python] = {name: version for name, version in found.items() if name not in core[python]}
            known = known | found
        pinned = pinned or known
    Path("requirements.lock").write_text(render(core, "What ditmill runs on"), encoding="utf-8")
    for extra, title in (
        ("test", "What its tests need besides"),
        ("telemetry", "What the extra `telemetry` needs besides"),
    ):
        Path(f"requirements-{extra}.lock").write_text(render(besides[extra], title), encoding="utf-8")


def resolve(interpreter: str, requirements: list[str], pinned: Versions) -> Versions:
    """What pip would install for `requirements` into an empty environment of `interpreter`, holding to `pinned`."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()), encoding="utf-8")
        _stand_in_for_torch(Path(folder), requirements)
        command = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--only-binary=:all:", "--find-links", folder]
        command += [option for name in FROM_SOURCE for option in ("--no-binary", name)]
        _run([*command, "--constraint", str(constraints), "--report", str(report), *requirements])
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    versions = {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"].partition("+")[0] for item in found}
    return dict(sorted(versions.items()))


def render(found: dict[str, Versions], title: str) -> str:
    """The lines of a lock file. A package that not every Python needs carries a marker."""
    lines = [f"# {title}; Python {' and '.join(found)}. Written by `make lock`."]
    for name, version in sorted({item for versions in found.values() for item in versions.items()}):
        pythons = [python for python, versions in found.items() if versions.get(name) == version]
        marker = " or ".join(f'python_version == "{python}"' for python in pythons) if len(pythons) < len(found) else ""
        lines.append(f"{name}=={version}" + (f" ; {marker}" if marker else ""))
    return "\n".join(lines) + "\n"


def _stand_in_for_torch(folder: Path, requirements: list[str]) -> None:
    """A wheel with torch's name and requirements and nothing else, so that resolving moves no half gigabyte."""
    version = next(item.split("==")[1] for item in requirements if item.startswith("torch==")) + "+cpu"
    info = f"torch-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in TORCH_REQUIRES]
    tags = ["Wheel-Version: 1.0", "Generator: ditmill", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{info}/WHEEL", "\n".join(tags) + "\n")
        wheel.writestr(f"{info}/RECORD", "")


def _run(command: list[str]) -> str:
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


if __name__ == "__main__":
    main(sys.argv[1:] or ["python3.11", "python3.12"])
