#!/usr/bin/env bash
# A quarter of an hour on a machine with an NVIDIA GPU, of which nothing is lost: tests first, then times.
#
#     tools/gpu_day.sh OUT [--seconds 840] [--wheel FILE]
#
# OUT       folder for what is found: summary.txt, failures.txt, a log and the JSON rows of each step.
# --seconds the whole must end within this time; each step gets a share and is stopped there.
# --wheel   a wheel with CUDA kernels (make wheel-cuda); without one the package is built in place for this GPU.
#
# The machine needs Python with torch for CUDA, triton, pytest, numpy, typer and rich; the rest is used where it is
# installed (pytest-xdist, transformers, peft, torchao, bitsandbytes, gemlite). Nothing is downloaded or installed. A
# step that cannot run says so in the summary, and the next one goes on. Without a GPU everything but the start says so.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT="" SECONDS_ALL=840 WHEEL=""
while [ $# -gt 0 ]; do
  case "$1" in
    --seconds) SECONDS_ALL=$2; shift 2 ;;
    --wheel) WHEEL=$2; shift 2 ;;
    -*) echo "unknown option $1: see the head of $0" >&2; exit 2 ;;
    *) OUT=$1; shift ;;
  esac
done
[ -n "$OUT" ] || { echo "usage: $0 OUT [--seconds N] [--wheel FILE]" >&2; exit 2; }
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
: >"$OUT/summary.txt"
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 XDG_CACHE_HOME="$WORK/cache"

say() { echo "[$SECONDS s] $*" | tee -a "$OUT/summary.txt"; }

# step NAME SHARE COMMAND...: runs it for at most SHARE seconds, or what is left; its output goes to OUT/NAME.log.
FAILED_STEPS=0
step() {
  local name=$1 share=$2 left=$((SECONDS_ALL - SECONDS - 5))
  shift 2
  [ "$share" -lt "$left" ] || share=$left
  if [ "$share" -lt 10 ]; then
    say "$name: left out, no time"
    FAILED_STEPS=$((FAILED_STEPS + 1))
    return 1
  fi
  local start=$SECONDS
  timeout -k 5 "$share" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  case $status in
    0) say "$name: ok, $((SECONDS - start)) s" ;;
    124 | 137) say "$name: stopped after $((SECONDS - start)) s" ;;
    *) say "$name: exit status $status after $((SECONDS - start)) s: $(grep -v '^ *$' "$OUT/$name.log" | tail -1 | cut -c1-160)" ;;
  esac
  [ $status = 0 ] || FAILED_STEPS=$((FAILED_STEPS + 1))
  return $status
}

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# ---- the package: a wheel is unpacked beside the tests; its Python module is compiled where the version differs.
ROOT=$PWD
capability=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())" 2>/dev/null || echo "")
if [ -n "$WHEEL" ]; then
  ROOT=$WORK/package
  mkdir -p "$ROOT"
  "$PYTHON" -m zipfile -e "$WHEEL" "$ROOT" || exit 2
  if ! ls "$ROOT"/qkernels/_native*"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')" >/dev/null 2>&1; then
    step native 60 "${CXX:-c++}" -std=c++20 -O2 -ffp-contract=off -fvisibility=hidden -fPIC -shared \
      -I"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
      -I"$("$PYTHON" -c 'import pybind11; print(pybind11.get_include())')" -Icsrc $(find csrc -name native.cpp) \
      -L"$ROOT/qkernels" -lqkernels_core -Wl,-rpath,'$ORIGIN' \
      -o "$ROOT/qkernels/_native$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
  fi
  cp -r tests tools pyproject.toml "$ROOT" && cd "$ROOT"  # or the checkout's package would be imported
else
  export MAX_JOBS=${MAX_JOBS:-$(nproc)}
  QKERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=${capability:-9.0} step build 240 "$PYTHON" setup.py build_ext --inplace
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

# ---- what this machine is
{ nvidia-smi || echo "no nvidia-smi"; "$PYTHON" -m qkernels info; } >"$OUT/machine.txt" 2>&1
grep -E "GPU|CUDA" "$OUT/machine.txt" | tee -a "$OUT/summary.txt"

# ---- tests: each backend computes every operator
workers=()
has xdist && workers=(-n "$(($(nproc) > 14 ? 14 : $(nproc)))")
step tests 300 "$PYTHON" -m pytest -q -ra -m gpu ${workers[@]+"${workers[@]}"} --maxfail=200 tests
touch "$OUT/tests.log"
grep -hE "^(FAILED|ERROR)|crashed while" "$OUT/tests.log" >"$OUT/failures.txt"
tail -1 "$OUT/tests.log" | tee -a "$OUT/summary.txt"

# ---- times: layers with all kernels and with Triton's alone, then training steps, then other tiles
LAYERS=4096x4096,4096x11008
SCHEMES=w8a8,w4a8-g128,w4a16-g128,w4a8-g32-asym
bench=("$PYTHON" -m qkernels bench linear --device cuda --layers $LAYERS --rows 1,16,64,256,2048 --schemes $SCHEMES
  --dtype bfloat16 --seconds 0.1 --peers)
step linear 150 "${bench[@]}" --compiled --output "$OUT/linear"
hide='import sys, qkernels.cuda as c; c.library = lambda: c.Library(False, "hidden")
from qkernels.cli import main; sys.exit(main())'
step linear-triton 90 "$PYTHON" -c "$hide" "${bench[@]:3}" --output "$OUT/linear-triton"
step train 150 "$PYTHON" -m qkernels bench train --device cuda --cases mlp-full,mlp-frozen,gpt2-full \
  --schemes w8a8,w4a8-g128 --rounds 10 --peers --output "$OUT/train"
step tune $((SECONDS_ALL - SECONDS - 15)) "$PYTHON" -c "$hide" tune --layers 4096x4096,4096x11008 --rows 1,16,256,2048 \
  --schemes w8a8,w4a8-g128,w4a16-g128 --seconds $((SECONDS_ALL - SECONDS - 45)) --output "$OUT/tuned.json"
say "done: $(wc -l <"$OUT/failures.txt") failed tests, $FAILED_STEPS steps that did not end well; see $OUT"
