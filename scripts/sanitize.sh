#!/bin/sh
# Build the C++ core with AddressSanitizer and UBSan beside the installed one, and run its tests against it.
#
#   scripts/sanitize.sh [build directory] [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
build=${1:-build/sanitize}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- tests/retrieval/test_native.py tests/retrieval/test_native_runs.py tests/retrieval/test_balance.py
python=${PYTHON:-python}

"$python" -m cmake --version >/dev/null 2>&1 && cmake="$python -m cmake" || cmake=cmake
$cmake -S . -B "$build" -DRETRIEVAL_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')"
$cmake --build "$build" --parallel

# Python itself leaks by design; torch brings its own allocator. What matters is the core's own reads and writes.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    "$python" - "$build" "$@" <<'PYTHON'
import importlib.util
import sys
from pathlib import Path

import pytest

import retrieval

library = next(Path(sys.argv[1]).glob("_core*.so"))
spec = importlib.util.spec_from_file_location("retrieval._core", library)
sys.modules["retrieval._core"] = retrieval._core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(retrieval._core)
# fd-level capture would swallow the report that ends the process
sys.exit(pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", *sys.argv[2:]]))
PYTHON
