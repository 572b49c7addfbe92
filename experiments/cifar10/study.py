"""
The claims of the paper at a scale that runs here: CAN, SimCLR and MAE as three recipes of the same code.

    python experiments/cifar10/study.py --data CIFAR10_FOLDER --stage search main  # hours on two CPU cores
    python experiments/cifar10/study.py --stage report                             # tables and figures from the JSONs
    bash experiments/cifar10/gpu_study.sh --out FOLDER --data CIFAR10_FOLDER main-can-0 --epochs 250    # on a GPU
    python experiments/cifar10/study.py --data CIFAR10_FOLDER --scale tiny --stage evaluate report --weights FOLDER

--data is a folder of parquet shards with train and test splits (columns image and label), or a Hub id
(uoft-cs/cifar10). All rows see the same unlabeled training images with the same encoder, batch, optimizer,
augmentation and number of epochs. Stages of the scale `toy`, in this order:

search      each method's learning rate, MAE's mask ratio and CAN's contrastive weight, at a shorter schedule; judged
            by a linear probe on a fifth of the training images, so that the test images have no say. The learning
            rate is searched on until the best is not the smallest or largest one tried.
main        CAN, SimCLR and MAE as searched, CAN with fewer patches masked and CAN with a noise head of its own, three
            seeds; CAN with the paper's weights and MAE with one view, one seed
rate        images a second and peak memory of the methods, nothing beside them, in turns
ablations   CAN without each term, noise without its loss, without the noise-level embedding, mask ratios, normalized
            targets; a shorter schedule
order       what may decide between CAN and SimCLR: mask, temperature, crops, batch, number of patches at a shorter
            schedule; a longer one
views       three and four views of fewer images, at equal FLOPs; a shorter schedule, three seeds
scaling     10 %, 30 %, 100 % of the images with equal steps, and a larger encoder; a shorter schedule
downstream  of the main rows' weights, pre-trained again where they are gone: fine-tuning, common corruptions (of a
            fifth of the test images), and the labels of --further_data

What is done is not done again: each run leaves a JSON in experiments/cifar10/results/SCALE/STAGE, with settings,
command, machine, versions, commit and seed, named METHOD-seedSEED-HASH.json by the method, the seed and a hash of the
settings in which the run differs from its scale and its method. An interrupted run goes on from its
checkpoint. Weights stay in --output_dir. With --jobs 2, two runs share the machine, each with half of its cores: more
gets done, and times mean less, which is why `rate` stands alone.

The scale `tiny` is a fixed list of runs for a GPU, without a search; `smoke` is the same list in seconds on a CPU.
Stages, each of which takes only the runs whose names match --runs:

trial       CAN, SimCLR and MAE with each of --rates, judged on training images
main        the runs of the study, in the order of their worth; --epochs fixes their length, or --seconds fixes it
            from a speed that is measured first. Every minute, what there is of a run comes into --weights/RUN, at most
            6 small files, of which none is half written: metrics, and the weights in bfloat16
evaluate    anywhere: the JSONs, from what lies in --weights
downstream  as above, from what lies in --weights
"""

import argparse
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))  # the root of the repository, which need not be installed
from experiments.cifar10.one_run import judge, pretrain_and_judge, pretrain_and_keep, probe_data  # noqa: E402
from experiments.cifar10.report import report  # noqa: E402
from experiments.cifar10.runs import SCALES, TOY_STAGES, read, runs_of, settings_of, trial  # noqa: E402


LISTED_STAGES = ("trial", "main", "evaluate", "downstream", "report")
STAGES = {"toy": (*TOY_STAGES, "report"), "tiny": LISTED_STAGES, "smoke": LISTED_STAGES}


