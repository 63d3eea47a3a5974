"""The dtypes that weights may have, under every name that they go by."""

from argparse import Namespace

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# safetensors' names
CODES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CODE_OF = {dtype: code for code, dtype in CODES.items()}


def choose_dtype(args: Namespace, given: str | None) -> str:
    """Returns one of DTYPES: what is given, else what a checkpoint was trained in.

    Args:
        args: Of the checkpoint.
        given: --dtype.

    Raises:
        ValueError: If it is none of them.
    """
    return check_dtype(given or ("bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"))


def check_dtype(given: str) -> str:
    """Returns what is given, if it is one of DTYPES.

    Raises:
        ValueError: If it is not.
    """
    if given not in DTYPES:
        raise ValueError(f"dtype ({given}) must be one of {', '.join(DTYPES)}.")
    return given
