"""--dry-run: a run up to the moment when it would start, then its plan."""

import io
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout

from megatron_satformer import arguments, metrics, required
from megatron_satformer.backend.device import choose_device
from megatron_satformer.cli import USER_ERRORS, usage_errors
from megatron_satformer.model.builder import DecoderModelConfig
from megatron_satformer.planning.fake_ranks import pretend_ranks
from megatron_satformer.planning.plan import Plan, check_options, make_plan
from megatron_satformer.planning.report import describe_plan
from megatron_satformer.planning.search import describe_search, search_layouts

Resolve = Callable[[Namespace, bool], tuple[Namespace, DecoderModelConfig]]


def plan_run(
    resolve: Resolve, report: Callable[[Namespace, DecoderModelConfig, bool], object]
) -> None:
    """Checks what the run checks, but for --gpus and writing nothing, and prints the plan.

    Args:
        resolve: arguments as given, and whether the run uses CUDA -> arguments as they will be,
            and the model.
        report: compares and describes the run, as its rank 0 does.

    Raises:
        SystemExit: code 2 after one printed line, for what the run would refuse.
    """
    with usage_errors():
        preview = arguments.preview_arguments()
        required.check_required(preview)
        check_options(preview)
        choose_device("cpu")  # which stands in for any
        metrics.hold_writers()
        cuda = preview.device != "cpu"
        if preview.rank != 0:
            return
        refused = None
        try:
            with pretend_ranks(preview):
                args, model = resolve(preview, cuda)
            report(args, model, cuda)
            print(describe_plan(make_plan(args, model)), flush=True)
        except (*USER_ERRORS, AssertionError) as error:
            if not preview.search:
                raise
            refused = error
            print(f"as given it is refused: {' '.join(str(error).split())}", flush=True)
        if preview.search:
            found = [*search_layouts(preview, lambda flags: _plan_of(flags, resolve, cuda))]
            if refused and not any(tried.plan for tried in found):
                raise refused  # by what is no matter of layouts, perhaps
            print(describe_search(found), flush=True)


def _plan_of(flags: list[str], resolve: Resolve, cuda: bool) -> Plan:
    """Of the same command line, with more flags behind it."""
    command = sys.argv
    metrics.forget_run()
    try:
        sys.argv = [*command, *flags]
        preview = arguments.preview_arguments()
        with pretend_ranks(preview), redirect_stdout(io.StringIO()):
            return make_plan(*resolve(preview, cuda))
    finally:
        sys.argv = command
