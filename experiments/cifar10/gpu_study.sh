#!/bin/bash
# One run of the study on a GPU: one method, one seed.
#
#     GIT_COMMIT=... bash experiments/cifar10/gpu_study.sh --out FOLDER --data CIFAR10_FOLDER main-can-0 --epochs 250
#     GIT_COMMIT=... bash experiments/cifar10/gpu_study.sh --out FOLDER --data CIFAR10_FOLDER main-mae-0 --epochs 230
#     GIT_COMMIT=... bash experiments/cifar10/gpu_study.sh --out FOLDER --data CIFAR10_FOLDER 'trial-can-*' --epochs 20
#     bash experiments/cifar10/gpu_study.sh --out FOLDER --toy main-can-0        # toy size on a CPU: does the script run?
#
# Runs from a plain folder: neither .git nor an installed package is needed. FOLDER gets log.txt and, in a folder with
# the run's name, at most 6 small files: metrics every minute, weights in bfloat16 after each checkpoint and at the
# end, results.json when the run is done. After --limit seconds (default 555) the run saves a checkpoint and stops, and
# the same command goes on with it where out/cifar10 is still there. A run whose results.json is in FOLDER is skipped.
# The other options are those of `python experiments/cifar10/study.py --help`.
out='' runs='' data='' limit=555 scale=tiny options=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift ;;
        --data) data=$2; shift ;;
        --limit) limit=$2; shift ;;
        --toy) scale=smoke ;;
        main-* | trial-*) runs=$1 ;;
        *) options+=("$1") ;;
    esac
    shift
done
[ -n "$out" ] && [ -n "$runs" ] || { echo "give --out FOLDER and a run: main-can-0, 'trial-can-*'"; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
[ ! -e "$data" ] || data=$(cd "$data" && pwd)
cd "$(dirname "$0")/../.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ -z "$GIT_COMMIT" ] || export GIT_DIR=/nonexistent  # a copy may lie in a checkout of another commit
if [ $scale = tiny ]; then
    [ -n "$data" ] || { echo "give --data CIFAR10_FOLDER"; exit 2; }
else
    data=${data:-modeling_can/data/sample_data}
fi
began=$SECONDS status=0
timeout --kill-after=15 "$limit" python3 experiments/cifar10/study.py --scale $scale --stage trial main \
    --runs "$runs" --data "$data" --weights "$out" "${options[@]}" >> "$out/log.txt" 2>&1 || status=$?
tail -n 30 "$out/log.txt"
echo "== $runs: status $status after $((SECONDS - began)) s" | tee -a "$out/log.txt"
exit $status
