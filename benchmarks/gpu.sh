#!/usr/bin/env bash
# The first hour on a new GPU: all that the tests on a CPU cannot show, in about 20 minutes on an H100.
#
#   benchmarks/gpu.sh [--again] [part …]             all parts by default; those that passed are skipped, unless --again
#   DEVICE=cpu PRESET=tiny benchmarks/gpu.sh         a rehearsal, which tells whether every command runs
#
# A part that fails stops no other. Output goes to runs/gpu-$DEVICE/<part>.log, timings and the table of parts, with the
# chip and the date, to benchmarks/results/.

cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD DEVICE=${DEVICE:-cuda} PRESET=${PRESET:-small}
LOGS=runs/gpu-$DEVICE
mkdir -p "$LOGS"

RESULTS=benchmarks/results
if [ "$DEVICE" = cpu ]; then
    RESULTS=$LOGS/results
    export BENCHMARK_RESULTS=$PWD/$RESULTS # what a rehearsal measures is no result
    DTYPE=float32 PRECISION=fp32 STEPS=2 BATCH=4 STEP="--clips 2 --repeats 1 --forms eager transformers" PAIRS=256 REPEATS=1
else
    DTYPE=bfloat16 PRECISION=bf16 STEPS=30 BATCH=64 STEP="--most 256 --repeats 3" PAIRS=32768 REPEATS=5
fi

mkdir -p "$RESULTS"

inference() { python -m benchmarks inference "$@" --preset "$PRESET" --device "$DEVICE" --dtype $DTYPE --repeats $REPEATS; }

# a short training of the demo, whose last figures are its result: settings, and perhaps a command to start it with
training() {
    local name=$1 start=$2
    shift 2
    rm -rf "$LOGS/run-$name"
    $start train.py device="$DEVICE" hydra.run.dir="$LOGS/run-$name" steps=$STEPS batch_size=$BATCH eval_every=$STEPS \
        save_every=$STEPS log_every=1 data.demo.root="$LOGS/demo" data.demo.train_clips=$((2 * BATCH)) \
        data.demo.eval_clips=$BATCH "$@" &&
        tail -n 1 "$LOGS/run-$name/history.jsonl" | python -c "import json
row = json.loads(input())
print(*(f'{key} {row[key]:.4g}' for key in ('loss', 'gradient_norm', 'clips_per_second', 'memory_gb')))"
}
torchrun="python -m torch.distributed.run --standalone --nproc-per-node 1"
no_dropout="model.audio.transformer.attention_dropout=0 model.video.transformer.attention_dropout=0"
no_dropout+=" model.fusion.attention_dropout=0"

declare -A COMMAND=(
    [tests]="pytest -m gpu --numprocesses 0 -q"
    [codec]="inference codec"
    [codec_bf16_peer]="inference codec --peer-dtype $DTYPE"
    [frames]="inference frames --peer-dtype $DTYPE"
    [frames_compiled]="inference frames --peer-dtype $DTYPE --compile"
    [text]="inference text --peer-dtype $DTYPE"
    [audio]="inference audio --peer-dtype $DTYPE"
    [forward]="inference forward --peer-dtype $([ "$DEVICE" = cpu ] && echo float32 || echo autocast)"
    [loss]="python -m benchmarks loss --device $DEVICE --pairs $PAIRS"
    [train_step]="python -m benchmarks train_step --device $DEVICE --preset $PRESET $STEP"
    [train_step_memory]="python -m benchmarks train_step --device $DEVICE --preset $PRESET --clips 8 --forms eager transformers"
    [train_ddp]="training ddp '$torchrun' precision=$PRECISION"
    [train_fsdp]="training fsdp '$torchrun' precision=$PRECISION parallel.strategy=fsdp"
    [train_fp32]="training fp32 python precision=fp32"
    [train_packed]="training packed python precision=$PRECISION $no_dropout"
    [train_compiled]="training compiled python precision=$PRECISION parallel.compile=true"
    [train_flex]="training flex python precision=$PRECISION model.attention=flex $no_dropout"
)
ORDER="tests codec codec_bf16_peer frames frames_compiled text audio forward loss train_step train_step_memory
    train_ddp train_fsdp train_fp32 train_packed train_compiled train_flex"
# what makes no sense there: no GPU to test, minutes of compiling C++, no backward of flex attention, the same twice
[ "$DEVICE" = cpu ] && ORDER="codec frames text audio forward loss train_step train_ddp train_fsdp train_fp32 train_packed"

[ "$1" = --again ] && AGAIN=1 && shift
for part in "$@"; do
    [ -n "${COMMAND[$part]}" ] || { echo "no part $part; there are: ${!COMMAND[*]}" >&2; exit 1; }
done
trap 'kill -- -$group -$watch 2>/dev/null; exit 1' INT TERM
for part in ${*:-$ORDER}; do
    [ -z "$AGAIN" ] && grep -qs passed "$LOGS/$part.outcome" && continue
    echo "== $part: ${COMMAND[$part]}"
    SECONDS=0
    # a function cannot be started by `timeout`, so the watch is a second process, which ends the part's whole group
    set -m
    (eval "${COMMAND[$part]}") >"$LOGS/$part.log" 2>&1 &
    group=$!
    (sleep "${LIMIT:-420}" && kill -- -$group) >/dev/null 2>&1 &
    watch=$!
    set +m
    wait $group && outcome=passed || outcome=FAILED
    kill -- -$watch 2>/dev/null
    echo "$outcome $SECONDS" >"$LOGS/$part.outcome"
    tail -n 25 "$LOGS/$part.log"
done

{
    python -c "import datetime, os, torch
gpu = os.environ['DEVICE'] != 'cpu'
print(torch.cuda.get_device_name() if gpu else 'CPU', datetime.date.today(), 'torch', torch.__version__)"
    printf '%-18s %-8s %8s  %s\n' part outcome seconds 'last line'
    for part in $ORDER; do
        read -r outcome seconds 2>/dev/null <"$LOGS/$part.outcome" || { outcome="not run" seconds=; }
        last=$(grep -v '^ *$' "$LOGS/$part.log" 2>/dev/null | tail -n 1 | head -c 300 | iconv -c -t UTF-8)
        printf '%-18s %-8s %8s  %s\n' "$part" "$outcome" "$seconds" "$last"
    done
} 2>/dev/null | tee "$RESULTS/parts_$DEVICE.txt"
! grep -qE ' (FAILED|not run) ' "$RESULTS/parts_$DEVICE.txt"
