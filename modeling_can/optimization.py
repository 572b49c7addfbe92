"""
What a training loop needs beside the model: parameter groups, schedule, averages over steps and processes, backward
passes, and the wish to stop.
"""

import collections
import contextlib
import math
import os
import random
import shutil
import signal
import threading
import time

import numpy as np
import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers.modeling_layers import GradientCheckpointingLayer

from .losses import contrastive_loss


def mixed_precision(choice: str) -> str:
    """bf16 by default on GPUs that have it; never on a CPU, where it can be hundreds of times slower than fp32."""
    if choice == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "no"
    return choice


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """
    Trainable parameters for AdamW in two groups: matrices decay; biases, norms and tokens do not. Each parameter is in
    exactly one group; frozen ones are in none.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if decays(name, parameter) else no_decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for this parameter: for matrices, not for biases, norms, tokens and positions."""
    return parameter.ndim >= 2 and not name.endswith(
        ("_token", "_tokens", "position_embeddings", "position_embedding.weight", "position_bias_table")
    )


def learning_rate(step: int, max_steps: int, warmup_steps: int, peak: float) -> float:
    """
    The learning rate of a step (0-based) as a pure function of progress: linear warm-up that reaches `peak` at step
    `warmup_steps`, then half a cosine that would reach 0 at `max_steps`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class MetricAverage:
    """
    Averages named scalars over steps and processes. Scalars stay on their device until `compute`, which is the only
    call that synchronises, with the device and between processes.

    Args:
        reduce (callable): Sums a tensor over the processes and divides by their number.
    """

    def __init__(self, reduce):
        self.reduce, self.sums, self.num_steps = reduce, {}, 0

    def update(self, metrics: dict[str, torch.Tensor], counts: torch.Tensor | bool = True):
        """Adds the scalars of a step; those of a step that does not count are left out."""
        for name, value in metrics.items():
            value = value.detach().float()
            self.sums[name] = self.sums.get(name, 0) + torch.where(torch.as_tensor(counts), value, 0)
        self.num_steps = self.num_steps + counts

    def compute(self) -> dict[str, float]:
        """The averages since the last call; NaN if no step counted."""
        if not self.sums:
            return {}
        stacked = self.reduce(torch.stack(list(self.sums.values())) / self.num_steps)
        averages = dict(zip(self.sums, stacked.tolist(), strict=True))
        self.sums, self.num_steps = {}, 0
        return averages


class DataWait:
    """
    How long the device stood still for want of data: on a GPU measured there, because the CPU, which runs ahead, also
    waits for data while the GPU still computes. `with` it around the reading of a batch.
    """

    def __init__(self, device: torch.device):
        self.on_gpu, self.times = device.type == "cuda", []

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.began = self._now()  # on a GPU: when it is done with all that came before

    def __exit__(self, *_):
        self.times.append((self.began, self._now()))

    def seconds(self) -> float:
        """Since the last call, which waits for the device."""
        times, self.times = self.times, []
        if not self.on_gpu:
            return sum(end - begin for begin, end in times)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in times) / 1000


class NonFiniteGuard:
    """
    Keeps an update whose gradient is not finite from happening: on the device, without waiting for it, and on all
    processes alike, because they share the gradient.

    Args:
        optimizer (`torch.optim.Optimizer`): A fused one, whose kernel leaves out a step with `found_inf` set.
        num_processes (`int`): That share the gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_processes: int = 1):
        self.optimizer, self.num_processes, self.steps = optimizer, num_processes, []

    def check(self, step: int, grad_norm: torch.Tensor, terms: dict[str, torch.Tensor], images: list[str]):
        """Whether the gradient is finite, on the device; to be called before `optimizer.step()`."""
        finite = grad_norm.isfinite()
        self.optimizer.found_inf = (~finite).float()
        # The contrastive loss meets the embeddings of all processes, so it does not tell whose images are to blame.
        ours = torch.stack([term.isfinite().all() for name, term in terms.items() if name != "contrastive_loss"]).all()
        losses = {name: term for name, term in terms.items() if term.ndim == 0}
        self.steps.append((step, finite, ours, losses, images))
        return finite

    def report(self) -> list[str]:
        """A sentence on each update that was left out since the last call, which waits for the device."""
        steps, self.steps = self.steps, []
        all_finite = torch.stack([finite for _, finite, *_ in steps]).tolist() if steps else []
        return [
            f"the gradient of step {step} was not finite and its update left out; "
            + ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            + (
                "; the images of this process seem not to be to blame"
                if ours and self.num_processes > 1
                else f"; of the images {', '.join(images)}"
            )
            for (step, _, ours, losses, images), finite in zip(steps, all_finite, strict=True)
            if not finite
        ]


