"""Options that Megatron (0.19.2) leaves at None, or takes at 0, and later computes with.

On the command line as given, before any of it is used: it would be a TypeError, a ZeroDivisionError
or an assertion without words on some rank. Must not know: modules, process groups, data files.
"""

import importlib.util
import os
from argparse import Namespace
from typing import Any

from megatron_satformer.fitting import flag, near

# Of these an interval is one that no run reaches: evaluation is then at the end alone.
NEVER = 1 << 40
# The model's shape; a checkpoint may bring it in (--use-checkpoint-args).
SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
# The smallest value of a number, where one is given.
SMALLEST = {
    1: """num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size
    seq_length max_position_embeddings micro_batch_size global_batch_size log_interval
    tensorboard_log_interval save_interval save_retain_interval save_params_interval
    log_memory_interval check_weight_hash_across_dp_replicas_interval lr_decay_iters
    lr_decay_samples eval_global_batch_size eval_micro_batch_size train_iters train_samples
    save_activations_interval save_tokens_per_expert_interval save_wgrads_interval
    save_dgrads_interval train_sync_interval non_persistent_save_interval keep_last
    exit_duration_in_mins seed""",
    0: """eval_interval eval_iters exit_interval num_workers lr_warmup_iters lr_warmup_samples
    lr min_lr lr_warmup_init lr_warmup_fraction lr_wsd_decay_iters lr_wsd_decay_samples
    weight_decay clip_grad start_eval_at_iter manual_gc_interval skip_nan_steps""",
}


def find_defaults(preview: Namespace) -> dict[str, Any]:
    """What stands in for an option that was left out, and that Megatron cannot be without.

    Args:
        preview: from `arguments.preview_arguments`.
    """
    defaults: dict[str, Any] = {}
    if preview.max_position_embeddings is None and preview.position_embedding_type == "rope":
        defaults["max_position_embeddings"] = preview.seq_length
    if preview.skip_train and not preview.train_samples and preview.train_iters is None:
        defaults["train_iters"] = 0
    if preview.wandb_project and not preview.wandb_save_dir and preview.save is None:
        defaults["wandb_save_dir"] = "."  # wandb's own: it makes a folder of its name there
    if preview.wandb_project and not preview.tensorboard_dir:
        # Megatron tells wandb what it tells TensorBoard, and nothing without it.
        folder = preview.save or preview.wandb_save_dir or "."
        defaults["tensorboard_dir"] = os.path.join(folder, "tensorboard")
    return defaults


def check_required(preview: Namespace) -> None:
    """Refuse what is missing or too small, each in one line.

    Args:
        preview: from `arguments.preview_arguments`.

    Raises:
        ValueError: naming the option, its value and the way out.
    """
    for smallest, options in SMALLEST.items():
        for option in options.split():
            value = getattr(preview, option, None)
            if value is not None and value < smallest and (option, value) != ("train_iters", 0):
                raise ValueError(
                    f"{option} ({value}) must be at least {smallest}. Change "
                    f"{flag(option)}, or leave it out."
                )
    if not preview.use_checkpoint_args:
        for option in SHAPE:
            if getattr(preview, option) is None and getattr(preview, _alias(option), None) is None:
                raise _missing(preview, option)
        _check_heads(preview)
    if preview.micro_batch_size is None:
        raise _missing(preview, "micro_batch_size")
    _check_tokenizer(preview)
    _check_wandb(preview)
    if preview.save is not None and preview.save_interval is None:
        raise ValueError(
            f"save ({preview.save}) must come with save_interval (None), the steps between two "
            "checkpoints. Add --save-interval."
        )
    _check_intervals(preview)
    _check_recompute(preview)
    _check_overlap(preview)
    _check_keep_last(preview)
    if preview.log_progress and preview.save is None:
        raise ValueError(
            "log_progress (True) must come with save (None), the folder of its file. Add --save."
        )
    if not preview.skip_train:
        _check_length(preview)
        _check_rates(preview)


def _alias(option: str) -> str:
    return f"encoder_{option}"


def _missing(preview: Namespace, option: str, why: str = "Megatron has no default for it") -> Any:
    value = getattr(preview, option)
    return ValueError(f"{option} ({value}) must be given: {why}. Add {flag(option)}.")


def _check_heads(preview: Namespace) -> None:
    heads, hidden = preview.num_attention_heads, preview.hidden_size
    if preview.kv_channels is None and hidden % heads:
        raise ValueError(
            f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}). Change "
            "one of them, or give --kv-channels."
        )


def _check_tokenizer(preview: Namespace) -> None:
    if preview.use_checkpoint_args:
        return
    kind = preview.tokenizer_type
    if kind is None:
        raise _missing(preview, "tokenizer_type", "the data, mock data too, are tokens of one")
    if kind.startswith("Null") and preview.vocab_size is None:
        raise _missing(preview, "vocab_size", f"tokenizer_type ({kind}) has no vocabulary")


def _check_wandb(preview: Namespace) -> None:
    if not preview.wandb_project:
        return
    if preview.wandb_exp_name == "":
        raise ValueError(
            f"wandb_project ({preview.wandb_project}) must come with wandb_exp_name (''), the name "
            "of the run in it. Add --wandb-exp-name, or leave --wandb-project out."
        )
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb_project ({preview.wandb_project}) needs the package wandb, which is not "
            "installed. Install it (pip install wandb), or leave --wandb-project out."
        )


