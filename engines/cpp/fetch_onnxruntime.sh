#!/usr/bin/env bash
# fetch_onnxruntime.sh FOLDER [LIBRARY]: what compiling against ONNX Runtime needs, as FOLDER/include and FOLDER/lib.
#
# Headers: of Debian's libonnxruntime-dev, downloaded without touching the system's packages. LIBRARY: a
# libonnxruntime.so; that of the onnxruntime package of $PYTHON (python3) if not told. The library may be newer
# than the headers: a program asks it for the version of the interface that it was compiled against.
# With a release from ONNX Runtime's own site none of this is needed: cmake -D ONNXRUNTIME_ROOT=FOLDER.
set -euo pipefail

usage="usage: $0 FOLDER [LIBRARY]"
folder=$(realpath -m "${1:?$usage}")
suite=${NOVA_ONNXRUNTIME_SUITE:-trixie}
mirror=${NOVA_DEBIAN_MIRROR:-}

find_library() {
    "${PYTHON:-python3}" - <<'PY'
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("onnxruntime")
found = sorted(pathlib.Path(spec.origin).parent.glob("capi/libonnxruntime.so.*")) if spec else []
if not found:
    sys.exit("fetch_onnxruntime: this Python has no onnxruntime package; give the path of libonnxruntime.so")
print(found[-1])
PY
}

# The mirror that this machine's own package manager uses, else Debian's.
find_mirror() {
    apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep -E '/debian/?$' | head -n 1 || true
}

fetch_headers() {
    local work=$folder/.apt
    mkdir -p "$work"/{state/lists/partial,cache/archives/partial,unpacked}
    : "${mirror:=$(find_mirror)}"
    echo "deb ${mirror:-http://deb.debian.org/debian} $suite main" >"$work/sources.list"
    : >"$work/status"
    local options=(
        -o "Dir::Etc::sourcelist=$work/sources.list" -o "Dir::Etc::sourceparts=-" -o "Dir::State=$work/state"
        -o "Dir::State::status=$work/status" -o "Dir::Cache=$work/cache" -o "APT::Sandbox::User=" -qq
    )
    apt-get "${options[@]}" update
    (cd "$work" && apt-get "${options[@]}" download libonnxruntime-dev)
    dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/unpacked"
    rm -rf "$folder/include"
    mv "$work/unpacked/usr/include/onnxruntime" "$folder/include"
    rm -rf "$work"
}

library=${2:-$(find_library)}
mkdir -p "$folder/lib"
test -f "$folder/include/onnxruntime_cxx_api.h" || fetch_headers
ln -sfn "$library" "$folder/lib/libonnxruntime.so.1"
ln -sfn libonnxruntime.so.1 "$folder/lib/libonnxruntime.so"
echo "$folder"
