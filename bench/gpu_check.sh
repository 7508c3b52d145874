#!/usr/bin/env bash
# Everything that needs a GPU, in parts of under nine minutes each, on a machine with a CUDA device
# and no network:
#   bash bench/gpu_check.sh [PART [FOLDER]]
# PART, "all" of them in this order unless one is named:
#   correct   build the extension, all tests marked gpu, csrc under compute-sanitizer
#   kernels   every operation: plain torch, each of our backends, what `auto` takes; batch 8,
#             batch 1; then torch.compile at batch 8
#   plans-8   whole plans at batch 8: ours with and without graph and in fp8, against torch eager,
#             autocast and torch.compile; and a profile; plans-1: at batch 1
#   RIVAL-8   the same plans at batch 8 against one rival that Inductor tunes: max-autotune,
#             plan-graph (that in a graph of the plan), plan-graph-hoisted (with modulations
#             hoisted), and against ours in fp8 max-autotune-fp8 and plan-graph-fp8;
#             RIVAL-1: at batch 1
#   growth    milliseconds an image over batch sizes, tokens and numbers of steps
#   list      runs nothing: part, stage and limit in seconds, a line each
# FOLDER, bench/results unless named, gets three files of each device, named after it, and one for
# all:
#   DEVICE.jsonl   a line of whatever ended: tests, measurements, stages (bench/lines.py); runs
#                  append, and the last of each counts
#   DEVICE.txt     a summary line a part
#   DEVICE.tar.gz  logs, the sanitizer's, traces, plots, and which kernels were measured as fastest;
#                  below 16 MiB
#   RESULTS.md     tables of all devices in the folder
# so that two devices' results need seven files, in no folder below. Every stage runs, whatever
# those before it did. One that passes its limit is interrupted, and killed 15 s later, and keeps
# what it has measured; time that a stage does not use goes to those after it. The exit status is 0
# if every stage passed.
# Caches of Triton and Inductor are a part's own, those of timed plans a stage's, and stay in
# build/: a part that is repeated on the same machine resumes from them, so that a rival is measured
# whose tuning takes longer than its part: repeat it until it passes. A first image says where its
# caches were not empty.
# A part prints nothing before it ends, so that its first line is its summary. That line is also its
# last, since a machine that is lent may give back only the end of what is printed, and stands in
# DEVICE.txt from the first stage on.
#
# Variables:
#   PYTHON                     the interpreter, else the first of python, python3 that has torch
#   FLOWTURBO_BENCH_LIMITS     percent of every stage's limit (100)
# and, for a trial run that is short:
#   FLOWTURBO_BENCH_TESTS      expression of pytest -k for the tests
#   FLOWTURBO_BENCH_OPS        the same for the operations' benchmarks
#   FLOWTURBO_BENCH_BATCHES    of the batch sizes 8 and 1, these
#   FLOWTURBO_BENCH_RIVALS     of the rivals, these
#   FLOWTURBO_BENCH_PLANS      instead of "H1P5R3 H2P4R2 H8"
#   FLOWTURBO_BENCH_SIZE       instead of images of 256
#   FLOWTURBO_BENCH_ROUNDS     rounds of every measurement
#   FLOWTURBO_BENCH_DEPTH      blocks of the networks
#   FLOWTURBO_BENCH_DECODER    small: a small decoder
#   FLOWTURBO_BENCH_MODEL      of the profile, instead of SiT-XL/2
#   FLOWTURBO_BENCH_GROWTH     arguments of bench/growth.py
# FAKE_CUDA, set on the stand-in for a GPU that the tests have, leaves out comparisons of values and
# is said beside every figure.
set -uo pipefail
tuned="max-autotune plan-graph plan-graph-hoisted max-autotune-fp8 plan-graph-fp8"
parts="correct kernels plans-8 plans-1 $(printf '%s-8 ' $tuned)$(printf '%s-1 ' $tuned)growth"
wanted=${1:-all}
case " $parts all list " in
*" $wanted "*) ;;
*) echo "PART must be one of $parts all list, got '$wanted'" >&2 && exit 2 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
plans=${FLOWTURBO_BENCH_PLANS:-H1P5R3 H2P4R2 H8}
rounds=${FLOWTURBO_BENCH_ROUNDS:+--rounds $FLOWTURBO_BENCH_ROUNDS}

of() { # WANTED WORD...: those words that are wanted; all where nothing is
    local words=$1 word found=()
    shift
    for word; do
        case " ${words:-$word} " in *" $word "*) found+=("$word") ;; esac
    done
    echo "${found[*]-}"
}
batches=$(of "${FLOWTURBO_BENCH_BATCHES-}" 8 1)

line() { # FORMAT VALUE...: of the report
    # shellcheck disable=SC2059
    printf "{$1}\n" "${@:2}" >>"$FLOWTURBO_BENCH_LINES"
}