def toy(arguments):
    for stage in arguments.stage or STAGES["toy"]:
        if stage == "report":
            report("toy")
            continue
        jobs = 1 if stage == "rate" else arguments.jobs
        do = partial(pretrain_and_judge, arguments=arguments, threads=max(1, os.cpu_count() // jobs))
        while todo := [run for run in runs_of("toy", stage) if not read(run)]:
            print(f"=== {stage}: {len(todo)} to do ===", flush=True)
            if stage == "main":
                probe_data(arguments)  # before the runs share it
            with ThreadPoolExecutor(jobs) as pool:
                for run, _ in zip(todo, pool.map(do, todo), strict=True):
                    print(f"{time.strftime('%H:%M')} {run.name}", flush=True)


def fixed_list(arguments):
    signal.signal(signal.SIGTERM, lambda *_: None)  # the trainer gets it too, and saves what there is to keep
    scale, threads = arguments.scale, 1 if arguments.scale == "smoke" else os.cpu_count()
    stages = {
        "trial": trial(scale, arguments.rates),
        "main": runs_of(scale, "main"),
        "downstream": runs_of(scale, "downstream"),
    }
    stages["evaluate"] = stages["trial"] + stages["main"]
    names = [run.name for runs in stages.values() for run in runs]
    if not any(fnmatch(name, arguments.runs) for name in names):
        raise SystemExit(f"--runs {arguments.runs} is none of {', '.join(dict.fromkeys(names))}")
    for stage in arguments.stage or ["trial", "main"]:
        if stage == "report":
            report(scale)
            continue
        for run in stages[stage]:
            kept = Path(arguments.weights) / replace(run, stage="main" if stage == "downstream" else run.stage).name
            is_done = (kept / "results.json").exists()
            if not fnmatch(run.name, arguments.runs):
                continue
            if stage in ("trial", "main") and not is_done:
                pretrain_and_keep(run, arguments, threads)
            elif stage in ("evaluate", "downstream") and is_done and not read(run):
                judge(run, kept, settings_of(run), arguments, threads)
            else:
                continue
            print(f"{time.strftime('%H:%M')} {stage}: {run.name}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="folder of parquet shards, or Hub id")
    parser.add_argument("--image_column", help="image, or img for uoft-cs/cifar10")
    parser.add_argument("--scale", choices=SCALES, default="toy")
    stages = list(dict.fromkeys(name for names in STAGES.values() for name in names))
    parser.add_argument("--stage", nargs="+", choices=stages, help="all of toy's, or trial and main")
    parser.add_argument("--output_dir", default="out/cifar10", help="for weights and logs")
    parser.add_argument("--probe_every", type=int, default=195, help="steps between k-NN tests of toy's main rows")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--further_data", help="folder of labeled images to transfer to (downstream)")
    lists = parser.add_argument_group("the scales tiny and smoke")
    lists.add_argument("--runs", default="*", help="only those of these names: main-can-0, 'trial-can-*'")
    lists.add_argument("--weights", default="out/cifar10/weights", help="a folder for each run: what is kept of it")
    lists.add_argument("--rates", type=float, nargs="+", help="learning rates of the trial")
    length = lists.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="of every run; 200 unless given")
    length.add_argument("--seconds", type=float, help="of training: a short run measures how many epochs they hold")
    arguments = parser.parse_args()
    for stage in arguments.stage or []:
        if stage not in STAGES[arguments.scale]:
            of_scale = ", ".join(STAGES[arguments.scale])
            parser.error(f"--stage {stage} is none of --scale {arguments.scale}; it has {of_scale}")
    arguments.image_column = arguments.image_column or ("img" if arguments.data == "uoft-cs/cifar10" else "image")
    for name in ("data", "output_dir", "further_data", "weights"):  # absolute, so that nothing else is called so
        value = getattr(arguments, name)
        if value and (name in ("output_dir", "weights") or Path(value).exists()):
            setattr(arguments, name, str(Path(value).resolve()))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.scale == "toy":
        toy(arguments)
    else:
        fixed_list(arguments)


if __name__ == "__main__":
    main()
