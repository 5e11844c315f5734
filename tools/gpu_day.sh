#!/usr/bin/env bash
# A quarter of an hour on a machine with an NVIDIA GPU, of which nothing is lost: tests first, then times.
#
#     tools/gpu_day.sh OUT [--seconds 840] [--wheel FILE]
#
# OUT       folder for what is found: summary.txt, failures.txt, and of each step a log, JSON rows and plots.
# --seconds the whole ends within this time. Each step has a share of it, and what one leaves goes to those after it.
# --wheel   a wheel with CUDA kernels (make wheel-cuda); without one the package is built in place for this GPU.
#
# The machine needs Python (PYTHON=...) with torch for CUDA, triton, pytest, numpy, typer and rich; the rest is used
# where it is installed (pytest-xdist, transformers, peft, matplotlib, torchao, bitsandbytes, gemlite). Nothing is
# downloaded or installed. A step that cannot run says so in the summary, and the next one goes on: without a GPU all of
# them do, which is the rehearsal.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT="" SECONDS_ALL=840 WHEEL=""
while [ $# -gt 0 ]; do
  case "$1" in
    --seconds) SECONDS_ALL=$2; shift 2 ;;
    --wheel) WHEEL=$(realpath "$2"); shift 2 ;;
    -*) echo "unknown option $1: see the head of $0" >&2; exit 2 ;;
    *) OUT=$1; shift ;;
  esac
done
[ -n "$OUT" ] || { echo "usage: $0 OUT [--seconds N] [--wheel FILE]" >&2; exit 2; }
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
: >"$OUT/summary.txt"
: >"$OUT/failures.txt"
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 XDG_CACHE_HOME="$WORK/cache" TRITON_CACHE_DIR="$WORK/triton"

say() { echo "[$SECONDS s] $*" | tee -a "$OUT/summary.txt"; }

# within COMMAND...: for at most what is left of the time, kept for the end aside.
left() { local seconds=$((SECONDS_ALL - SECONDS - 15)); echo $((seconds > 1 ? seconds : 1)); }
within() { timeout -k 2 "$(left)" "$@"; }

# step NAME PERCENT COMMAND...: runs it for at most this share of the whole time, or what is left; its output goes to
# OUT/NAME.log, and its end to OUT/failures.txt if it did not end well. It is interrupted as by Ctrl-C, at which pytest
# tells what has failed so far.
FAILED_STEPS=0
step() {
  local name=$1 share=$((SECONDS_ALL * $2 / 100)) left
  left=$(left)
  shift 2
  [ "$share" -lt "$left" ] || share=$left
  if [ "$share" -lt 5 ]; then
    say "$name: left out, no time"
    FAILED_STEPS=$((FAILED_STEPS + 1))
    return 1
  fi
  local start=$SECONDS
  timeout -s INT -k 10 "$share" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  [ $status = 0 ] && { say "$name: ok, $((SECONDS - start)) s"; return; }
  FAILED_STEPS=$((FAILED_STEPS + 1))
  case $status in
    124 | 137) say "$name: stopped after $((SECONDS - start)) s" ;;
    *) say "$name: exit status $status after $((SECONDS - start)) s: $(grep -v '^ *$' "$OUT/$name.log" | tail -1 | cut -c1-160)" ;;
  esac
  { echo "== $name"; tail -15 "$OUT/$name.log"; } >>"$OUT/failures.txt"
  return $status
}

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# ---- the package: a wheel is unpacked beside the tests; its Python module is compiled where the version differs.
ROOT=$PWD
capability=$(within "$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())" 2>/dev/null || echo "")
[ -n "$capability" ] || say "torch finds no GPU here: what needs one will say so"
if [ -n "$WHEEL" ]; then
  ROOT=$WORK/package
  mkdir -p "$ROOT"
  "$PYTHON" -m zipfile -e "$WHEEL" "$ROOT" || exit 2
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  if [ ! -e "$ROOT/qkernels/_native$suffix" ]; then
    step native 8 "${CXX:-c++}" -std=c++20 -O2 -ffp-contract=off -fvisibility=hidden -fPIC -shared \
      -I"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
      -I"$("$PYTHON" -c 'import pybind11; print(pybind11.get_include())')" -Icsrc csrc/python/native.cpp \
      -L"$ROOT/qkernels" -lqkernels_core -Wl,-rpath,'$ORIGIN' -o "$ROOT/qkernels/_native$suffix"
  fi
  cp -r tests tools pyproject.toml "$ROOT" && cd "$ROOT"  # or the checkout's package would be imported