def _check_intervals(preview: Namespace) -> None:
    for option, by in (
        ("save_retain_interval", "save_interval"),
        ("log_memory_interval", "log_interval"),
    ):
        value, each = getattr(preview, option), getattr(preview, by)
        if value and each and value % each:
            raise ValueError(
                f"{option} ({value}) must be a multiple of {by} ({each}). Use {near(value, each)}."
            )


def _check_recompute(preview: Namespace) -> None:
    kind, method = preview.recompute_granularity, preview.recompute_method
    layers = preview.recompute_num_layers
    if kind == "full":
        if method is None:
            raise _missing(preview, "recompute_method", "recompute_granularity (full) has two")
        if layers is None:
            told = f"recompute_method ({method}) takes so many layers at a time, or in all"
            raise _missing(preview, "recompute_num_layers", told)
        return
    for option in ("recompute_method", "recompute_num_layers"):
        if (value := getattr(preview, option)) is not None:
            raise ValueError(
                f"{option} ({value}) must come with recompute_granularity full, not ({kind}). "
                f"Leave {flag(option)} out, or add --recompute-granularity full."
            )
    if preview.distribute_saved_activations:
        raise ValueError(
            "distribute_saved_activations (True) must come with recompute_granularity full, not "
            f"({kind}). Leave it out, or add --recompute-granularity full."
        )


def _check_overlap(preview: Namespace) -> None:
    if not preview.overlap_param_gather or preview.use_megatron_fsdp:
        return
    if not preview.use_distributed_optimizer and preview.optimizer != "dist_muon":
        raise ValueError(
            "overlap_param_gather (True) must come with use_distributed_optimizer (False): no "
            "other optimizer gathers. Add --use-distributed-optimizer."
        )
    if not preview.overlap_grad_reduce:
        raise ValueError(
            "overlap_param_gather (True) must come with overlap_grad_reduce (False). Add "
            "--overlap-grad-reduce."
        )


def _check_keep_last(preview: Namespace) -> None:
    if preview.keep_last is None:
        return
    asked = f"keep_last ({preview.keep_last})"
    if preview.save is None:
        raise ValueError(
            f"{asked} must come with save (None), the folder of the steps. Add --save."
        )
    if preview.ckpt_format != "torch_dist" or "://" in preview.save:
        raise ValueError(
            f"{asked} must come with ckpt_format (torch_dist), not ({preview.ckpt_format}), and a "
            f"save ({preview.save}) on a file system. Leave it out, or use --save-retain-interval."
        )


def _check_length(preview: Namespace) -> None:
    steps, samples = preview.train_iters, preview.train_samples
    sized = getattr(preview, "model_size", None) and not steps and not samples
    if getattr(preview, "train_tokens", None) or sized:
        return  # converted, and checked, where the defaults are resolved
    if not steps and not samples:
        raise ValueError(
            f"train_iters ({steps}) or train_samples ({samples}) must be given: how long to train. "
            "Add one of them, or --skip-train to evaluate alone."
        )
    if steps and samples:
        raise ValueError(
            f"train_iters ({steps}) must not be given with train_samples ({samples}). Leave one "
            "of them out."
        )
    used, other = ("iters", "samples") if steps else ("samples", "iters")
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if value := getattr(preview, f"{name}_{other}"):
            raise ValueError(
                f"{name}_{other} ({value}) must not be given with train_{used} "
                f"({getattr(preview, f'train_{used}')}). Use {flag(f'{name}_{used}')}."
            )
    if preview.lr_warmup_fraction is not None and getattr(preview, f"lr_warmup_{used}"):
        raise ValueError(
            f"lr_warmup_fraction ({preview.lr_warmup_fraction}) must not be given with "
            f"lr_warmup_{used} ({getattr(preview, f'lr_warmup_{used}')}). Leave one of them out."
        )
    _check_schedule(preview, used)


def _check_schedule(preview: Namespace, unit: str) -> None:
    length = getattr(preview, f"train_{unit}")
    decay = getattr(preview, f"lr_decay_{unit}") or length
    whole = f"lr_decay_{unit} ({decay})"
    warmup, fraction = getattr(preview, f"lr_warmup_{unit}"), preview.lr_warmup_fraction
    if fraction is not None and fraction >= 1:
        raise ValueError(f"lr_warmup_fraction ({fraction}) must be less than 1. Give less.")
    if length and warmup >= decay:
        raise ValueError(
            f"lr_warmup_{unit} ({warmup}) must be less than {whole}, by default the length of the "
            f"run. Give less, or a longer run."
        )
    annealed = getattr(preview, f"lr_wsd_decay_{unit}")
    if preview.lr_decay_style == "WSD" and annealed is None:
        raise ValueError(
            f"lr_decay_style (WSD) must come with lr_wsd_decay_{unit} (None), the length of its "
            f"last part. Add {flag(f'lr_wsd_decay_{unit}')}."
        )
    if annealed is not None and length and annealed > decay:
        raise ValueError(f"lr_wsd_decay_{unit} ({annealed}) must be at most {whole}. Give less.")


def _check_rates(preview: Namespace) -> None:
    lr = preview.lr
    if lr is None:
        raise _missing(preview, "lr", "the learning rate after warmup has no default")
    for option in ("min_lr", "lr_warmup_init"):
        value = getattr(preview, option)
        if value is not None and value > lr:
            raise ValueError(f"{option} ({value}) must be at most lr ({lr}). Change one of them.")
    if preview.weight_decay_incr_style != "constant":
        for option in ("start_weight_decay", "end_weight_decay"):
            if getattr(preview, option) is None:
                style = f"weight_decay_incr_style ({preview.weight_decay_incr_style})"
                raise _missing(preview, option, f"{style} goes from one to the other")
