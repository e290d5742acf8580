#!/usr/bin/env bash
# run.sh BUILD RUNS: RUNS inputs for each fuzz target that CMake built in BUILD; fails at the first that crashes it.
set -euo pipefail
build=$(realpath "${1:?usage: $0 BUILD RUNS}")
runs=${2:?usage: $0 BUILD RUNS}
cd "$(dirname "${BASH_SOURCE[0]}")"
for name in manifest tokenizer; do
    mkdir -p "$build/found/$name"
    if ! "$build/fuzz_$name" "-runs=$runs" -seed=1 -max_len=16384 -timeout=10 "-artifact_prefix=$build/" \
        "-dict=$name.dict" "$build/found/$name" "corpus/$name" >"$build/$name.log" 2>&1; then
        tail -n 50 "$build/$name.log"
        exit 1
    fi
    echo "$name: $(grep -E '^Done' "$build/$name.log")"
done
