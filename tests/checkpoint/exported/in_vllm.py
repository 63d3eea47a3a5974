"""Exported folders in vLLM's engine, for test_vllm.py. vLLM's environment has nothing of ours.

    python in_vllm.py REQUEST ANSWER

One process serves folder after folder: starting it is what takes time. Both files are JSON.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


def answer(llm: LLM, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Greedy tokens and logprobs of prompts, and the tokens once more from cached prefixes."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    options = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    whole = SamplingParams(**options, logprobs=0, prompt_logprobs=0)
    found = [read(output) for output in llm.generate(inputs, whole, use_tqdm=False)]
    again = llm.generate(inputs, SamplingParams(**options), use_tqdm=False)
    return {
        "tokens": [tokens for tokens, _ in found],
        "logprobs": [logprobs for _, logprobs in found],
        "tokens_again": [list(output.outputs[0].token_ids) for output in again],
        "cached": [output.num_cached_tokens for output in again],
    }


def read(output: Any) -> tuple[list[int], list[float]]:
    """What was generated, and the logprob of each token of prompt (without the first) and text."""
    text = output.outputs[0]
    ids = [*output.prompt_token_ids[1:], *text.token_ids]
    tables = [*output.prompt_logprobs[1:], *text.logprobs]
    return list(text.token_ids), [t[i].logprob for t, i in zip(tables, ids, strict=True)]


def join(port: int) -> Callable:
    """How ranks find each other. vLLM's own way names shared memory alike in all runs."""
    rank = int(os.environ["RANK"])
    return lambda executor: (f"tcp://127.0.0.1:{port}", rank, rank)


def main(request: str, target: str) -> None:
    """Answer for each folder, or the error that it ends with."""
    asked = json.loads(Path(request).read_text())
    answers = {}
    for name, case in asked["cases"].items():
        ExecutorWithExternalLauncher._distributed_args = join(case["port"])
        llm = None
        try:
            llm = LLM(case["folder"], **asked["engine"] | case.get("engine", {}))
            answers[name] = answer(llm, asked["prompts"], asked["tokens"])
        except Exception as error:
            answers[name] = {"error": str(error)}
        # Its end takes the process groups with it, which are then the next one's.
        del llm
        gc.collect()
    Path(target).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
