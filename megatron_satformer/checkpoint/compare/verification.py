"""Holds a written export against its checkpoint, for `to-hf --verify`."""

from pathlib import Path

from megatron_satformer.checkpoint.megatron.reader import MegatronCheckpoint

# of one logit, both models in float32 with the exported weights
TOLERANCE = 1e-4


def check_verifiable(checkpoint: MegatronCheckpoint, parameters: int) -> None:
    """Looks before any work whether the two models can be run here, one after the other.

    Args:
        checkpoint: Opened.
        parameters: Number of them.

    Raises:
        NotImplementedError: If it has an option that needs a GPU, say.
        ValueError: If there is too little memory.
    """
    import psutil

    from megatron_satformer.checkpoint.megatron.model import check_runnable

    check_runnable(checkpoint.args)
    needed, free = 4 * parameters, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"verify needs {needed / 1e9:.1f} GB of memory to run the model in float32, and "
            f"{free / 1e9:.1f} GB are free. Export without --verify, or on a larger machine."
        )


def verify_folder(checkpoint: MegatronCheckpoint, folder: Path) -> str:
    """Runs both models on real text.

    Args:
        checkpoint: Opened.
        folder: What was written.

    Returns:
        The figures in one line, without the places of the two models.

    Raises:
        ValueError: If the logits differ by more than TOLERANCE.
    """
    from megatron_satformer.checkpoint.compare.logits import verify_export

    found = verify_export(checkpoint, folder)
    agree = round(found.argmax_agreement * found.tokens)
    told = (
        f"logits differ by {found.max_difference:.1e} at most and {found.mean_difference:.1e} on "
        f"average (largest logit {found.largest_logit:.3g}), cosine at least "
        f"{found.min_cosine:.7f}, same argmax on {agree} of {found.tokens} tokens "
        f"({found.sequences} x {found.seq_length}, {found.source}); both run in float32 with the "
        "exported weights"
    )
    if not found.within(TOLERANCE):
        raise ValueError(
            f"The export is not kept: its logits must be within {TOLERANCE} of Megatron's, and "
            f"are not. {told}."
        )
    return told
