"""A test file is named after the file that it is about, and lies in the same place."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Those about more than one file, and what they are about.
WIDER = {
    "checkpoint/convert/test_trained.py": "exports of runs in every layout",
    "checkpoint/exported/test_conventions.py": "exported models as transformers' own",
    "checkpoint/exported/test_tools.py": "exported models under accelerate, PEFT and the like",
    "checkpoint/exported/test_transformers_suite.py": "the tests that transformers ships",
    "checkpoint/exported/test_vllm.py": "exported folders in vLLM, in an environment of its own",
    "checkpoint/megatron/test_from_transformer.py": "--from-transformer through training itself",
    "checkpoint/megatron/test_resharding.py": "checkpoints that move between layouts",
    "checkpoint/test_older_versions.py": "what earlier versions saved",
    "data/preprocess/test_resume.py": "preprocessing killed anywhere",
    "examples/test_fineweb_edu.py": "examples/fineweb_edu/",
    "examples/test_job_scripts.py": "examples/slurm/, with SLURM's commands replaced",
    "examples/test_scripts.py": "examples/pretrain/",
    "examples/test_slurm.py": "examples/slurm/ under a real SLURM",
    "gpu/test_engine.py": "Transformer Engine's spec on a GPU",
    "gpu/test_kernels.py": "Triton's kernels on a GPU",
    "gpu/test_reference.py": "every architecture on a GPU",
    "gpu/test_training.py": "training, saving and exporting on a GPU",
    "model/architectures/test_table.py": "every architecture of the table",
    "model/test_devices.py": "every architecture on devices that are not there",
    "model/test_moe.py": "experts beside every architecture",
    "parallel/test_liveness.py": "how long what is carried lives",
    "parallel/test_matrix.py": "every layout against one rank",
    "parallel/test_moe.py": "experts in every layout",
    "parallel/test_options.py": "Megatron's options that change attention, in layouts",
    "parallel/test_payload.py": "what crosses a boundary",
    "test_imports.py": "the rooms",
    "test_mirror.py": "this",
    "test_training_data.py": "the data of a run, from the command line to the sample",
}
FILES = sorted(path for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_names_what_it_is_about(path):
    place = path.relative_to(ROOT / "tests")
    name = place.name.removeprefix("test_")
    about = [ROOT / "megatron_satformer" / place.parent / name, ROOT / "tools" / name, ROOT / name]
    script = ROOT / "tools" / f"{Path(name).stem}.sh"
    assert any(file.is_file() for file in [*about, script]) != (str(place) in WIDER)
