#!/usr/bin/env bash
# fetch_json.sh FOLDER: the headers of nlohmann-json as FOLDER/include/nlohmann, where no package brings them.
#
# Of Debian's nlohmann-json3-dev, downloaded and unpacked without touching the system's packages; needs apt's
# package lists (`apt-get update`). Where the package is installed CMake finds it by itself and this is not needed.
set -euo pipefail

folder=$(realpath -m "${1:?usage: $0 FOLDER}")
if ! test -f "$folder/include/nlohmann/json.hpp"; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && apt-get -qq -o APT::Sandbox::User= download nlohmann-json3-dev)
    dpkg-deb -x "$work"/nlohmann-json3-dev_*.deb "$work/unpacked"
    mkdir -p "$folder/include"
    mv "$work/unpacked/usr/include/nlohmann" "$folder/include/nlohmann"
fi
echo "$folder"
