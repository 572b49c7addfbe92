#!/bin/bash
# The speed figures on one GPU, each as soon as it is there, the most important ones first; what is done is not done
# again, and what fails does not stop the rest. Then the study of the claims, for as long as the machine is there (it
# resumes). What comes out are JSONs beside this file; `python benchmarks/evidence.py` shows those of the CPU.
#
#     bash benchmarks/on_gpu.sh                                        # speed, half an hour
#     bash benchmarks/on_gpu.sh train_step                             # of it, what is called so
#     CIFAR10=FOLDER bash benchmarks/on_gpu.sh claims                  # the study, ViT-tiny with 200 epochs a run
#
# On a machine that has a copy without .git, set GIT_COMMIT=$(git rev-parse HEAD) as it is at home.
python -c "import torch; assert torch.cuda.is_available(), 'no GPU'" || exit 1
cd "$(dirname "$0")/.." || exit 1
if [ "$1" = claims ]; then
    exec python benchmarks/claims.py --scale tiny --data "$CIFAR10" --jobs 2
fi
failed=
measure() { # JSON, script and options
    case "$1" in "$only"*) ;; *) return ;; esac
    [ -e "benchmarks/$1-cuda.json" ] && return
    echo "== $1"
    python "benchmarks/$2.py" "${@:3}" || failed="$failed $1"
}
only=$1
measure train_step-base train_step --size base --batch_size 128 --rounds 10
measure train_step-large train_step --size large --batch_size 64 --rounds 10
measure profile_step-large profile_step --size large --batch_size 64 --num_steps 10
measure variants-choices-base variants --study choices --size base --batch_size 32 --rounds 15
measure trainer-large trainer --size large --batch_size 128 --num_steps 60 --rounds 2 --dataloader_num_workers 12
measure gradient_caching-base gradient_caching --micro_batch_size 128 --num_micro_batches 8 --rounds 10
measure variants-embedding-base variants --study embedding --size base --batch_size 128 --rounds 15
measure variants-batch-base variants --study batch --size base --batch_size 16 --rounds 15
measure variants-image_size-base variants --study image_size --size base --batch_size 16 --rounds 15
measure variants-tried-base variants --study tried --size base --batch_size 32 --rounds 15
measure variants-largest-base variants --study largest --size base --batch_size 64
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