stage() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * ${FLOWTURBO_BENCH_LIMITS:-100} / 100)) start=$SECONDS
    local allowed status ended
    shift 2
    if [ "$wanted" = list ]; then
        echo "$part $name $limit"
        return
    fi
    allowed=$((limit + spare > 1 ? limit + spare : 1))
    local kept=$caches/${cache:-$part} caching=cold
    [ ! -e "$kept" ] || caching=warm
    mkdir -p "$kept"
    { # bash's own word on a stage that was killed goes nowhere
        FLOWTURBO_BENCH_STAGE=$name FLOWTURBO_BENCH_CACHES=$caching \
            TRITON_CACHE_DIR=$kept/triton TORCHINDUCTOR_CACHE_DIR=$kept/inductor \
            timeout -s INT -k 15 "$allowed" "$@" >"$logs/$part-$name.log" 2>&1
        status=$?
    } 2>/dev/null
    case $status in
    0) ended=passed ;;
    124) ended="was stopped at its limit" ;;
    126 | 127) ended="could not be started" ;;
    137)
        ended="was stopped at its limit"
        [ $((SECONDS - start)) -ge "$allowed" ] || ended="was killed"
        ;;
    *) ended="failed (exit status $status)" ;;
    esac
    spare=$((allowed - (SECONDS - start)))
    line '"kind": "stage", "run": "%s", "stage": "%s", "seconds": %d, "limit": %d, "ended": "%s"' \
        "$FLOWTURBO_BENCH_RUN" "$name" $((SECONDS - start)) "$allowed" "$ended"
    told+=("$name $ended, $((SECONDS - start)) s of $allowed")
    [ "$ended" = passed ] || failed+=("$name")
    keep
}

plan_stage() { # NAME SECONDS BATCH RIVAL...
    local name=$1 limit=$2 batch=$3 rivals cache=$part-$1
    shift 3
    rivals=$(of "${FLOWTURBO_BENCH_RIVALS-}" "$@")
    [ -n "$rivals" ] || return 0
    # shellcheck disable=SC2086 (two words or none)
    stage "$name" "$limit" "${pytest[@]}" bench/test_plans.py \
        --sizes "${FLOWTURBO_BENCH_SIZE:-256}" --batches "$batch" --decode yes \
        --plans "$plans" --rivals "$rivals" $rounds
}

operations() { # NAME SECONDS BATCH PROVIDERS
    # shellcheck disable=SC2086
    stage "$1" "$2" "${pytest[@]}" bench/test_kernels.py \
        --batches "$3" --providers "$4" $rounds ${FLOWTURBO_BENCH_OPS:+-k "$FLOWTURBO_BENCH_OPS"}
}

# From a folder without pyproject.toml, whose licence setuptools before 77 can't read; CuPy serves
# where this fails.
build() {
    stage build 60 env -C "$work" FLOWTURBO_CUDA_ARCHS="$arch" FLOWTURBO_BUILD_CUDA=1 \
        "$python" "$root/setup.py" -q build_ext \
        --build-lib "$root" --build-temp "$root/build/gpu_check"
}

correct() {
    local tests workers sanitizer
    build
    stage info 20 "$python" -c 'from flowturbo.cli.info import report; print(report())'
    # Most of the tests' time is Triton compiling, on one core a kernel.
    local count='import os, xdist; print("-n", min(12, os.cpu_count()))'
    workers=$([ "$wanted" = list ] || "$python" -c "$count" 2>/dev/null)
    mapfile -t tests < <(grep -rlE 'mark\.gpu' tests --include='test_*.py' | sort)
    # shellcheck disable=SC2086
    stage tests 235 env PYTHONPATH="$root:$root/bench" \
        "$python" -m pytest -q -p no:cacheprovider -p lines $workers -m gpu "${tests[@]}" \
        ${FLOWTURBO_BENCH_TESTS:+-k "$FLOWTURBO_BENCH_TESTS"}
    sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
    # Errors of the runtime's calls are left out: libraries ask what a device can do by calls that
    # may fail. Torch's allocator hands out pieces of 2 MiB, within which nothing is out of bounds:
    # without it each tensor is an allocation.
    stage sanitizer 205 env -u FLOWTURBO_BENCH_LINES PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "${sanitizer:-compute-sanitizer}" --error-exitcode 1 --report-api-errors no \
        --log-file "$logs/correct-memcheck.log" \
        "$python" -m pytest -q -p no:cacheprovider -m gpu "${tests[@]}" \
        -k "cuda_backend and float32"
}

kernels() {
    local batch
    build
    for batch in $batches; do
        operations "batch-$batch" $((batch > 1 ? 225 : 105)) "$batch" "auto eager triton cuda"
    done
    case " $batches " in *" 8 "*) operations compiled-8 130 8 compiled ;; esac
}

