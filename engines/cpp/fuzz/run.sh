#!/usr/bin/env bash
# run.sh BUILD RUNS: RUNS inputs for each fuzz target that CMake built in BUILD; fails at the first that crashes it.
set -euo pipefail
build=$(realpath "${1:?usage: $0 BUILD RUNS}")
runs=${2:?usage: $0 BUILD RUNS}
cd "$(dirname "${BASH_SOURCE[0]}")"
for name in manifest tokenizer; do
    mkdir -p "$build/found/$name"
    "$build/fuzz_$name" "-runs=$runs" -seed=1 -max_len=16384 -timeout=10 -print_final_stats=1 \
        "-artifact_prefix=$build/" "-dict=$name.dict" "$build/found/$name" "corpus/$name" 2>&1 |
        tee "$build/$name.log" | grep -E "ERROR|SUMMARY|Done|stat::number_of_executed|runtime error" || true
    test "${PIPESTATUS[0]}" -eq 0
done
