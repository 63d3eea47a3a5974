"""vLLM gives transformers' tokens and logprobs of every exported class. `make test-vllm` runs it.

vLLM has an environment of its own, without this package: engines and servers are processes there.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_satformer.checkpoint.hugging_face.plain_classes import build_stock_config
from megatron_satformer.model.architectures import TABLE, find_architecture
from tests.conftest import ROOT, _free_port
from tests.models import build_exported, build_exported_config, build_twin, save_exported

VLLM = os.environ.get("TEST_VLLM_BIN", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="TEST_VLLM_BIN names no environment: make test-vllm"),
]

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's kernel takes
    "tie_word_embeddings": False,
}
TOKENS, BLOCK, STEP = 16, 32, 64
ENGINE = {
    "trust_remote_code": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "block_size": BLOCK,
    "max_num_batched_tokens": STEP,  # longer prompts come in chunks
    "kv_cache_memory_bytes": 2**26,
}
# one longer than the other; the first tokens differ
PROMPTS = [[3 + (7 * n + k * k) % 90 for k in range(5 + 14 * n)] for n in range(8)]
TOLERANCE = 1e-4  # of logprobs, float32
ATTEMPTS = 20


def _cells() -> Iterator[tuple[str, dict]]:
    """A model of each class that an export has, of each kind of gate, and of other forms."""
    for name in TABLE:
        yield name, {"architecture": name}
        if find_architecture(name).stock:  # with biases transformers has no class of its own
            yield f"{name}-own-class", {"architecture": name, "attention_bias": True}
        if "value_gate" in find_architecture(name).own_options:
            for gate in ("sigmoid", "softmax", "constant", "lerp_channels"):
                yield f"{name}-{gate}", {"architecture": name, "value_gate": gate}
    yield "attnres-full", {"architecture": "attnres", "attnres_form": "full"}
    head = {"mhc_collapse": "head", "mhc_residual": "plain"}
    yield "mhc-head", {"architecture": "mhc"} | head


CELLS = dict(_cells())
# vLLM compiles a function of its sampler even then, which takes as long as all else
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
# what needs all heads together
SPLIT = {f"satformer-{gate}": f"value_gate ({gate})" for gate in ("softmax", "constant")}
SPLIT["lime"] = "the router of a LIMe"
SPLIT["value_embeddings"] = "a table of value embeddings"
SERVED = [name for name in CELLS if name in TABLE]
HALVES = [*SERVED, "mhc-head"]
COMPILED = "satformer"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """Name -> exported folder and the same model in transformers."""
    words = WordLevel({f"t{n}": n for n in range(SHAPE["vocab_size"])}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    made = {}
    for name, options in CELLS.items():
        folder = tmp_path_factory.mktemp(name)
        twin = build_twin(**SHAPE, **options, scale=0.2)
        stock = build_stock_config(build_exported_config(twin.config, max_position_embeddings=256))
        if stock is None:
            save_exported(twin, folder, max_position_embeddings=256)
            model = build_exported(twin, max_position_embeddings=256)
        else:
            model = AutoModelForCausalLM.from_config(stock)
            model.load_state_dict(twin.state_dict())
            model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        made[name] = folder, model.eval()
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Caches of its own, nothing fetched, nothing of ours on the path."""
    cache = str(tmp_path_factory.mktemp("cache"))
    places = ("HF_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")
    fixed = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | fixed | dict.fromkeys(places, cache)


