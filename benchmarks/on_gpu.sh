#!/bin/bash
# Every speed figure on one GPU, in about half an hour, and then the study of the claims for as long as the machine is
# there (it resumes). What comes out are JSONs beside this file; `python benchmarks/evidence.py` shows those of the CPU.
#
#     bash benchmarks/on_gpu.sh                                        # speed
#     CIFAR10=FOLDER bash benchmarks/on_gpu.sh claims                  # the study, ViT-tiny with 200 epochs a run
set -e
python -c "import torch; assert torch.cuda.is_available(), 'no GPU'"
cd "$(dirname "$0")/.."
if [ "$1" = claims ]; then
    exec python benchmarks/claims.py --scale tiny --data "$CIFAR10" --jobs 2
fi
python benchmarks/train_step.py --size base --batch_size 128 --rounds 10
python benchmarks/train_step.py --size large --batch_size 64 --rounds 10
python benchmarks/profile_step.py --size large --batch_size 64 --num_steps 10
python benchmarks/variants.py --study choices --size base --batch_size 64 --rounds 15
python benchmarks/variants.py --study tried --size base --batch_size 64 --rounds 15
python benchmarks/variants.py --study batch --size base --batch_size 32 --rounds 15
python benchmarks/variants.py --study largest --size base --batch_size 32
python benchmarks/variants.py --study image_size --size base --batch_size 16 --rounds 15
python benchmarks/variants.py --study embedding --size base --batch_size 128 --rounds 15
python benchmarks/gradient_caching.py --micro_batch_size 128 --num_micro_batches 8 --rounds 20
python benchmarks/trainer.py --size large --batch_size 128 --num_steps 60 --rounds 3 --dataloader_num_workers 12
