#!/usr/bin/env bash
# Builds the C++ kernels with sanitizers and runs their tests: tests/asan.sh BIN_OF_ENVIRONMENT FOLDER
# Fails where a test fails, on any report of AddressSanitizer or UndefinedBehaviorSanitizer, and on a leak with one of our
# frames in its stack (Python and PyTorch leak on purpose at exit).
set -euo pipefail
bin=$(realpath "$1")
folder=$2
rm -rf "$folder"
mkdir -p "$folder/reports"
folder=$(realpath "$folder")
FFVT_SANITIZE=1 "$bin/python" setup.py --quiet build --build-lib "$folder" --build-temp "$folder/temp"
cp -r tests benchmarks pyproject.toml README.md "$folder"
cd "$folder"
tests="tests/kernels/test_maws_attention.py tests/kernels/test_attention_stats_cpp.py tests/kernels/test_gather_tokens.py tests/kernels/test_backend_cpp.py tests/kernels/test_registration.py tests/data/test_transforms.py"
for capability in "" avx2; do
  # the exit status must not tell of others' leaks; what our code does wrong is read from the reports
  FFVT_CPU_CAPABILITY=$capability PYTHONPATH="$folder" PYTHONMALLOC=malloc OMP_NUM_THREADS=2 \
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS="detect_leaks=1:exitcode=0:log_path=$folder/reports/asan" UBSAN_OPTIONS="print_stacktrace=1" \
    "$bin/python" -m pytest -q -p no:cacheprovider -k "cpp and not slow" $tests | tee "$folder/reports/pytest"
  grep -q "[0-9] passed" "$folder/reports/pytest"
  if grep -lE "ERROR: AddressSanitizer|runtime error" "$folder"/reports/*; then
    echo "asan.sh: the sanitizers' reports above name errors" >&2
    exit 1
  fi
  if grep -lE "ffvt/_(cpu|C)" "$folder"/reports/asan* 2>/dev/null; then
    echo "asan.sh: the reports above have leaks with our code in their stack" >&2
    exit 1
  fi
done
echo "asan.sh: no report names our code"