def _start(command: list, log: Path, environment: dict[str, str]) -> subprocess.Popen:
    with log.open("w") as out:
        return subprocess.Popen(
            [*map(str, command)],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _run_engines(folder: Path, environment: dict[str, str], cases: dict, ranks: int) -> list:
    """What in_vllm.py answers on each rank, and what it printed."""
    split = {"tensor_parallel_size": ranks, "distributed_executor_backend": "external_launcher"}
    engine = ENGINE | {"skip_tokenizer_init": True} | split
    cases = {name: case | {"port": _free_port()} for name, case in cases.items()}
    request = {"cases": cases, "prompts": PROMPTS, "tokens": TOKENS, "engine": engine}
    (folder / "request.json").write_text(json.dumps(request))
    place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks)}
    script = ROOT / "tests/checkpoint/exported/in_vllm.py"
    running = [
        _start(
            [Path(VLLM) / "python", script, folder / "request.json", folder / f"{rank}.json"],
            folder / f"{rank}.log",
            environment | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(3600) for process in running]
    finally:
        for process in running:
            _end(process)
        for case in cases.values():  # which vLLM leaves
            for memory in Path("/dev/shm").glob(f"{case['port']}-*cpushm*"):
                memory.unlink()
    logs = [(folder / f"{rank}.log").read_text() for rank in range(ranks)]
    assert codes == [0] * ranks, logs[0][-6000:]
    answers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return list(zip(answers, logs, strict=True))


@pytest.fixture(scope="module")
def alone(models, environment, tmp_path_factory) -> tuple[dict, str]:
    """Every model in an engine on one rank, in bfloat16 too, and one of them compiled."""
    cases = {name: {"folder": str(folder)} for name, (folder, _) in models.items()}
    halves = {f"{name}-bf16": cases[name] | {"engine": {"dtype": "bfloat16"}} for name in HALVES}
    cases |= halves | {"compiled": cases[COMPILED] | {"engine": {"enforce_eager": False}}}
    return _run_engines(tmp_path_factory.mktemp("alone"), environment, cases, 1)[0]


@pytest.fixture(scope="module")
def split(models, environment, tmp_path_factory) -> list[tuple[dict, str]]:
    """Every model in engines of two ranks."""
    cases = {name: {"folder": str(folder)} for name, (folder, _) in models.items()}
    return _run_engines(tmp_path_factory.mktemp("split"), environment | EAGER, cases, 2)


@torch.no_grad()
def _logprobs(model, ids: list[int]) -> torch.Tensor:
    """Of every token but the first, in transformers, float32."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


@torch.no_grad()
def _check(model, prompt: list[int], tokens: list[int], logprobs: list[float]) -> None:
    """The tokens are those that transformers chooses, and the logprobs of all are its own."""
    ids = torch.tensor([[*prompt, *tokens]])
    expected = model(ids).logits[0, :-1].log_softmax(-1)
    assert tokens == expected[len(prompt) - 1 :].argmax(-1).tolist()
    expected = expected.gather(1, ids[0, 1:, None])[-len(logprobs) :, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=TOLERANCE)


def _check_answer(model, answer: dict) -> None:
    for prompt, tokens, logprobs in zip(PROMPTS, answer["tokens"], answer["logprobs"], strict=True):
        assert len(logprobs) == len(prompt) + TOKENS - 1
        _check(model, prompt, tokens, logprobs)
    assert sum(len({*tokens}) for tokens in answer["tokens"]) > 40, "dull text proves nothing"
    assert answer["tokens_again"] == answer["tokens"]
    assert answer["cached"] == [(len(prompt) - 1) // BLOCK * BLOCK for prompt in PROMPTS]


@pytest.mark.parametrize("name", [*CELLS, "compiled"])
def test_engine(name, models, alone):
    """Prompts in chunks and from cached prefixes, beside others in the batch."""
    assert max(map(len, PROMPTS)) > STEP
    _check_answer(models[COMPILED if name == "compiled" else name][1], alone[0][name])


@pytest.mark.parametrize("name", HALVES)
def test_bf16(name, models, alone):
    """As vLLM loads float32 unless it is told: as near to it as transformers in bfloat16 is."""
    folder, model = models[name]
    half = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=True
    )
    answer = alone[0][f"{name}-bf16"]
    ours, theirs = [], []
    for prompt, tokens, logprobs in zip(PROMPTS, answer["tokens"], answer["logprobs"], strict=True):
        expected = _logprobs(model, prompt + tokens)
        ours.append(torch.tensor(logprobs) - expected)
        theirs.append(_logprobs(half, prompt + tokens) - expected)
    assert torch.cat(ours).norm() < 1.2 * torch.cat(theirs).norm()


def test_compiled_code_is_saved(alone):
    """It was not, where decorators hid the method that was compiled."""
    assert "saved AOT compiled function" in alone[1]
    assert "unable to save" not in alone[1]


@pytest.mark.parametrize("name", CELLS)
def test_tensor_parallel(name, models, split):
    """On each of two ranks; what needs all heads together says so."""
    for answers, _ in split:
        if name in SPLIT:
            assert answers[name] == {
                "error": f"{SPLIT[name]} needs all KV heads together; tensor parallelism has "
                "split them. Use one rank."
            }
        else:
            _check_answer(models[name][1], answers[name])


@pytest.fixture(scope="module")
def starter(environment, tmp_path_factory) -> Iterator[Callable[[list], int]]:
    """Starts a server with flags and a log, and gives its process."""
    script = ROOT / "tests/checkpoint/exported/servers_in_vllm.py"
    log = tmp_path_factory.mktemp("starter") / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [Path(VLLM) / "python", script],
            env=environment | EAGER | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):

        def start(flags: list) -> int:
            process.stdin.write(json.dumps([*map(str, flags)]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, log.read_text()[-6000:]
            return int(answer)

        yield start


@pytest.fixture
def server(name, models, starter, tmp_path) -> Iterator[str]:
    """Address of a server that answers. One at a time: they would keep each other waiting."""
    port, log = _free_port(), tmp_path / "log"
    pid = starter(
        [
            *(log, "--model", models[name][0], "--host", "127.0.0.1", "--port", port),
            *("--trust-remote-code", "--enforce-eager", "--dtype", "float32"),
            *("--max-model-len", 128, "--kv-cache-memory-bytes", 2**26),
        ]
    )
    url = f"http://127.0.0.1:{port}"
    process = Path(f"/proc/{pid}")
    try:
        _wait_for(process, url, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)  # it has shared memory to remove
            end = time.monotonic() + 20
            while process.exists() and time.monotonic() < end:
                time.sleep(0.1)
            os.killpg(pid, signal.SIGKILL)


def _wait_for(process: Path, url: str, log: Path) -> None:
    end = time.monotonic() + 900
    while time.monotonic() < end and process.exists():
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer: {log.read_text()[-6000:]}")


def _stream(url: str, prompt: list[int]) -> list[dict]:
    """The events of a completion."""
    asked = {
        "prompt": " ".join(f"t{n}" for n in prompt),
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "logprobs": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as stream:
        lines = [line.decode().removeprefix("data: ").strip() for line in stream]
    assert lines[-2:] == ["[DONE]", ""]
    return [json.loads(line)["choices"][0] for line in lines[:-2] if line]


@pytest.mark.parametrize("name", SERVED)
def test_server_streams(name, models, server):
    """The completions of OpenAI's interface, in an event per token.

    A server that comes late to what its engine has written puts it into one event: on a busy
    machine it may, so it is asked again.
    """
    for _ in range(ATTEMPTS):
        events = _stream(server, PROMPTS[3])
        words = [event["text"].split() for event in events]
        parts = [event["logprobs"]["token_logprobs"] for event in events if event["logprobs"]]
        tokens = [int(word[1:]) for word in chain.from_iterable(words)]
        logprobs = [*chain.from_iterable(parts)]
        assert len(tokens) == len(logprobs) == TOKENS
        _check(models[name][1], PROMPTS[3], tokens, logprobs)
        counts = [len(part) for part in words if part]
        if len(counts) == TOKENS:
            return
    raise AssertionError(f"tokens by event: {counts}")
