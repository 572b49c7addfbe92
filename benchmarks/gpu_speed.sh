#!/bin/bash
# The speed figures of one GPU, the most important ones first.
#
#     GIT_COMMIT=... bash benchmarks/gpu_speed.sh --out FOLDER              # the set `first`, 7 minutes on an H200
#     GIT_COMMIT=... bash benchmarks/gpu_speed.sh --out FOLDER second       # 10 minutes at most
#     bash benchmarks/gpu_speed.sh --out FOLDER base profile                # these parts
#     bash benchmarks/gpu_speed.sh --out FOLDER --toy                       # toy sizes on a CPU: do the scripts run?
#
# Runs from a plain folder: neither .git nor an installed package is needed. Each part has a time limit. Its result
# appears in FOLDER, whole, when the part is done; its output goes to FOLDER/log.txt. A part whose result is there is
# skipped, so a second call does what is missing. A part that fails does not stop the others; the last line names those
# that failed, and the exit status is 1. A set leaves at most 8 files.
first="versions tests base large tiny256 tiny1024 profile"
second="trainer caching cudagraph largest best"
out='' toy='' parts=''
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift ;;
        --toy) toy=yes ;;
        first) parts="$parts $first" ;;
        second) parts="$parts $second" ;;
        *) case " $first $second " in
               *" $1 "*) parts="$parts $1" ;;
               *) echo "$1 is no part; the parts: $first $second"; exit 2 ;;
           esac ;;
    esac
    shift
done
[ -n "$out" ] || { echo "give --out FOLDER"; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ -z "$GIT_COMMIT" ] || export GIT_DIR=/nonexistent  # a copy may lie in a checkout of another commit
failed=''

part() { # part, seconds, result, what python3 is told; the result's path is added
    case " ${parts:-$first} " in *" $1 "*) ;; *) return ;; esac
    [ -e "$out/$3" ] && return
    echo "== $3: python3 ${*:4}$3" | tee -a "$out/log.txt"
    local began=$SECONDS status=0
    timeout --kill-after=5 $(($2 * slack)) python3 "${@:4:$#-4}" "${!#}$out/$3" >> "$out/log.txt" 2>&1 || status=$?
    if [ $status = 0 ]; then
        rm -f "$out/failed-$3"
    else
        failed="$failed $3"
        [ -e "$out/$3" ] && mv "$out/$3" "$out/failed-$3"
    fi
    echo "== $3: status $status after $((SECONDS - began)) s" | tee -a "$out/log.txt"
}

step() { # part, seconds, result, options of train_step.py
    part "$1" "$2" "train_step-$3.json" benchmarks/train_step.py "${@:4}" --out=
}

if [ -z "$toy" ]; then
    python3 -c "import torch; assert torch.cuda.is_available(), 'no GPU'" || exit 2
    base="--size base --batch_size 128" large="--size large --batch_size 64"
    tiny256="--size cifar --batch_size 256" tiny1024="--size cifar --batch_size 1024"
    all=straightforward,straightforward-compiled,eager,compiled most=straightforward,eager,compiled
    rounds="--rounds 8" profiled=$large slack=1
    trained="$large --num_steps 120 --rounds 1 --dataloader_num_workers 12"
    cached="--micro_batch_size 128 --num_micro_batches 8 --rounds 5" largest="--batch_size 256"
else
    export OMP_NUM_THREADS=1
    all=straightforward,straightforward-compiled,eager,compiled most=straightforward,eager slack=3
    base="--size quickstart --batch_size 2" rounds="--rounds 1"
    large=$base tiny256=$base tiny1024=$base profiled="$base --num_steps 1"
    trained="--size tiny --batch_size 2 --num_steps 2 --rounds 1"
    cached="--size quickstart --rounds 1" largest="--study batch --size quickstart --batch_size 2 --rounds 1"
fi

part versions 60 ceilings.json benchmarks/ceilings.py --out=
part tests 120 tests.xml -m pytest -m gpu tests/test_gpu.py -q -p no:cacheprovider --durations=5 --junitxml=
step base 120 base $base $rounds --orders 1 --rows $all
step large 120 large $large $rounds --orders 1 --rows $all
step tiny256 60 tiny256 $tiny256 $rounds --orders 1 --rows $most
step tiny1024 60 tiny1024 $tiny1024 $rounds --orders 1 --rows $most
part profile 60 profile_step-large.json benchmarks/profile_step.py $profiled --compiled --out=

part trainer 260 trainer-large.json benchmarks/trainer.py $trained --out=
part caching 60 gradient_caching-base.json benchmarks/gradient_caching.py $cached --out=
step cudagraph 110 base-cudagraph $base $rounds --orders 1 --rows straightforward,cudagraph
part largest 200 variants-largest-base.json benchmarks/variants.py --study largest --size base $largest --out=
step best 120 best-base $base $rounds --rows straightforward,compiled
step best 120 best-large $large $rounds --rows straightforward,compiled

[ -z "$failed" ] || { echo "failed:$failed" | tee -a "$out/log.txt"; exit 1; }
