#!/usr/bin/env bash
# The first quarter of an hour on a GPU, in parts that each have a limit and a log: `bash tests/gpu/first_run/plan.sh A|B|C`.
# A: is it right?   B: how fast?   C "golden graphs": single parts.   DRY=1: on a CPU, tiny, to find mistakes beforehand.
set -u
here=$(cd "$(dirname "$0")" && pwd)
export REPO=${here%/tests/gpu/first_run} OUT=${OUT:-build/first-run/out} PY=${PY:-python3} DRY=${DRY:-0} here
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-build/first-run/triton}
cd "$REPO" || exit 1
mkdir -p "$OUT"
began=$SECONDS
failed=0
summary=""
wheels=build/first-run/wheels
site=$REPO/build/first-run/site
if [ "$DRY" = 0 ] && [ -d "$wheels" ] && [ ! -e "$site/.done" ]; then  # what prepare.sh fetched, for a machine without a registry
  $PY -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl && touch "$site/.done"
fi
export PYTHONPATH=$site:$REPO:$REPO/kernels:$REPO/tests PATH=$PATH:/usr/local/cuda/bin

part() { # name, seconds, lines of its log to show, command…
  local name=$1 limit=$2 lines=$3 start=$SECONDS rc
  shift 3
  PART_S=$((limit - 4)) timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1
  rc=$?
  echo "===== $name: rc $rc, $((SECONDS - start)) s of $limit"
  tail -n "$lines" "$OUT/$name.log"
  summary="$summary$name rc=$rc $((SECONDS - start))s\n"
  [ $rc = 0 ] || failed=1
}
interpreted() { if [ "$DRY" = 1 ]; then TRITON_INTERPRET=1 OMP_NUM_THREADS=1 "$@"; else "$@"; fi; }
machine() {
  [ "$DRY" = 1 ] || nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv,noheader
  $PY - <<'P'
import sys

import torch
import triton

from dsc_kernels import native, ops

print(sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "native", native.available())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), "cuDNN", torch.backends.cudnn.version())
    print(ops.description(torch.device("cuda", 0)))
P
}
http() { # the server on the device, asked by http_check.py
  local device=cuda log=$OUT/server.log rc server url=""
  [ "$DRY" = 1 ] && device=cpu
  $PY -P -m dsc_serve.cli serve --device $device --dtype float32 --port 0 --kv-tokens 65536 > "$log" 2>&1 &
  server=$!
  for _ in $(seq 240); do
    url=$(sed -n 's/^curl \(http:[^ ]*\)\/v1.*/\1/p' "$log")
    [ -n "$url" ] && break
    kill -0 $server 2>/dev/null || break
    sleep 0.25
  done
  $PY "$here/http_check.py" "$url" $device
  rc=$?
  kill $server 2>/dev/null
  wait $server
  tail -n 8 "$log"
  return $rc
}
sanitize() { # memcheck or racecheck
  if [ "$DRY" = 1 ]; then interpreted $PY "$here/sanitize.py"; return; fi
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2>/dev/null | head -1)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --error-exitcode 9 $PY "$here/sanitize.py"
}
compare() {
  $PY -P -m dsc_serve.cli bench compare "$here/compare.toml" --out "$OUT/compare" --models build/first-run/models
  local rc=$?
  rm -rf "$OUT/compare/models"
  return $rc
}
layer() { $PY -P -m dsc_serve.cli bench layer --device cuda --config paper --batches 1,16,256 --seconds 4 --repeats 8 --json "$OUT/bench-layer.json"; }
export -f interpreted machine http sanitize compare layer

one() {
  case $1 in
    machine) part machine 60 6 bash -c machine ;;
    tests) part tests 120 12 $PY -m pytest -q -p no:cacheprovider tests/gpu/test_on_device.py ;;
    golden) part golden 150 16 $PY "$here/golden.py" ;;
    graphs) part graphs 90 8 $PY "$here/graphs.py" ;;
    http) part http 120 24 bash -c http ;;
    memcheck | racecheck) part "$1" 120 6 bash -c "sanitize $1" ;;
    decode) part decode 150 60 $PY "$here/decode.py" ;;
    layers) part layers 150 125 bash -c 'interpreted $PY "$here/layers.py"' ;;
    tune) part tune 120 140 bash -c 'interpreted $PY "$here/tune.py"' ;;
    launches) part launches 150 20 $PY "$here/count_launches.py" ;;
    compare) part compare 190 30 bash -c compare ;;
    layer) part layer 60 40 bash -c layer ;;
    *) echo "$1 is not a part of the plan"; failed=1 ;;
  esac
}
case ${1:-A} in
  A)
    one machine
    $PY setup.py -q build_ext --inplace > "$OUT/native.log" 2>&1 & # the CPU's kernels, for what golden compares
    native=$!
    for family in route attend experts compose; do # compiled beside the tests, for B
      timeout 150 $PY "$here/tune.py" warm $family > "$OUT/warm-$family.log" 2>&1 &
    done
    for name in tests golden graphs http; do one $name; done
    wait $native || echo "the CPU's kernels were not built"
    [ $((SECONDS - began)) -lt 290 ] && one memcheck
    ;;
  B) for name in decode layers compare tune; do [ $((SECONDS - began)) -lt 250 ] && one $name; done ;;
  C) for name in $2; do one "$name"; done ;;
  *) echo "A, B or C"; exit 2 ;;
esac
printf 'SUMMARY\n%btotal %s s\n' "$summary" $((SECONDS - began))
exit $failed
