"""Steps that must not count: a loss or gradients that are no numbers, samples that are damaged.

Megatron's checks (0.19.2) call `validate_result`: for the loss of every micro-batch, and for every
bucket of gradients before ranks add theirs. What is behind it is replaced, by a subclass. As it is,
it looks at nothing in the first step of a process, so that a NaN in it is stepped with; names the
next step instead of this one; waits for the device at every check; and at a NaN that comes again
saves a checkpoint which makes every further start on the same device end at that step. Here a bad
step is made once more, ranks agree, and the update is left out (--skip-nan-steps) or the run ends,
saved as it was before the step. Must not know: models, architectures.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu, rerun_state_machine
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    RerunMode,
    RerunState,
    RerunStateMachine,
    RerunValidationStatus,
    get_rerun_state_machine,
)
from megatron.training import training
from torch import Tensor

from megatron_satformer.checkpoint.megatron.resume import IN_A_ROW
from megatron_satformer.cli import leave_cause
from megatron_satformer.step_findings import (
    DATA,
    GRADIENTS,
    LOSS,
    MOST,
    SUSPECT,
    Check,
    Finding,
    find_causes,
    name_findings,
)

SPIKE = 2.0  # times the largest loss per token of a rank's last micro-batches
RECENT = 100  # micro-batches
_plain_setup = training.setup_model_and_optimizer


def activate(args: Namespace, checks_loss: bool) -> list[Callable[..., Any]]:
    """Let Megatron make its checks here; before it is initialized.

    Args:
        args: validated.
        checks_loss: whether a loss that is no number is looked for. Megatron turns that off with
            fp16, where it is as wrong: gradients are scaled, the loss is not.

    Returns:
        `pre_wrap_hooks` of Megatron's.
    """
    args.check_for_nan_in_loss = checks_loss
    own = args.rerun_mode == "validate_results" and not args.error_injection_rate
    kind = type("Checks", (StepChecks,), {"options": args}) if own else RerunStateMachine
    rerun_state_machine.RerunStateMachine = kind
    training.setup_model_and_optimizer = _setup if own else _plain_setup
    return [_follow] if own else []


def note_batch(sample: Mapping[str, Any] | None) -> None:
    """Says what the next losses are of, on the ranks that compute one.

    Args:
        sample: as the data loader gave it; None on ranks that get it from another.
    """
    machine = get_rerun_state_machine()
    if isinstance(machine, StepChecks):
        machine.note_batch(sample or {})


def check_loss(args: Namespace, loss: Tensor, rows: Tensor, num_tokens: Tensor) -> None:
    """Megatron's checks of the loss of one micro-batch.

    Args:
        args: validated.
        loss: sum over the micro-batch.
        rows: [b], the same by sample; one number where samples are packed into one.
        num_tokens: that count.
    """
    machine = get_rerun_state_machine()
    validate = partial(machine.validate_result, tolerance=0.0)
    if isinstance(machine, StepChecks):
        machine.rows = rows.detach()
    if args.check_for_nan_in_loss:
        validate(loss, _is_no_number, message="the loss is", fatal=True)
    if args.check_for_spiky_loss:
        large = partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss")
        per_token = loss.detach() / num_tokens.clamp(min=1)
        validate(per_token, large, message="the loss per token jumps to", fatal=False)
    if isinstance(machine, StepChecks):
        machine.rows = None


def _is_no_number(value: Tensor) -> Tensor:
    return ~torch.isfinite(value).all()


def _follow(chunks: Any) -> Any:
    get_rerun_state_machine().chunks = list(chunks)
    return chunks


def _setup(*args: Any, **kwargs: Any) -> Any:
    # setup_model_and_optimizer's (0.19.2) optimizer, whose step can be left out, as with fp16.
    model, optimizer, scheduler = _plain_setup(*args, **kwargs)
    if optimizer is not None:
        plain_step = optimizer.step

        def step() -> Any:
            if get_rerun_state_machine().take_skip():
                return False, None, None
            return plain_step()

        optimizer.step = step
    return model, optimizer, scheduler


class StepChecks(RerunStateMachine):
    """Megatron's RerunStateMachine (0.19.2), on in training and disabled in evaluation."""

    options: Namespace
    state: RerunState

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chunks: list[Any] = []
        self.rows: Tensor | None = None
        self._checks: list[Check] = []
        self._faults: dict[str, None] = {}
        self._origins: list[str] = []
        self._micro_batch = -1
        self._found: list[Finding] = []
        self._recent: dict[str, Tensor] = {}  # [RECENT], a ring
        self._seen: dict[str, int] = {}
        self._skip = False
        self._begun: int | None = None
        self._warned = 0

    def note_batch(self, sample: Mapping[str, Any]) -> None:
        """See the function of this name."""
        self._micro_batch += 1
        self._origins = list(sample.get("origin", ()))
        for fault in filter(None, sample.get("fault", ())):
            if self.mode == RerunMode.DISABLED:
                self._warn(f"an evaluation leaves a sample out: {fault}.")
            else:
                self._faults[fault] = None

    def take_skip(self) -> bool:
        """Whether the update of this step is to be left out; told once."""
        skip, self._skip = self._skip, False
        return skip

    # The five below are RerunStateMachine's, 0.19.2.
    def should_run_forward_backward(self, data_iterator: Any) -> bool:
        """Whether the step is to be made: yes, and once more where it is bad without a reason."""
        if self.mode == RerunMode.DISABLED:
            return super().should_run_forward_backward(data_iterator)
        iterators = self._sanitize_data_iterators(data_iterator)
        if self.state == RerunState.NOT_RUNNING_YET:
            self._begin()
            for iterator in iterators:
                iterator.advance()
            return True
        found = self._gather()
        bad = [finding for finding in found if finding.kind != SUSPECT]
        if self.state == RerunState.INITIAL_RUN:
            self._tell(f"step {self._step}", [each for each in found if each.kind == SUSPECT])
            self._found = bad
            if bad and bad[0].kind != DATA:
                self.state = RerunState.RERUNNING_IN_PLACE
                self._restore_state()
                for iterator in iterators:
                    iterator.rewind()
                return True
        elif not bad:
            told = f"step {self._step} was made again, all was well, and it counts; before,"
            self._tell(told, self._found)
            self._found = []
        self.state = RerunState.NOT_RUNNING_YET
        return False

    def should_checkpoint_and_exit(self) -> tuple[bool, bool, int]:
        """Whether to save and to leave, and the code to leave with."""
        self.first_iteration_complete = True
        if self.mode == RerunMode.DISABLED:
            return super().should_checkpoint_and_exit()
        if not self._found:
            setattr(self.options, IN_A_ROW, 0)
            return False, False, 0
        self._restore_state()
        for finding in self._found:
            if finding.rank == torch.distributed.get_rank():
                status = RerunValidationStatus.FIRST_RERUN_REPRODUCIBLE
                self._log_validation_error_to_file(status, str(finding), "bad step")
        skipped, limit = getattr(self.options, IN_A_ROW, 0), self.options.skip_nan_steps
        sound = not self._reduce_any(not all(_is_sound(chunk) for chunk in self.chunks))
        if skipped < limit and sound:
            setattr(self.options, IN_A_ROW, skipped + 1)
            told = f"step {self._step} is skipped ({skipped + 1} of at most {limit} in a row):"
            self._tell(told, self._found)
            self._skip = True
            return False, False, 0
        return self._end(skipped, sound)

    def validate_result(
        self,
        result: Any,
        rejection_func: Callable[[Any], Any],
        message: str,
        comparison_func: Any = None,
        tolerance: float = 0.0,
        fatal: bool = True,
    ) -> None:
        """Looks at a result, and leaves it on the device until the step is done."""
        if self.mode == RerunMode.DISABLED:
            if fatal and rejection_func(result):
                of = "; ".join(self._origins) or "samples without a name"
                self._warn(f"in an evaluation {message} {result.item()}, of {of}.")
            return
        kind = (LOSS if self.rows is not None else GRADIENTS) if fatal else SUSPECT
        at = (self.rows, self._micro_batch, self._origins)
        self._checks.append(Check(kind, message, rejection_func(result), result.detach(), *at))

    def is_unexpectedly_large(
        self,
        result: Tensor,
        threshold: float,
        context: str,
        num_samples: int = RECENT,
        resample: bool = False,
    ) -> Any:
        """Whether a value is `threshold` times the largest of the last ones, or more."""
        value = result.detach().abs().float()
        recent = self._recent.setdefault(context, torch.zeros_like(value).repeat(num_samples))
        seen = self._seen.get(context, 0)
        known = torch.isfinite(value)
        large = known & (value >= threshold * recent.max()) & (seen >= num_samples)
        recent[seen % num_samples] = torch.where(known, value, recent.max())
        self._seen[context] = seen + 1
        return large

    def validate_state_dict(self, state_dict: dict[str, Any]) -> bool:
        """Whether a checkpoint's step is to be made again: it is made as any other."""
        return False

    @property
    def _step(self) -> int:
        return self.current_iteration + 1

    def _begin(self) -> None:
        # train() sets current_iteration to the steps that are done, which is this step's, from 0.
        if self._begun is None:
            self._begun = self.current_iteration
        else:
            self.current_iteration += 1
        self._found, self._faults, self._skip = [], {}, False
        self._start_pass()
        self.state = RerunState.INITIAL_RUN
        self._save_state()

    def _start_pass(self) -> None:
        self._checks, self._micro_batch = [], -1

    def _save_state(self) -> None:
        super()._save_state()
        # Routers change theirs with every backward pass.
        buffers = [buffer for chunk in self.chunks for buffer in chunk.buffers()]
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]

    def _restore_state(self) -> None:
        super()._restore_state()
        self._start_pass()
        for buffer, kept in self._buffers:
            buffer.copy_(kept)

    def _gather(self) -> list[Finding]:
        """What any rank has found, the same on all; one wait for the device where it is nothing."""
        device = torch.cuda.current_device()
        flags = [torch.as_tensor(check.rejected, device=device) for check in self._checks]
        flags.append(torch.tensor(bool(self._faults), device=device))
        any_found = torch.stack([flag.reshape(()) for flag in flags]).any().int()
        torch.distributed.all_reduce(any_found, op=torch.distributed.ReduceOp.MAX)
        if not any_found.item():
            return []
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, self._describe_checks())
        return find_causes([finding for each in everyones for finding in each])

    def _describe_checks(self) -> list[Finding]:
        rank = torch.distributed.get_rank()
        ranks, place = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        found = [Finding(DATA, fault, "", rank) for fault in self._faults]
        for check in self._checks:
            if check.rejected:
                size = self.options.micro_batch_size
                first = (check.micro_batch * ranks + place) * size
                found += check.describe(rank, range(first, first + size))
        return found

    def _tell(self, what: str, found: list[Finding]) -> None:
        if found and torch.distributed.get_rank() == 0:
            print(f"WARNING: {what} {name_findings(found)}.", flush=True)

    def _warn(self, what: str) -> None:
        self._warned += 1
        if self._warned <= MOST:
            print(f"WARNING: {what} (rank {torch.distributed.get_rank()})", flush=True)

    def _end(self, skipped: int, sound: bool) -> tuple[bool, bool, int]:
        step, limit, done = self._step, self.options.skip_nan_steps, self._step - 1
        saves = sound and self.options.save is not None and done > (self._begun or 0)
        if saves:
            folder = Path(self.options.save) / f"iter_{done:07d}"
            saves = not self._reduce_any(folder.is_dir())
        parts = [f"step {step} cannot count: {name_findings(self._found)}."]
        if self._found[0].kind != DATA:
            parts.append("It was made twice.")
        if not sound:
            parts.append(
                "The weights themselves hold values that are no numbers, so an earlier update was "
                "bad, and nothing is saved. Go on from a checkpoint before it (--ckpt-step)."
            )
        else:
            if skipped:
                parts.append(f"It would be one more than skip_nan_steps ({limit}) in a row.")
            where = f"are saved in {self.options.save}" if saves else "are as they were loaded"
            if not saves and done > (self._begun or 0):
                where = "were saved" if self.options.save else "are lost without --save"
            parts.append(f"The weights of step {done} {where}.")
            more = f"a --skip-nan-steps above {limit}" if limit else "--skip-nan-steps 1"
            parts.append(f"Mend the data, or go on without such steps: {more}.")
        told = f"error: {' '.join(parts)}"
        leave_cause(told)
        if torch.distributed.get_rank() == 0:
            print(told, file=sys.stderr, flush=True)
        return saves, True, EXIT_CODE_FAILED_ON_RESULT_VALIDATION


def _is_sound(chunk: torch.nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in chunk.parameters())
