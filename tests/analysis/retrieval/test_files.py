"""The folder of tools/make_retrieval_data.py: the same for one seed, and what it says it is."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from megatron_satformer.analysis.retrieval.examples import Difficulty
from megatron_satformer.analysis.retrieval.files import Plan, build_retrieval_data
from megatron_satformer.analysis.retrieval.tasks import TASKS
from megatron_satformer.data.datasets.indexed import IndexedFile
from megatron_satformer.data.datasets.verify import verify_dataset
from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.tokenizers.training import train_tokenizer
from tests.texts import source_texts, write_lines

ROOT = Path(__file__).resolve().parents[3]
PLAN = {"lengths": (96, 192), "train": 12, "valid": 5, "test": 7, "train_lengths": (96,)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of tasks by name, and the tokenizer options of each: words, SentencePiece, BPE."""
    folder = tmp_path_factory.mktemp("retrieval")
    texts = source_texts()
    corpus = write_lines(folder / "corpus.jsonl", [{"text": text} for text in texts])
    options: dict[str, TokenizerOptions | None] = {"words": None}
    for kind in ("SentencePieceTokenizer", "HuggingFaceTokenizer"):
        model = train_tokenizer([corpus], folder / kind, 1000, tokenizer_type=kind).model
        options[kind] = TokenizerOptions(kind, str(model))
    return folder, {name: make(folder / f"made-{name}", given) for name, given in options.items()}


def make(save, options, **more):
    how = Difficulty(**more.pop("how", {}))
    plan = Plan(**PLAN | more)
    reads = options is not None and "passkey" in (plan.tasks or TASKS)
    size, texts = 200 if options is None else None, source_texts() if reads else ()
    build_retrieval_data(save, plan, how, options, size, texts, tell=lambda line: None)
    own = TokenizerOptions("HuggingFaceTokenizer", str(save / "tokenizer"))
    return save, options or own


def rows_of(folder, task, length):
    lines = (folder / "lm_eval/data" / f"{task}_{length}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["words", "SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_masks_mark_the_answers_and_nothing_else(made, name):
    folder, options = made[1][name]
    tokenizer = build_tokenizer(options)
    tasks = [task for task in TASKS.values() if name != "words" or task.needs == "words"]
    sets = {path.stem for path in folder.glob("*/*.idx") if "_mask" not in path.stem}
    assert sets == {f"{task.name}_{length}" for task in tasks for length in (96, 192)}
    for task in tasks:
        assert not (folder / "train" / f"{task.name}_192.idx").exists()
        for length in (96, 192):
            prefix = folder / "test" / f"{task.name}_{length}"
            tokens, marks = IndexedFile(prefix), IndexedFile(f"{prefix}_mask")
            verify_dataset(tokens, tokenizer.vocab_size)
            verify_dataset(marks, 2)
            rows = rows_of(folder, task.name, length)
            assert len(tokens) == len(marks) == len(rows) == PLAN["test"]
            for row, ids, marked in zip(rows, tokens, marks, strict=True):
                assert len(ids) == len(marked) == length
                whole = tokenizer.encode("".join(row["parts"]))
                assert ids.tolist() == whole + [tokenizer.eod] * (length - len(whole))
                answers = tokenizer.decode(ids[marked == 1].tolist())
                assert answers.split() == "".join(row["parts"][1::2]).split()
                if task.needs == "words":
                    assert len(whole) > length - 4 or task.name == "mqar"
                    assert marked.sum() == len("".join(row["parts"][1::2]).split())
                assert row["parts"][row["asked"]] in row["parts"][1::2]
    depths = [row["depths"][0] for row in rows_of(folder, "induction", 96)]
    assert depths == [0, 0.25, 0.5, 0.75, 1, 0, 0.25]


def examples_of(folder):
    """Every example by its data set."""
    prefixes = {p.with_suffix("") for p in folder.glob("*/*.idx") if "_mask" not in p.stem}
    return {
        f"{prefix.parent.name}/{prefix.name}": [ids.tobytes() for ids in IndexedFile(prefix)]
        for prefix in sorted(prefixes)
    }


def test_one_seed_one_folder_and_no_example_twice(made, tmp_path):
    folder, _ = made[1]["words"]
    again, _ = make(tmp_path / "again", None)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 2 * 8 + 4 * (2 + 2 + 1) * 4 + 2 + 1
    for file in files:
        if file.suffix != ".yaml":  # which names its folder
            assert (folder / file).read_bytes() == (again / file).read_bytes()
    other = examples_of(make(tmp_path / "other", None, seed=5)[0])
    found = examples_of(folder)
    everything = [one for examples in (*found.values(), *other.values()) for one in examples]
    assert len(set(everything)) == len(everything)
    # Splits keep apart even where few examples are possible: training takes those that are left.
    plan = {"lengths": (8,), "train_lengths": (8,), "tasks": ("selective_copying",)}
    few = {"copies": 1, "copied_words": 4}  # 5 places for one of 4 words
    folder, _ = make(tmp_path / "few", None, **plan, how=few, train=10, valid=5, test=5)
    found = examples_of(folder)
    assert len({one for examples in found.values() for one in examples}) == 20
    with pytest.raises(ValueError, match="must have more different examples"):
        make(tmp_path / "none", None, **plan, how=few, train=11, valid=5, test=5)
    assert not (tmp_path / "none").exists()


def test_real_text_is_not_shared_between_splits(made):
    folder, options = made[1]["SentencePieceTokenizer"]
    tokenizer = build_tokenizer(options)
    text = "\n\n".join(source_texts())
    places = {}
    for split in ("train", "valid", "test"):
        ids = IndexedFile(folder / split / "passkey_96")
        ends = [tokenizer.decode(one.tolist()).partition("\n\nWhat is")[0][-40:] for one in ids]
        places[split] = [text.index(end) / len(text) for end in ends if text.count(end) == 1]
        assert len(places[split]) > 2
    assert max(places["train"]) < 0.8 < min(places["valid"])
    assert max(places["valid"]) < 0.9 < min(places["test"])


def run(monkeypatch, capsys, *flags):
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/make_retrieval_data.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "hide_torch", lambda: None)
    monkeypatch.setattr(sys, "argv", ["make_retrieval_data.py", *map(str, flags)])
    tool.main()
    return capsys.readouterr().out


