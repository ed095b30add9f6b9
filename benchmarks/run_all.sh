#!/usr/bin/env bash
# Everything that wants a GPU in one command: the kernels' tests, the pipeline's benchmark, every op's, launch configurations, the loss curve.
#
#     benchmarks/run_all.sh OUT [SECONDS [STEP...]]        PYTHON=python3.12 benchmarks/run_all.sh ... for another Python
#
# The most important comes first; each step has a time limit, and all end within SECONDS (default 520). A step's output goes to OUT/STEP.log
# as it comes, its figures to OUT/STEP.json after each contender, and one line on it to OUT/summary.txt: nothing is lost if the run is cut. A step that
# fails, or is cut at its limit, stops no other. STEP...: these alone. Exit status 1 if one failed, was cut, or was left out for want of time.
# Where a machine is lent for minutes, two runs see everything: environment tests train score, then the others.
# It runs from a checkout that is not installed, and needs torch, triton, transformers, pyarrow, pydantic, tqdm and pytest. OUT, or its JSON files, go
# into benchmarks/results/NAME/ for render.py. Without a GPU the tests skip themselves and the benchmarks run their toys.
#
# Wheels to bring along for the contenders that PyTorch does not have (of 2026-11-24, in MiB; P: pure Python). Those that are not there are skipped, with
# the reason. For a machine without a network: pip download --no-deps here, pip install --no-deps --target DIR *.whl there, and PYTHONPATH=DIR.
#     liger-kernel 0.8.5          0.87  P   norms, rotary, SwiGLU, both losses, train and score
#     cut-cross-entropy 25.1.1    0.02  P   log_prob, cross_entropy
#     pytest-xdist 3.8, execnet   0.08  P   the tests side by side
# Together 1. With NVIDIA's CuTe DSL, which is too large to bring along in 64 (nvidia-cutlass-dsl 4.8.1: libs-cu12 87.45, libs-base 2.91, libs-core 1.56 P,
# cuda-bindings 8.00), also
#     quack-kernels 0.6.5         0.70  P   rms_norm, cross_entropy; needs apache-tvm-ffi 3.19, torch-c-dlpack-ext 0.86, einops 0.06 P
#     liger-cutedsl                         in liger-kernel
# flash-attn (FlashAttention-2) and its folder hopper (FlashAttention-3) have no wheels on PyPI: they are built where a CUDA compiler is. In PyTorch itself
# are cuDNN's attention and FlashAttention-2 behind SDPA, FlexAttention, and from 2.13 on linear_cross_entropy.
set -u
if [ $# -lt 1 ]; then sed -n '2,4p' "$0" >&2; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
seconds=${2:-520} python=${PYTHON:-python3} only=" ${*:3} " failed=0
: >"$out/summary.txt"

# What setup.py's package_dir does, as links, so that processes started by tests find the package too.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/miniplm"
ln -s "$root"/miniplm/* "$site/miniplm/"
ln -s "$root/kernels" "$site/miniplm/kernels"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 FAILURES_AT_ONCE=1
cd "$site" || exit 2
side_by_side=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)

step() {  # step NAME LIMIT COMMAND...
    local name=$1 limit=$2 left=$((seconds - SECONDS)) began=$SECONDS status
    shift 2
    if [ "$only" != "  " ] && [[ "$only" != *" $name "* ]]; then return; fi
    if [ "$left" -lt 5 ]; then
        failed=1
        printf '%-14s left out, no time\n' "$name" | tee -a "$out/summary.txt"
        return
    fi
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1 </dev/null
    case $? in
        0) status=ok ;;
        124 | 137) status="cut at its limit" failed=1 ;;
        *) status=failed failed=1 ;;
    esac
    printf '%-14s %s, %d s: %s\n' "$name" "$status" $((SECONDS - began)) "$(tail -n 1 "$out/$name.log" | cut -c -150)" | tee -a "$out/summary.txt"
}

bench() {  # bench NAME LIMIT FILE [OPTION...]: its report is NAME.json
    step "$1" "$2" "$python" "$root/benchmarks/$3" --json "$out/$1.json" "${@:4}"
}

tests() {  # tests NAME LIMIT SELECTION FILES...; side by side where pytest-xdist is there, since most of their time goes into compiling kernels
    step "$1" "$2" "$python" -m pytest -q -c "$root/pyproject.toml" -p no:cacheprovider $side_by_side -m "$3" "${@:4}"
}

step environment 40 "$python" -c "import sys; sys.path.insert(0, '$root/benchmarks'); import harness
harness.write_json('$out/environment.json', {'environment': harness.environment(), 'ceilings': harness.ceilings()})"
tests tests 90 gpu "$root/tests/stages/test_triton_stages.py" "$root/tests/kernels"
bench train 200 pipeline.py train --quick --profile "$out/train-trace.json.gz"
bench score 130 pipeline.py score --quick
for file in log_prob cross_entropy attention distillation $(cd "$root/benchmarks" && grep -l '^def cases(' ./*.py | sed 's|^\./||; s|\.py$||'); do
    [[ " ${ops:=} " == *" $file "* ]] && continue
    ops+=" $file"
    bench "$file" 90 "$file.py" --quick
done
bench tune 120 tune.py
bench host-cost 60 host_cost.py
bench loss-curve 90 pipeline.py train --loss-curve 200
tests more-tests 120 "not gpu" "$root/tests/kernels" -k "triton or quantize_rows"

printf '\n'
timeout 20 "$python" "$root/benchmarks/render.py" --results "$out" --readme -
printf '\n'
cat "$out/summary.txt"
exit "$failed"
