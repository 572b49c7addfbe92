"""
What the protocols on frozen features cost on a CPU: k-NN and linear probe on 50,000 x 384 training and 10,000 test
features, each in a process of its own, beside scikit-learn's k-NN, which predicts the same.

    python benchmarks/evaluation.py [--num_train 50000] [--num_test 10000] [--width 384]

The features are those of ten overlapping classes. Memory is what a protocol takes at its peak beyond the features.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from records import add_out, facts, save

from modeling_can.evaluation.knn import knn_predictions
from modeling_can.evaluation.linear import linear_probe


def features(num: int, width: int, seed: int):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(10, width))
    mixing = np.random.default_rng(98).normal(size=(width, width)) / width**0.5  # correlated, as a network's are
    labels = rng.integers(10, size=num)
    noise = 12 * rng.normal(size=(num, width)).astype(np.float32) * np.geomspace(1, 0.03, width, dtype=np.float32)
    return ((centers[labels] * 0.5 + noise) @ mixing).astype(np.float32), labels


def knn(train, labels, test):
    return knn_predictions(train, labels, test, 10)[20]


def scikit_learn_knn(train, labels, test):
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    return model.fit(train, labels).predict(test)


def probe(train, labels, test):
    return linear_probe(train, labels, 10).predict(test)


PROTOCOLS = {"knn, five values of k": knn, "scikit-learn's k-NN, one k": scikit_learn_knn, "linear_probe": probe}


def memory(kind: str) -> float:
    """GiB of this process: `VmRSS`, now, or `VmHWM`, the most since it was reset. Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 2**20


def measure(name: str, num_train: int, num_test: int, width: int) -> dict:
    (train, labels), (test, answers) = features(num_train, width, 0), features(num_test, width, 1)
    PROTOCOLS[name](train[:1000], labels[:1000], test[:100])  # imports
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = memory("VmRSS"), time.perf_counter()
    predictions = PROTOCOLS[name](train, labels, test)
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 2),
        "gib_beyond_features": round(memory("VmHWM") - before, 3),
        "accuracy": round(float((predictions == answers).mean()), 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_train", type=int, default=50_000)
    parser.add_argument("--num_test", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    add_out(parser)
    arguments = parser.parse_args()
    sizes = (arguments.num_train, arguments.num_test, arguments.width)
    if arguments.only:
        print(json.dumps(measure(arguments.only, *sizes)))
        return
    figures = {}
    for name in PROTOCOLS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures[name] = json.loads(answer.stdout)
        print(name, figures[name])
    result = {
        **facts(seed=0),
        "train": [arguments.num_train, arguments.width],
        "test": [arguments.num_test, arguments.width],
        "protocols": figures,
    }
    save("evaluation", result, arguments.out)


if __name__ == "__main__":
    main()