# --- One step over several micro-batches -----------------------------------------------------------------------------


def accumulated_backward(model, micro_batches: list, backward, no_sync) -> dict[str, torch.Tensor]:
    """
    Forward and backward of one optimiser step over micro-batches, each with a contrastive loss of its own: the plain
    way, in which an image meets the negatives of its micro-batch alone. Of a single micro-batch, an ordinary step.

    Args and returns as `cached_backward`.
    """
    results = []
    for index, make in enumerate(micro_batches):
        with no_sync() if index + 1 < len(micro_batches) else contextlib.nullcontext():
            output = model(**make())
            backward(output.loss / len(micro_batches))
        results.append(_without_graph(output))
    return _joined(results)


def cached_backward(model, micro_batches: list, backward, no_sync, config) -> dict[str, torch.Tensor]:
    """
    Forward and backward of one optimiser step over micro-batches, with the loss and the gradient of one large batch
    and the activations of one micro-batch (GradCache, arXiv 2101.06983). The first pass embeds every micro-batch
    without a graph; the contrastive loss over all embeddings gives the gradient with respect to each; the second pass
    repeats every micro-batch, with the same noise, masks and augmentation from the same random numbers, and carries
    that gradient on. Reconstruction and denoising are means over images, for which summing micro-batches is exact.

    Args:
        model (callable): A `CANForPreTraining`, or DDP around it, with contrastive weight > 0.
        micro_batches (`list[callable]`): Each gives the inputs of the model, the same ones from the same random state.
        backward (callable): Back-propagates a loss.
        no_sync (callable): A context that leaves out the exchange of gradients between processes.
        config (`CANConfig`): The model's.

    Returns:
        The losses of this process's images, each unweighted, and `image_embeds`; all without a graph.
    """
    replays, embeds = [], []
    with torch.no_grad():
        for make in micro_batches:
            replays.append(rng_state())
            embeds.append(model(**make(), terms=()).image_embeds)
    whole = torch.cat(embeds).requires_grad_()
    contrastive = contrastive_loss(whole, config.temperature)
    (gradient,) = torch.autograd.grad(contrastive, whole)

    results, gradients = [], gradient.split([len(part) for part in embeds])
    for index, (make, replay) in enumerate(zip(micro_batches, replays, strict=True)):
        set_rng_state(replay)
        with no_sync() if index + 1 < len(micro_batches) else contextlib.nullcontext():
            output = model(**make(), terms=("reconstruction", "denoising"))
            # The division makes means of reconstruction and denoising; the parts of this gradient add up as they are.
            linear = (output.image_embeds * (gradients[index] * len(micro_batches))).sum()  # has this gradient
            loss = config.loss_weights["contrastive_loss"] * linear
            backward((loss if output.loss is None else loss + output.loss) / len(micro_batches))
        results.append({**_without_graph(output), "contrastive_loss": contrastive.detach()})
    return _joined(results)


def _without_graph(output) -> dict[str, torch.Tensor]:
    """
    What is worth keeping of a micro-batch, whose predictions are as large as its activations; copied, because the next
    replay of a CUDA graph overwrites its outputs.
    """
    names = ("contrastive_loss", "reconstruction_loss", "denoising_loss", "image_embeds")
    return {name: output[name].detach().clone() for name in names if output.get(name) is not None}


