"""Serves folders with vLLM and times them, for `benchmark/serving.py`.

    python in_vllm.py REQUEST ANSWER

It runs in vLLM's environment, which has nothing of ours. Both files are JSON. The engines live in
one process and take turns: what one meets of the machine, its neighbours in time meet too.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams


def seconds(llm: Any, prompts: list[dict[str, list[int]]], tokens: int) -> float:
    """How long so many greedy tokens for each of the prompts take."""
    options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, options, use_tqdm=False)
    taken = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
    return taken


def main(request: str, target: str) -> None:
    """Writes name -> seconds for one token after each prompt, and for all of them, by round."""
    asked = json.loads(Path(request).read_text())
    engines = {
        name: LLM(case["folder"], **asked["engine"], **case["engine"])
        for name, case in asked["cases"].items()
    }
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    times: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "whole": []} for name in engines
    }
    order = list(engines)
    for count in range(asked["rounds"] + 1):
        for name in order:
            for what, tokens in (("prefill", 1), ("whole", asked["tokens"])):
                taken = seconds(engines[name], prompts, tokens)
                if count:  # the first calls compile and allocate
                    times[name][what].append(taken)
        order = [*order[1:], order[0]]  # no model always follows the same one
    Path(target).write_text(json.dumps(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
