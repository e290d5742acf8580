#!/usr/bin/env bash
# A Triton server and a Python environment for it, in .triton/ of the repository. Done once for each version of this file.
#
# The server is that of a PyPI wheel, with the python backend and no other. The environment is the backend's and the
# tests' own: it needs numpy 1 (with numpy 2 this backend gives wrong numbers), and tritonclient wants an older
# protobuf than onnx. Where chromium and its driver are on the machine, the web page is tested too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
STAMP=.triton/$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-16).stamp
[ -e "$STAMP" ] && exit

rm -rf .triton && mkdir .triton
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$PYTHON" -m venv .triton/venv
pip=".triton/venv/bin/python -m pip --disable-pip-version-check --quiet"
$pip install --no-deps --target .triton/server nvidia-pytriton==0.7.0 & # tritonserver 2.51.0
$pip install numpy==1.26.4 onnxruntime==1.31.1 tokenizers==0.23.3 pillow==13.0.0 av==18.1.0 click==8.5.1 tqdm==4.70.1 \
    'tritonclient[grpc]==2.73.0' pytest==9.0.2 hypothesis==6.170.17 selenium==4.51.0
wait $!
triton=.triton/server/pytriton/tritonserver
cp "$triton/python_backend_stubs/$version/triton_python_backend_stub" "$triton/backends/python/"
chmod +x "$triton/bin/tritonserver" "$triton/backends/python/triton_python_backend_stub"
touch "$STAMP"