def _joined(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The embeddings of all micro-batches, and the means of their losses."""
    parts = {name: [result[name] for result in results] for name in results[0]}
    return {name: torch.cat(p) if name == "image_embeds" else torch.stack(p).mean() for name, p in parts.items()}


# --- Compilation -----------------------------------------------------------------------------------------------------


def how_to_compile(choice: bool | str, device: torch.device, drop_path_rate: float) -> str | None:
    """
    What `compile_model` is to do for the recipe's `torch_compile`, or `None` for nothing.
    `"auto"` compiles the blocks where that pays and works: on a GPU with Triton and a C compiler, without drop path.
    """
    if choice == "auto":
        has_compiler = has_triton() and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
        choice = device.type == "cuda" and has_compiler and drop_path_rate == 0
    return {True: "blocks", False: None}.get(choice, choice)


def compile_model(model: nn.Module, what: str):
    """
    Compiles a CAN in place, for one batch size.

    Args:
        model (`CANPreTrainedModel`): Its names and its state dict stay as they are.
        what (`str`):
            `"blocks"`: the transformer blocks, one compilation for all of the encoder and one for the decoder,
            whatever the depth. `"model"`: everything as one graph, which takes several times longer to compile.
            `"cudagraph"`: the same, recorded as a CUDA graph: for a small model, whose kernels are shorter than the
            time that it takes to launch them one by one.
    """
    # Inductor's own random numbers would differ between the two passes of gradient caching.
    options = {"fallback_random": True, "triton.cudagraphs": what == "cudagraph"}
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in blocks if what == "blocks" else [model]:
        module.compile(dynamic=False, options=options)


# --- Random numbers --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interlude():
    """
    Around a probe or a picture between two steps: random numbers drawn inside change nothing that is drawn after it,
    and compiled modules run uncompiled, because other shapes would be compiled anew.
    """
    state = rng_state()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        set_rng_state(state)


def rng_state() -> dict:
    """The state of every random generator of this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# --- Stopping --------------------------------------------------------------------------------------------------------


GRACE_SECONDS = 5  # that a batch may still take after a stop signal


class StoppedWaiting(Exception):
    """A stop signal came while data were awaited, and they did not come."""


class StopSignals(contextlib.AbstractContextManager):
    """
    While open, SIGTERM, SIGUSR1 (Slurm before it takes a job away) and SIGINT do not end the process but are
    remembered, so that the loop can save first. A second SIGINT is not caught; the others come in twos where both
    Slurm and the launcher send them. A wait for data that goes on after a signal ends in `StoppedWaiting`.

    Args:
        reduce (callable, *optional*):
            Sums a tensor over the processes, without waiting for the device; `None` where there is but one.
        device (`torch.device`): Of that tensor.
    """

    def __init__(self, reduce, device):
        self.reduce, self.device, self.received, self.asked = reduce, device, None, collections.deque()
        self.waiting_since = math.inf

    def __enter__(self):
        # Python delivers signals to the main thread alone. In another one, of an app or a server, they are not ours.
        is_main = threading.current_thread() is threading.main_thread()
        caught = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if is_main else ()
        self.previous = {number: signal.signal(number, self._remember) for number in caught}
        if is_main:
            self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_waiting)
        return self

    def __exit__(self, *_):
        if self.reduce is not None:
            # When torch 2.13 drops a gloo group it waits for the group's threads and holds the GIL, which one of them
            # may still need to let go of the last reduction: without time for that, one run in ten hung at its end.
            time.sleep(0.5)
        if self.received:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number, frame):
        self.received = signal.Signals(number)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS, GRACE_SECONDS)
        if number == signal.SIGINT:
            signal.signal(number, self.previous[number])

    @contextlib.contextmanager
    def waiting(self):
        """Around the reading of a batch, which may never come."""
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = math.inf

    def _end_waiting(self, number, frame):
        if time.monotonic() - self.waiting_since >= GRACE_SECONDS:
            raise StoppedWaiting

    def wanted(self) -> bool:
        """
        Whether to stop after this step, alike on all processes; called by each of them at every step. What they
        answer was asked two steps ago, so that nobody waits for the step that the device is at.
        """
        if self.reduce is None:
            return self.received is not None
        answer = self.reduce(torch.full((), float(self.received is not None), device=self.device))
        event = None
        if answer.is_cuda:  # item() would wait for all that the device has to do, and not only for this
            answer = torch.empty_like(answer, device="cpu", pin_memory=True).copy_(answer, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.asked.append((answer, event))
        if len(self.asked) <= 2:
            return False
        answer, event = self.asked.popleft()
        if event:
            event.synchronize()
        return bool(answer > 0)
