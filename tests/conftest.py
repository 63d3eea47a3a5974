import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tests.architectures  # noqa: F401  # one more in the table
from megatron_satformer.data.preprocess.main import PreprocessOptions, preprocess
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.tokenizers.training import train_tokenizer
from tests.parallel.matrix_table import (  # noqa: F401
    pytest_addoption,
    pytest_terminal_summary,
)
from tests.small import SHAPE
from tests.texts import source_texts, write_lines

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """What a training run left behind."""

    codes: list[int]
    log: Path
    tensorboard: Path

    @property
    def output(self) -> str:
        """What the ranks printed, in rank order."""
        return "".join(
            Path(f"{self.log}.{rank}").read_text(errors="replace")
            for rank in range(len(self.codes))
        )

    def scalars(self, tag: str) -> dict[int, float]:
        """One TensorBoard curve: step -> value (float32, unrounded)."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.tensorboard), size_guidance={"scalars": 0})
        events.Reload()
        return {event.step: event.value for event in events.Scalars(tag)}

    @property
    def losses(self) -> list[float]:
        """Training loss of every step, nats per token."""
        return list(self.scalars("lm loss").values())

    @property
    def grad_norms(self) -> list[float]:
        """Gradient norm of every step, before clipping."""
        return list(self.scalars("grad-norm").values())


def _free_port() -> int:
    """A port below those that Linux gives to whoever asks for any, as all ranks do."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


class Zygote:
    """Starts ranks without paying for their imports; see zygote.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs = 0
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        errors = (folder / "zygote").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(ROOT / "tests" / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError((folder / "zygote").read_text()[-3000:])

    def run(self, ranks: int, **job: object) -> Run:
        """Run `argv` of pretrain_satformer.py, or `call` "module:function" with `args`."""
        self.jobs += 1
        log = self.folder / f"job{self.jobs}"
        while True:
            port = _free_port()
            request = {"ranks": ranks, "log": str(log), "port": port, **job}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            codes = json.loads(self.process.stdout.readline())
            run = Run(codes, log, self.folder / f"job{self.jobs}.tensorboard")
            # Another process may have taken the port before rank 0 did: then nothing has begun.
            if "EADDRINUSE" not in run.output:
                return run


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("ranks"))
    yield zygote
    zygote.process.stdin.close()
    zygote.process.wait(30)


@pytest.fixture(scope="session")
def on_ranks(zygote: Zygote) -> Callable[..., None]:
    """Calls "module:function" with arguments on so many ranks; fails as they fail."""

    def call(ranks: int, function: str, *args: object) -> None:
        run = zygote.run(ranks, call=function, args=args)
        assert run.codes == [0] * ranks, run.output[-6000:]

    return call


@pytest.fixture(scope="session")
def pretrain(zygote: Zygote) -> Callable[..., Run]:
    """Runs pretrain_satformer.py itself on so many ranks; `code` is what rank 0 must exit with."""

    def run(ranks: int, *flags: object, code: int = 0, board: bool = True) -> Run:
        folder = str(zygote.folder / f"job{zygote.jobs + 1}.tensorboard")
        argv = [*map(str, flags)]
        if code == 0 and board:
            argv += ["--tensorboard-dir", folder, "--tensorboard-log-interval", "1"]
        result = zygote.run(ranks, argv=argv)
        expected = [code] * ranks
        assert result.codes == expected, result.output[-6000:]
        return result

    return run


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Megatron's data flags for a real, tokenized corpus of about 400 documents."""
    folder = tmp_path_factory.mktemp("dataset")
    documents = [part for text in source_texts() for part in text.split("\n\n\n") if part]
    corpus = write_lines(folder / "corpus.jsonl", [{"text": text} for text in documents])
    model = str(train_tokenizer([corpus], folder / "tokenizer", 500).model)
    tokenizer = TokenizerOptions("SentencePieceTokenizer", model)
    preprocess(
        PreprocessOptions((str(corpus),), str(folder / "corpus"), tokenizer, append_eod=True)
    )
    return [
        *("--data-path", str(folder / "corpus_text_document"), "--split", "90,5,5"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model),
        *("--data-cache-path", str(folder / "cache")),
    ]


@pytest.fixture(scope="session")
def started(zygote, pretrain, data_flags, tmp_path_factory) -> Callable[..., tuple[list, Run]]:
    """Starts a model, given by architecture and flags, on one rank, from perturbed coefficients.

    Returns the flags that continue its checkpoint of two steps, and one rank's next five steps.
    """
    made = {}

    def start(architecture: str, model: str = "") -> tuple[list, Run]:
        if (architecture, model) not in made:
            folder = tmp_path_factory.mktemp(architecture)
            flags = [*SHAPE, *data_flags, "--architecture", architecture, *model.split()]
            # Adam's first steps are the sign of each gradient, rounding noise around 0 included,
            # unless eps is above that noise: then layouts differ by the noise and no more.
            flags += ["--adam-eps", 1e-6]
            saving = [*flags, "--train-iters", 2, "--save", folder, "--save-interval", 2]
            run = zygote.run(1, call="tests.perturbed:train", args=[[*map(str, saving)]])
            assert run.codes == [0], run.output[-6000:]
            flags += ["--load", folder, "--finetune", "--no-load-optim", "--no-load-rng"]
            flags += ["--train-iters", 5]
            made[architecture, model] = flags, pretrain(1, *flags)
        return made[architecture, model]

    return start
