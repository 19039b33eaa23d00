#!/usr/bin/env bash
# Builds, tests, sanitizes and measures the CUDA half on a machine with a GPU:
#
#     bash benchmarks/device_check.sh [--out DIRECTORY] [--suites "first fills ..."] [--limit SECONDS] [STEP...]
#
# STEP is any of build, test, slow, sanitize, frameworks, bench, profile; without one: build test sanitize bench. All steps
# run even if one fails; the exit status is 1 then. Uses the python3 that is first on PATH, which needs torch with CUDA, pytest,
# hypothesis, pybind11, cmake and ninja; bench also pytest-benchmark, and rich for its tables; sanitize and profile
# NVIDIA's compute-sanitizer and ncu. frameworks needs two GPUs, Lightning, Transformers and Accelerate, and has DeepSpeed
# if it is there; it writes frameworks.json after each check, and ends after six minutes at most. bench writes SUITE.json for
# each suite, and gives each so many seconds (90): what it had no time for is listed there.
# Environment: FASTINIT_CUDA_ARCHS, the architecture to build for (default: that of GPU 0); FASTINIT_COMMIT, the commit
# that the results name where there is no history of git.
set -uo pipefail
cd "$(dirname "$0")/.."
# The build is in place: the package is this checkout's, wherever a script lies.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

out=bench-out
suites="first contexts creation fills layouts growth frameworks sharded loading readers statistics"
limit=90
steps=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --suites) suites=$2; shift 2 ;;
        --limit) limit=$2; shift 2 ;;
        build | test | slow | sanitize | frameworks | bench | profile) steps+=("$1"); shift ;;
        *) echo "device_check.sh: unknown step '$1': choose from build test slow sanitize frameworks bench profile" >&2; exit 2 ;;
    esac
done
[ ${#steps[@]} -gt 0 ] || steps=(build test sanitize bench)
mkdir -p "$out"
fills=tests/cuda/test_native_cuda.py

build() {
    local archs=${FASTINIT_CUDA_ARCHS:-}
    [ -n "$archs" ] || archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d .)
    FASTINIT_CUDA=1 FASTINIT_CUDA_ARCHS=$archs python3 setup.py build_ext --inplace &&
        python3 -c 'from fastinit import native; print(native.build_info())'
}

test() { python3 -m pytest -q -p no:cacheprovider tests/cuda; }

slow() { python3 -m pytest -q -p no:cacheprovider -m slow tests/cuda; }

# torch's allocator hands out parts of large blocks, inside which memcheck sees nothing: hence one allocation a tensor.
sanitizer() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
        python3 -m pytest -q -p no:cacheprovider "${@:2}"
}

sanitize() {
    local failed=0
    sanitizer memcheck $fills -k 'alignment or boxes or many_fills' || failed=1
    sanitizer memcheck tests/cuda/test_{models,deferred,faults}_cuda.py || failed=1
    sanitizer racecheck $fills -k 'whole_tensors and float16 and 4095' || failed=1
    sanitizer initcheck $fills -k 'whole_tensors and float16 and 4095' || failed=1
    return $failed
}

# NVLink multicast is not available in every virtual machine.
frameworks() {
    NCCL_NVLS_ENABLE=0 timeout --signal=INT --kill-after=20 360 python3 -m pytest -q -p no:cacheprovider \
        --results "$out/frameworks.json" tests/cuda/test_{sharded,frameworks}_cuda.py
}

bench() {
    local status=0 suite
    for suite in $suites; do
        # An interrupt, not the end of the process: what was measured by then is written.
        timeout --signal=INT --kill-after=20 $((limit + 60)) python3 -m pytest "benchmarks/bench_$suite.py" -q -rfE \
            -p no:cacheprovider --time-limit "$limit" --benchmark-json "$out/$suite.json" --benchmark-quiet || status=1
    done
    python3 benchmarks/report.py "$out"/*.json
    return $status
}

# Where the cycles of the plain fills go: issue slots, the pipes of Philox and of the table, occupancy.
profile() {
    local metrics=gpu__time_duration.sum,sm__warps_active.avg.pct_of_peak_sustained_active
    metrics+=,sm__inst_issued.avg.pct_of_peak_sustained_active
    metrics+=,sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active
    metrics+=,sm__pipe_fmaheavy_cycles_active.avg.pct_of_peak_sustained_active
    metrics+=,sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active
    metrics+=,sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active
    metrics+=,l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum,smsp__inst_executed_op_shared_ld.sum
    metrics+=,l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed
    metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
    ncu --clock-control none --kernel-name regex:fill_ --metrics "$metrics" python3 -c '
import torch, fastinit
tensor = torch.empty(2**28, dtype=torch.bfloat16, device="cuda")
for values in (
    fastinit.Constant(0.5), fastinit.Uniform(-1.0, 1.0), fastinit.Normal(0.0, 0.02),
    fastinit.TruncatedNormal(0.0, 0.02, -0.04, 0.04),
):
    fastinit.fill_(tensor, values, seed=1)
torch.cuda.synchronize()'
}

status=0
for step in "${steps[@]}"; do
    echo "== $step"
    begin=$SECONDS
    if "$step"; then result=passed; else result=FAILED status=1; fi
    echo "== $step $result, $((SECONDS - begin)) s"
done
exit $status