def test_the_tool_makes_what_the_function_makes(made, tmp_path, monkeypatch, capsys):
    corpus = made[0] / "corpus.jsonl"
    folder, options = made[1]["SentencePieceTokenizer"]
    numbers = [f"--{name}={PLAN[name]}" for name in ("train", "valid", "test")]
    flags = ["--save", tmp_path / "a", "--lengths", 96, 192, "--train-lengths", 96, *numbers]
    model = ["--tokenizer-type", options.tokenizer_type, "--tokenizer-model"]
    flags += [*model, options.tokenizer_model, "--input", corpus]
    told = run(monkeypatch, capsys, *flags)
    assert "retrieval: train/passkey_96, 12 examples" in told
    assert f"{tmp_path / 'a'}: 216 examples in 30 data sets" in told
    assert examples_of(tmp_path / "a") == examples_of(folder)
    report = json.loads((tmp_path / "a/retrieval.json").read_text())
    assert report == json.loads((folder / "retrieval.json").read_text())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "tokenizer_type and vocab_size must be one of the two; neither is given"),
        ("--vocab-size 9", r"vocab_size \(9\) must be more than 16"),
        ("--vocab-size 99 --tokenizer-model x", "tokenizer_model must come with tokenizer_type"),
        ("--vocab-size 99 --tasks passkey", r"tasks \(passkey\) must come with .* and --input"),
        ("--vocab-size 99 --tasks phonebook", r"tasks \(phonebook\) must come with a tokenizer of"),
        ("--vocab-size 99 --input CORPUS", "input must come with the task passkey"),
        ("--tokenizer-type NullTokenizer --vocab-size 99", r"\(NullTokenizer\) must be one of"),
        ("--vocab-size 99 --lengths 7", r"lengths \(7\) must be at least 8"),
        ("--vocab-size 99 --lengths 96 96", r"lengths \(96 96\) must not repeat"),
        ("--vocab-size 99 --depths 101", r"depths \(101\) must be from 0 to 100"),
        ("--vocab-size 99 --test=-1", r"test \(-1\) must be at least 0"),
        ("--vocab-size 99 --copies 0", r"copies \(0\) must be at least 1"),
        ("--vocab-size 99 --save FOLDER", "save .* exists already. Pass --overwrite"),
    ],
)
def test_refused(made, tmp_path, monkeypatch, capsys, flags, words):
    corpus = made[0] / "corpus.jsonl"
    given = flags.replace("CORPUS", str(corpus)).replace("FOLDER", str(made[0])).split()
    with pytest.raises(ValueError, match=words):
        run(monkeypatch, capsys, "--save", tmp_path / "a", *given)
    assert not (tmp_path / "a").exists()


def test_template_tokens_and_tokenizers_that_cut_across_answers(made, tmp_path):
    """A token before each text is part of it; one behind it would stand before an answer."""
    _, options = made[1]["HuggingFaceTokenizer"]
    from tokenizers import Tokenizer

    for name, template in {"before": "<|endoftext|> $A", "behind": "$A <|endoftext|>"}.items():
        model = tmp_path / name
        model.mkdir()
        for file in Path(options.tokenizer_model).iterdir():
            (model / file.name).write_bytes(file.read_bytes())
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        special = [("<|endoftext|>", 0)]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
        tokenizer.save(str(model / "tokenizer.json"))
        given = TokenizerOptions("HuggingFaceTokenizer", str(model))
        if name == "before":
            folder, _ = make(tmp_path / "a", given, tasks=("induction", "passkey"))
            for task in ("induction", "passkey"):
                ids = np.stack([*IndexedFile(folder / "test" / f"{task}_96")])
                assert (ids[:, 0] == 0).all()
        else:
            for task, words in {
                "induction": "none behind a text",
                "passkey": "as its parts",
            }.items():
                with pytest.raises(ValueError, match=words):
                    make(tmp_path / "b", given, tasks=(task,))