plans() { # BATCH
    # At batch 1 ours compiles as many kernels as at 8: neither part has the other's caches.
    plan_stage ours 240 "$1" ours ours-fp8 ours-eager eager autocast
    plan_stage compile 170 "$1" compile
    cache=$part-ours stage profile 100 "$python" -c '
import sys
from pathlib import Path
from flowturbo.evaluation.latency import Bench, bench
model, folder, plan, repeats, batch = sys.argv[1:]
what = dict(model=model, plans=(plan,), batch_sizes=(int(batch),))
print(bench(Bench(**what, repeats=int(repeats), profile=Path(folder))))' \
        "${FLOWTURBO_BENCH_MODEL:-SiT-XL/2}" "$logs/profile" "${plans%% *}" \
        "${FLOWTURBO_BENCH_ROUNDS:-5}" "$1"
}

# Ours is measured again beside each rival, so that a ratio is of one run on one GPU.

tuned_rival() { # RIVAL BATCH
    [ -n "$(of "${FLOWTURBO_BENCH_RIVALS-}" "$1")" ] || return 0
    case $1 in
    *-fp8) plan_stage ours-fp8 160 "$2" ours-fp8 ;;
    *) plan_stage ours 160 "$2" ours ;;
    esac
    plan_stage "$1" 355 "$2" "$1"
}

growth() {
    # shellcheck disable=SC2086
    stage growth 480 "$python" bench/growth.py "$logs" ${FLOWTURBO_BENCH_GROWTH-}
}

steps() {
    local name=${part%-*} batch=${part##*-}
    case $part in
    *-[18])
        case " $batches " in *" $batch "*) ;; *) return ;; esac
        case $name in plans) plans "$batch" ;; *) tuned_rival "$name" "$batch" ;; esac
        ;;
    *) "$part" ;;
    esac
}

summary() {
    "$python" bench/summary.py "$FLOWTURBO_BENCH_LINES" "$part" "$device"
}

keep() { # The summary and the archive as they are after a stage, each written whole or not at all.
    { grep -v "^$part: " "$base.txt" 2>/dev/null; summary; } >"$work/summaries" &&
        mv "$work/summaries" "$base.txt"
    local without=()
    while :; do
        tar -C "$work" -czf "$work/archive" "${without[@]}" "$(basename "$base")"
        [ ${#without[@]} -eq 0 ] && [ "$(stat -c %s "$work/archive")" -ge $((16 << 20)) ] || break
        without=(--exclude='*.trace.json')
    done
    mv "$work/archive" "$base.tar.gz"
}

run_part() { # PART
    local began=$SECONDS name
    part=$1 spare=0 failed=() told=()
    FLOWTURBO_BENCH_RUN="$part $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    # Choices of its own: what was measured beside other work, or by other code, may mislead.
    export FLOWTURBO_BENCH_RUN FLOWTURBO_CACHE="$logs/$part-fastest"
    rm -rf "$FLOWTURBO_CACHE" "$logs/$part-"*.log
    line '"kind": "run", "run": "%s", "part": "%s", "facts": %s' \
        "$FLOWTURBO_BENCH_RUN" "$part" "$facts"
    keep
    steps
    stage table 15 "$python" bench/table.py "$folder" --out "$folder/RESULTS.md"
    summary
    printf '\n'
    printf '%s\n' "${told[@]}" "all $((SECONDS - began)) s"
    for name in "${failed[@]}"; do
        printf '\n== the end of %s\n' "$name"
        tail -n 25 "$logs/$part-$name.log" | tail -c 1500
    done
    printf '\n'
    head -c 6000 "$folder/RESULTS.md"
    printf '\n'
    summary
    [ ${#failed[@]} -eq 0 ]
}

if [ "$wanted" = list ]; then
    cd "$root" && python=python arch='' work='' logs='' caches=''
    for part in $parts; do
        steps
        stage table 15
    done
    exit
fi

folder=${2:-$root/bench/results}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) && cd "$root" || exit 2
for candidate in ${PYTHON:-python python3}; do
    python=$("$candidate" -c 'import sys, torch; print(sys.executable)' 2>/dev/null) && break
done
if [ -z "${python-}" ]; then
    echo "none of ${PYTHON:-python python3} has torch: set PYTHON" >&2
    exit 2
fi
export PYTHONPATH=$root
machine=$("$python" bench/machine.py) || exit 2
{ read -r device && read -r name && read -r arch && read -r facts; } <<<"$machine"
pytest=("$python" -m pytest -q -p no:cacheprovider --benchmark-columns=median)
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
base=$folder/$name logs=$work/$name caches=$root/build/gpu_check/caches/$name
export FLOWTURBO_BENCH_LINES=$base.jsonl
[ ! -e "$base.tar.gz" ] || tar -C "$work" -xzf "$base.tar.gz" ||
    echo "$base.tar.gz can't be read: its logs are lost" >&2
mkdir -p "$logs" && touch "$base.txt"

wrong=0
for one in $(of "${wanted#all}" $parts); do
    run_part "$one" || wrong=1
done
[ "$wanted" != all ] || cat "$base.txt"
exit $wrong
