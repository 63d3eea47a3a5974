"""Whether the disk that a run saves to has room for its checkpoints.

Must not know: process groups.
"""

import shutil
from argparse import Namespace

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.parameters import count_parameters


def expected_bytes(args: Namespace, config: DecoderConfig) -> int:
    """About what a checkpoint takes on disk: weights, master weights, the optimizer's moments.

    Args:
        args: Megatron's validated arguments.
        config: Of the model.
    """
    learned = args.position_embedding_type == "learned_absolute"
    count = count_parameters(
        config,
        args.padded_vocab_size,
        share_embeddings=not args.untie_embeddings_and_output_weights,
        learned_positions=args.max_position_embeddings if learned else 0,
    )
    each = args.params_dtype.itemsize
    if not args.no_save_optim:
        moments = {"adam": (args.exp_avg_dtype, args.exp_avg_sq_dtype), "sgd": ()}
        # Of others at least one moment; what is less than sure must not refuse a run.
        each += sum(kind.itemsize for kind in moments.get(args.optimizer, (args.exp_avg_dtype,)))
        each += args.main_params_dtype.itemsize if args.bf16 or args.fp16 else 0
    return count.total * each


def check_room(args: Namespace, config: DecoderConfig) -> None:
    """Looks whether the disk of --save has room for a checkpoint, and for those to come.

    Args:
        args: Megatron's validated arguments.
        config: Of the model.

    Raises:
        ValueError: If not one fits.
    """
    if args.save is None or "://" in args.save or config.multi_latent_attention:
        return
    size, free = expected_bytes(args, config), shutil.disk_usage(args.save).free
    told = f"a checkpoint takes about {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
    if size > free:
        raise ValueError(
            f"save ({args.save}) must be on a disk with room for a checkpoint: {told}. Make room, "
            "or give another --save."
        )
    print(f"> save ({args.save}): {told}", flush=True)
    steps = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    saves = max(1, steps // args.save_interval)
    kept = args.keep_last + 1 if args.keep_last else 2 if args.save_retain_interval else saves
    if args.save_retain_interval:
        kept += steps // args.save_retain_interval
    if min(kept, saves) * size > free:
        print(
            f"WARNING: save ({args.save}) will be full before the end: this run saves {saves} and "
            f"keeps {min(kept, saves)} at once. --keep-last N keeps fewer.",
            flush=True,
        )
