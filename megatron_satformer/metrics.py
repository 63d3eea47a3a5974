"""What a run tells of itself: metrics.jsonl, an object per logged step, and arguments.txt.

Both lie in the run's folder (--save, else --tensorboard-dir). Megatron (0.19.2) hands what it logs
to nobody: training_log makes a line of it and print_rank_last prints that, so those two names in
megatron.training.training are the narrowest place. Values are Megatron's own, unrounded; losses and
times are means over the steps since the last line, also behind the first line of a run, which
Megatron averages with the one before. Must not know: models, architectures.
"""

import inspect
import io
import re
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    get_num_microbatches,
)
from megatron.training import arguments, get_args, get_timers, global_vars, training
from megatron.training.utils import is_last_rank

from megatron_satformer.benchmark.utilization import peak_flops
from megatron_satformer.files.atomic import write_atomically
from megatron_satformer.files.metrics_file import MetricsFile
from megatron_satformer.model.gate_stats import Gates, GateStats

METRICS, ARGUMENTS = "metrics.jsonl", "arguments.txt"
BOARD = "--tensorboard-dir"
_EVALUATION = re.compile(r" validation(\S*) loss at iteration (\d+)(?: on (\w+) set)? \| (.*)")
_VALUE = re.compile(r"(\S[^|]*?) value: (\S+) \|")
_plain_log, _plain_print = training.training_log, training.print_rank_last
_plain_dump = arguments._print_args


def hold_arguments() -> None:
    """Keep Megatron from printing 800 lines of arguments; `tell_arguments` puts them in a file."""
    arguments._print_args = lambda *_: None


def hold_writers() -> None:
    """Keep Megatron from opening TensorBoard's and wandb's files while it reads arguments."""
    global_vars._set_tensorboard_writer = lambda *_: None
    global_vars._set_wandb_writer = lambda *_: None
    global_vars._set_one_logger = lambda *_: None


def forget_run() -> None:
    """Let Megatron read another command line in this process."""
    global_vars.destroy_global_vars()
    destroy_num_microbatches_calculator()


def tell_arguments(args: Namespace) -> str:
    """Write the arguments beside the run, as Megatron lays them out.

    Args:
        args: validated.

    Returns:
        What to print: where they are, or, of a run that writes nothing, all of them.
    """
    lines = io.StringIO()
    with redirect_stdout(lines):
        _plain_dump("arguments", args)
    folder = run_folder(args)
    if folder is None:
        return f"{lines.getvalue()}WARNING: {METRICS} is not written without --save or {BOARD}."
    write_atomically(folder / ARGUMENTS, lines.getvalue().encode())
    return f"all arguments: {folder / ARGUMENTS}"


def run_folder(args: Namespace) -> Path | None:
    """Where files about a run lie; None if it writes nothing at all."""
    folders = [place for place in (args.save, args.tensorboard_dir) if place]
    own = [place for place in folders if "://" not in place]  # not in an object store
    return Path(own[0]) if own else None


def activate(args: Namespace, cuda: bool) -> list[Callable[..., Any]]:
    """Follow Megatron's log; a second call starts anew.

    Args:
        args: validated.
        cuda: whether the run uses CUDA.

    Returns:
        `pre_wrap_hooks` of Megatron's, for what is to be seen inside of the model.
    """
    every = args.log_gates_interval
    heads = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    gates = GateStats(args.num_layers, heads, every) if every else None
    metrics = RunMetrics(device_peak(cuda), gates)
    training.training_log = metrics.log
    training.print_rank_last = metrics.print_line
    return [gates.watch] if gates else []


def device_peak(cuda: bool) -> float | None:
    """bf16 FLOP/s of the device, where it is a GPU that is known."""
    return peak_flops(torch.cuda.get_device_name()) if cuda else None


