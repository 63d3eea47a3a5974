"""Options that count steps mean the samples they meant when the run began, unless they change."""

from argparse import Namespace

import pytest

from megatron_satformer.checkpoint.megatron.length import (
    find_differences,
    length_now,
    length_of,
    length_then,
    plan,
    record_length,
)

LENGTHS = dict.fromkeys(
    "train_iters train_samples lr_decay_iters lr_decay_samples lr_warmup_fraction "
    "lr_wsd_decay_iters lr_wsd_decay_samples".split()
)


def options(**given):
    values = {
        **LENGTHS,
        "lr_warmup_iters": 0,
        "lr_warmup_samples": 0,
        "global_batch_size": 8,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "lr_warmup_init": 0.0,
        "lr_decay_style": "cosine",
        "lr_wsd_decay_style": "exponential",
        "start_weight_decay": 0.1,
        "end_weight_decay": 0.1,
        "weight_decay_incr_style": "constant",
        "step_batch_size_schedule": None,
        "override_opt_param_scheduler": False,
        "use_checkpoint_opt_param_scheduler": False,
    }
    return Namespace(**values | given)


def saved(step, samples, length=None, **given):
    """Args and scheduler's state, as a checkpoint of that step has them."""
    args = options(**given)
    length = length or length_of(args)
    record_length(args, length)
    args.consumed_train_samples = samples
    unrecorded = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")
    state = {k: v for k, v in length.schedule.items() if k not in unrecorded}
    return args, state | {"num_steps": samples}


FIRST = {"train_iters": 40, "lr_warmup_iters": 4}  # 320 samples
SAMPLES = {"train_samples": 320, "lr_warmup_samples": 32}


@pytest.mark.parametrize(
    ("first", "now", "end", "last"),
    [
        (FIRST, FIRST, 320, 40),
        (FIRST, FIRST | {"global_batch_size": 16}, 320, 25),
        (FIRST, FIRST | {"global_batch_size": 4}, 320, 70),
        # as many steps as are left with the new batch
        (FIRST, FIRST | {"global_batch_size": 16, "train_iters": 25}, 320, 25),
        (FIRST, FIRST | {"train_iters": 50}, 400, 50),
        (FIRST, FIRST | {"train_iters": 20}, 160, 20),
        (FIRST, SAMPLES, 320, 40),
        (SAMPLES, SAMPLES | {"global_batch_size": 16}, 320, 25),
        (SAMPLES, SAMPLES | {"global_batch_size": 4}, 320, 70),
        (SAMPLES, SAMPLES | {"train_samples": 400}, 400, 50),
        (SAMPLES, FIRST, 320, 40),
        (FIRST, FIRST | {"override_opt_param_scheduler": True, "global_batch_size": 16}, 560, 40),
    ],
)
def test_a_run_ends_with_the_samples_asked_for(first, now, end, last):
    args, state = saved(10, 80, **first)
    going_on, length, _ = plan(options(**now), args, state, 10, False)
    assert (going_on.end, going_on.last_step, length.end) == (end, last, end)
    same = end == 320
    assert (length.schedule == length_of(args).schedule) == same


def test_the_batch_may_change_again_and_again():
    args, state = saved(10, 80, **FIRST)
    for batch, step, samples, last in [(16, 15, 160, 25), (4, 25, 200, 55), (8, 30, 240, 40)]:
        given = options(**FIRST, global_batch_size=batch)
        going_on, length, changes = plan(given, args, state, args_step(args), False)
        assert (going_on.end, going_on.last_step) == (320, last)
        assert not any(change.refusal for change in changes)
        args, state = saved(step, samples, length, **FIRST, global_batch_size=batch)
        args.step = step


def args_step(args):
    return getattr(args, "step", 10)


def test_samples_that_are_less_than_a_step_are_told():
    args, state = saved(10, 80, **SAMPLES)
    going_on, _, changes = plan(options(**SAMPLES, global_batch_size=14), args, state, 10, False)
    assert going_on.last_step == 10 + 240 // 14
    assert "the last 2 samples are less than a step" in changes[-1].meaning


def test_a_run_that_is_done_is_told_and_not_refused():
    args, state = saved(40, 320, **FIRST)
    going_on, _, [change] = plan(options(**FIRST), args, state, 40, False)
    assert going_on.last_step == 40
    assert change.refusal is None
    assert "nothing is left to train" in change.meaning


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"train_iters": 50}, {"lr_decay_iters"}),
        ({"lr_warmup_iters": 8}, {"lr_warmup_iters"}),
        ({"lr_decay_iters": 30}, {"lr_decay_iters"}),
        ({"lr_warmup_iters": 0, "lr_warmup_fraction": 0.2}, {"lr_warmup_fraction"}),
        ({"lr": 1e-3, "min_lr": 1e-4}, {"lr", "min_lr"}),
        ({"start_weight_decay": 0.2, "end_weight_decay": 0.2}, {"weight_decay"}),
        ({"lr_decay_style": "linear"}, {"lr_decay_style"}),
        ({"lr_warmup_init": 1e-4}, {"lr_warmup_init"}),
        ({"lr_wsd_decay_iters": 5}, set()),  # of another style
    ],
)
def test_what_changes_the_schedule_is_named(given, named):
    args, state = saved(10, 80, **FIRST)
    then = length_then(args, state)
    now = length_now(options(**FIRST | given), then, 10, 80)
    assert {option for option, _, _ in find_differences(then, now)} == named
    _, _, changes = plan(options(**FIRST | given), args, state, 10, False)
    refused = [change.refusal for change in changes if change.refusal]
    assert len(refused) == bool(named)
    for choice in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"):
        chosen = options(**FIRST | given, **{choice: True})
        going_on, _, changes = plan(chosen, args, state, 10, False)
        assert not any(change.refusal for change in changes)
        if choice.startswith("use"):
            assert going_on.schedule == then.schedule
            assert going_on.options["lr"] == 3e-3
        elif named:
            assert going_on.schedule != then.schedule


def test_the_end_of_a_schedule_that_anneals_last():
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "train_iters": 40}
    args, state = saved(10, 80, **wsd)
    then = length_then(args, state)
    same = length_now(options(**wsd, global_batch_size=16), then, 10, 80)
    assert not list(find_differences(then, same))
    longer = length_now(options(**wsd | {"lr_wsd_decay_iters": 10}), then, 10, 80)
    assert list(find_differences(then, longer)) == [
        ("lr_wsd_decay_iters", "40 samples", "80 samples")
    ]


def test_a_constant_rate_goes_on_for_as_long_as_one_likes():
    args, state = saved(10, 80, train_iters=40, lr_decay_style="constant")
    given = options(train_iters=80, lr_decay_style="constant")
    going_on, _, changes = plan(given, args, state, 10, False)
    assert going_on.end == 640
    assert [change.option for change in changes] == ["train_iters"]
    assert changes[0].refusal is None


def test_a_checkpoint_without_scheduler_or_record_is_what_its_args_say():
    args, _ = saved(10, 80, **FIRST)
    del args.asked_length
    args.lr_decay_iters = 40  # as Megatron fills it in
    going_on, length, changes = plan(
        options(**FIRST, global_batch_size=16), args, None, 10, fresh=True
    )
    assert (going_on.end, going_on.reached, going_on.rates) == (320, 80, None)
    assert length.schedule == length_of(options(**FIRST)).schedule
    assert [change.option for change in changes] == ["global_batch_size"]