elif [ -z "$capability" ]; then
  say "build: left out without a GPU, the package is taken as it is"
else
  export MAX_JOBS=${MAX_JOBS:-$(nproc)}
  QKERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability step build 30 "$PYTHON" setup.py build_ext --inplace
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

# ---- what this machine is
{ nvidia-smi || echo "no nvidia-smi"; within "$PYTHON" -m qkernels info; } >"$OUT/machine.txt" 2>&1
grep -E "GPU|CUDA" "$OUT/machine.txt" | tee -a "$OUT/summary.txt"

# ---- tests: each backend computes every operator, with schemes that cover all pairs of what a scheme consists of
workers=()
has xdist && workers=(-n "$(($(nproc) > 14 ? 14 : $(nproc)))" --dist worksteal)
tests() {
  local name=$1 share=$2 selected=$3
  touch "$OUT/$name.log"
  step "$name" "$share" "$PYTHON" -m pytest -q -ra -m "$selected" ${workers[@]+"${workers[@]}"} --maxfail=200 \
    -p no:cacheprovider tests/gpu/test_device.py
  grep -hE "^(FAILED|ERROR)|crashed while" "$OUT/$name.log" >>"$OUT/failures.txt"
  tail -1 "$OUT/$name.log" | tee -a "$OUT/summary.txt"
}
tests tests 24 "gpu and not slow"

# ---- tiles: the Triton kernels alone are tuned, so the others are hidden; 25 seconds are for the start and the last one
alone=("$PYTHON" "$ROOT/tools/triton_alone.py")
shapes=(--layers "4096x4096,4096x11008")
budget=$((SECONDS_ALL * 16 / 100 - 25))
step tune 16 "${alone[@]}" tune "${shapes[@]}" --rows 1,16,256,2048 --schemes w8a8,w4a8-g128,w4a16-g128 \
  --seconds $((budget > 5 ? budget : 5)) --output "$OUT/tuned.json"

# ---- times: each step writes its rows when it ends, so there are many small ones, the most wanted first
linear=(bench linear --device cuda "${shapes[@]}" --dtype bfloat16 --seconds 0.1)
schemes=(--schemes w8a8,w4a8-g128,w4a16-g128,w4a8-g32-asym)
train=(bench train --device cuda --schemes w8a8,w4a8-g128 --rounds 10)
qkernels=("$PYTHON" -m qkernels)
timed() { step "$1" "$2" "${@:3}" --output "$OUT/$1"; }
timed linear-decode 8 "${qkernels[@]}" "${linear[@]}" "${schemes[@]}" --rows 1,16 --peers
timed train-mlp 6 "${qkernels[@]}" "${train[@]}" --cases mlp-full,mlp-frozen --peers
timed linear-prefill 8 "${qkernels[@]}" "${linear[@]}" "${schemes[@]}" --rows 64,256,2048 --peers
timed train-gpt2 7 "${qkernels[@]}" "${train[@]}" --cases gpt2-full --peers
timed train-lora 7 "${qkernels[@]}" "${train[@]}" --cases gemma-lora --peers
timed linear-triton 7 "${alone[@]}" "${linear[@]}" "${schemes[@]}" --rows 1,16,256,2048
timed linear-compiled 7 "${qkernels[@]}" "${linear[@]}" --rows 1,16,256,2048 --compiled --only "torch*"
timed train-compiled 8 "${qkernels[@]}" "${train[@]}" --cases mlp-full,gpt2-full --compiled --only "torch bfloat16*"

# ---- what is left of the time: the other schemes
tests tests-slow 100 "gpu and slow"
say "done: $(grep -cE '^(FAILED|ERROR)' "$OUT/failures.txt") failed tests, $FAILED_STEPS steps that did not end well; see $OUT"