def largest_peak() -> float:
    """MiB, the most that any rank has held; to be asked of all ranks."""
    held = torch.cuda.max_memory_allocated() / 2**20
    peak = torch.tensor(held, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return peak.item()


class RunMetrics:
    """Makes records of what training_log gets, on the last rank, which has the losses.

    Args:
        peak: bf16 FLOP/s of the device, for the MFU; None where it is not known.
        gates: added up over all ranks at their interval.
    """

    def __init__(self, peak: float | None, gates: GateStats | None) -> None:
        self._peak, self._gates = peak, gates
        self._file: MetricsFile | None = None
        self._losses: dict[str, torch.Tensor] = {}
        self._steps: Counter[str] = Counter()
        self._seconds = 0.0  # on Megatron's timer at the last line
        self._began: tuple[int, float] | None = None  # step and time of the first line
        self._suffix = ""
        self._untold: list[str] = []  # losses of which no step counts
        self._lost = False  # whether the file cannot be written

    def log(self, *args: Any, **kwargs: Any) -> Any:
        """In place of Megatron's training_log: it, and the record of the step."""
        step = inspect.signature(_plain_log).bind(*args, **kwargs).arguments
        if self._gates is not None:
            self._tell_gates(self._gates, step["iteration"])
        options = get_args()
        first = step.get("is_first_iteration", False)
        told = first or step["iteration"] % options.log_interval == 0
        peak = largest_peak() if told else 0.0  # on all ranks
        if not is_last_rank():
            return _plain_log(*args, **kwargs)
        self._add(step)
        if told:
            record = self._record(step, options) | {"peak_memory_mib": peak}
            self._suffix = _suffix(record)
            self._write(record)
        result = _plain_log(*args, **kwargs)
        if told and not first:
            self._seconds = 0.0  # Megatron has reset its timer
        return result

    def print_line(self, line: str) -> None:
        """In place of print_rank_last: adds to a step's line, makes records of evaluations."""
        if " iteration " in line and "elapsed time per iteration" in line:
            for name in self._untold:  # Megatron would tell the mean of no step, 0
                line = re.sub(rf" {re.escape(name)}: 0\.0+E\+00 \|", "", line)
            line, self._suffix = line + self._suffix, ""
        elif (match := _EVALUATION.match(line)) and is_last_rank():
            name, step, last, values = match.groups()
            split = {None: "validation", "validation": "final validation"}.get(last, last)
            found = {_key(key): float(value) for key, value in _VALUE.findall(values)}
            self._write({"step": int(step), "split": f"{split}{name}"} | found)
        _plain_print(line)

    def _tell_gates(self, stats: GateStats, step: int) -> None:
        gates = stats.take(step)  # on all ranks
        if not (gates and is_last_rank()):
            return
        found = {
            f"alpha_{name}": {layer: getattr(of, name) for layer, of in gates.items()}
            for name in Gates._fields
        }
        self._write({"step": step, "split": "gates"} | found)
        curves = {
            f"{name.replace('_', ' ')}/layer {layer}": value
            for name, layers in found.items()
            for layer, value in layers.items()
        }
        if writer := training.get_tensorboard_writer():
            for name, value in curves.items():
                writer.add_scalar(name, value, step)
        if wandb := training.get_wandb_writer():
            wandb.log(curves, step)

    def _add(self, step: dict[str, Any]) -> None:
        self._steps["all"] += 1
        self._steps["skipped"] += bool(step["skipped_iter"])
        if not step["skipped_iter"]:
            for name, loss in step["loss_dict"].items():
                self._losses[name] = self._losses.get(name, 0.0) + loss.detach()

    def _record(self, step: dict[str, Any], options: Namespace) -> dict[str, Any]:
        """What is known of the steps since the last line; nothing is counted any more."""
        seconds = get_timers()("interval-time").elapsed(reset=False)
        each = (seconds - self._seconds) / self._steps["all"]
        self._seconds = seconds
        trained = max(1, self._steps["all"] - self._steps["skipped"])
        losses = {_key(name): float(total) / trained for name, total in self._losses.items()}
        skipped = self._steps["skipped"]
        self._untold = [name for name in step["loss_dict"] if name not in self._losses]
        self._losses, self._steps = {}, Counter()
        replicas = options.data_parallel_size * options.gtp_weight_remat_size
        batch = options.micro_batch_size * replicas * get_num_microbatches()
        flops = training.num_floating_point_operations(
            options,
            batch,
            seqlen_squared_sum_in_batch=step.get("seqlen_squared_sum_in_batch"),
            total_real_tokens_in_batch=step.get("total_real_tokens_in_batch"),
        )
        speed = flops / each / options.world_size
        utilization = None
        if self._peak and (options.bf16 or options.fp16):
            utilization = speed / self._peak
        names = "learning_rate loss_scale grad_norm params_norm num_zeros_in_grad"
        return {
            "step": step["iteration"],
            "split": "train",
            "samples": options.consumed_train_samples,
            "tokens": options.consumed_train_samples * options.seq_length,
            **losses,
            **{name: _number(step[name]) for name in names.split()},
            "batch_size": batch,
            "skipped_steps": skipped,
            "seconds_per_step": each,
            "tokens_per_second": batch * options.seq_length / each,
            "tflops_per_second_and_gpu": speed / 1e12,
            "mfu": utilization,
            "seconds_left": self._seconds_left(step["iteration"], options.train_iters, each),
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        }

    def _seconds_left(self, iteration: int, last: int, each: float) -> float:
        """By the clock since the first line, evaluations and saves included."""
        now = time.monotonic()
        if self._began is None:
            self._began = iteration, now
        elif iteration > self._began[0]:
            each = (now - self._began[1]) / (iteration - self._began[0])
        return (last - iteration) * each

    def _write(self, record: dict[str, Any]) -> None:
        folder = run_folder(get_args())
        if folder is None or self._lost:
            return
        try:
            if self._file is None:
                self._file = MetricsFile(folder / METRICS, get_args().iteration)
            self._file.write(record)
        except (OSError, ValueError) as error:  # no reason to lose a run
            self._lost = True
            _plain_print(f"WARNING: {METRICS} is not written any more: {error}")


def _suffix(record: dict[str, Any]) -> str:
    parts = [f"tokens/s: {record['tokens_per_second']:.0f}"]
    if record["mfu"] is not None:
        parts.append(f"MFU: {100 * record['mfu']:.1f}%")
    parts.append(f"peak memory (MiB): {record['peak_memory_mib']:.0f}")
    parts.append(f"time left: {timedelta(seconds=round(record['seconds_left']))}")
    return "".join(f" {part} |" for part in parts)


def _number(value: Any) -> float | int | None:
    return value.item() if isinstance(value, torch.Tensor) else value


def _key(name: str) -> str:
    return name.replace(" ", "_")
