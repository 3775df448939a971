#!/usr/bin/env bash
# Everything that must have run on a GPU after a kernel changed: build, tests, compute-sanitizer,
# benchmarks. Results and logs go to the folder given; copy the JSON to benchmarks/results/.
#
#   benchmarks/gpu.sh OUT [tests] [sanitizer] [benchmarks] [teacher] [two]
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
steps="${*:-tests sanitizer benchmarks}"
status=0

build() {
  MEMDEC_CUDA=on MEMDEC_CUDA_ARCHS="${MEMDEC_CUDA_ARCHS:-90}" python3 -m pip install \
    --no-build-isolation --no-deps --no-index -q -e . >"$out/build.log" 2>&1 || {
    tail -40 "$out/build.log"
    exit 1
  }
  MEMDEC_REQUIRE_NATIVE=1 python3 -m memdec info
}

tests() {
  MEMDEC_REQUIRE_NATIVE=1 timeout 420 python3 -m pytest tests/ops -q --maxfail=30 -p no:cacheprovider -k cuda \
    2>&1 | tee "$out/tests.log" | tail -60
}

sanitizer() {
  for tool in memcheck racecheck; do
    timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 120 \
      python3 benchmarks/sanitize.py >"$out/$tool.log" 2>&1
    echo "$tool: exit status $?, $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log")"
  done
}

benchmarks() {
  timeout 400 python3 -m pytest benchmarks --benchmark-only -q -p no:cacheprovider --device cuda \
    --benchmark-json="$out/benchmarks.json" >"$out/benchmarks.log" 2>&1 || tail -30 "$out/benchmarks.log"
  python3 benchmarks/table.py "$out/benchmarks.json"
}

# Search, overlap and FAISS on the GPU, and the rates of the teacher's stages.
teacher() {
  timeout 300 python3 -m pytest tests/data/test_index.py tests/data/test_in_flight.py \
    tests/data/test_faiss_gpu.py -q -p no:cacheprovider 2>&1 | tee "$out/teacher-tests.log" | tail -30
  timeout 300 python3 benchmarks/teacher.py --out "$out/teacher.json" >"$out/teacher.log" 2>&1 ||
    tail -30 "$out/teacher.log"
  python3 benchmarks/table.py "$out/teacher.json"
}

# With two GPUs: training through NCCL, search over both, and the teacher's stages in two processes.
two() {
  timeout 240 python3 -m pytest tests/training/test_training_nccl.py tests/data/test_processes.py \
    tests/data/test_index.py tests/ops/test_cuda.py -k "two_gpus or nccl or runs_where" -n 3 --dist loadfile -q -rs \
    -p no:cacheprovider 2>&1 | tee "$out/two-tests.log" | tail -30
  timeout 240 python3 benchmarks/processes.py --out "$out/processes.json" >"$out/processes.log" 2>&1 ||
    tail -30 "$out/processes.log"
  python3 benchmarks/table.py "$out/processes.json"
}

build
for step in $steps; do
  echo "== $step"
  "$step" || status=1
done
exit $status
