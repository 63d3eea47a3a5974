"""The tests that transformers ships, on its Qwen3 and on our classes: a class of tests for each.

test_transformers_suite.py runs it, in a process that finds the shipped files in a package
`transformers_tests`. What they import of files that are not shipped has a stand-in here.
"""

import multiprocessing
import os
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)
from transformers.models.auto import modeling_auto

import tests.architectures  # noqa: F401  # one more in the table
from megatron_satformer.checkpoint.hugging_face.code import model_class
from tests.parallel.layouts import EXPORTED

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def run_rank(rank, ranks, store, function, args):
    """One rank of `start_ranks`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    function(rank, *args)
    torch.distributed.destroy_process_group()


def start_rank_processes(function, args=(), nprocs=1):
    """Calls function(rank, *args) in so many processes, forked: nothing is imported again."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=function, args=(rank, *args)) for rank in range(nprocs)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert not any(rank.exitcode for rank in ranks), [rank.exitcode for rank in ranks]


def run_distributed(world_size):
    """Calls function(rank, *args) with a process group."""

    def of(function):
        def call(*args):
            with tempfile.TemporaryDirectory() as folder:
                store = Path(folder) / "store"
                start_rank_processes(run_rank, (world_size, store, function, args), world_size)

        return call

    return of


NOT_SHIPPED = {
    "exporters": {},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation": {},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils": {},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "tie_word_embeddings": False,
            "problem_type": "regression",
            "bos_token_id": 7,
            "pad_token_id": 8,
            "eos_token_id": 9,
        }
    },
    "distributed_testing_utils": {
        "run_distributed": run_distributed,
        "_start_rank_processes": start_rank_processes,
        "_get_distributed_backend": lambda: "gloo",
        "_get_distributed_device_type": lambda: "cpu",
        "_get_rank_device": lambda rank: torch.device("cpu"),
        "_set_rank_device": lambda rank: None,
    },
}
for name, members in NOT_SHIPPED.items():
    module = ModuleType(f"transformers_tests.{name}")
    vars(module).update(members)
    sys.modules[module.__name__] = module

from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import (  # noqa: E402
    GenerationTesterMixin,
    ModelTesterMixin,
)
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# else they run for the model types that they list, and for longer
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.NUM_STEPS = 4


class Tester:
    """What the tests ask of a model."""

    batch_size = 3
    seq_length = 7
    is_training = True
    num_hidden_layers = SHAPE["num_hidden_layers"]
    num_attention_heads = SHAPE["num_attention_heads"]
    hidden_size = SHAPE["hidden_size"]

    def __init__(self, classes):
        self.config_class, self.base_model_class = classes.config, classes.base
        self.causal_lm_class = classes.causal
        self.sequence_classification_class = classes.sequence

    def get_config(self):
        """Of a small model."""
        return self.config_class(**SHAPE)

    def prepare_config_and_inputs_for_common(self):
        """It, and inputs without padding."""
        ids = torch.randint(3, SHAPE["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class DecoderTests(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    """All that is shipped and concerns a decoder."""

    # they tell a model's age by a line of copyright, which ours have not
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        """Of every test."""
        self.model_tester = Tester(self.classes)
        self.config_tester = ConfigTester(self, config_class=self.classes.config, hidden_size=36)

    def test_config(self):
        """Of test_configuration_common, which has no tests of its own."""
        self.config_tester.run_common_tests()


def find_classes(architecture):
    """Ours, known to the auto classes as transformers knows its own."""
    causal = model_class(architecture)
    config, base = causal.config_class, causal.model_class
    name = causal.build_auto_map()["AutoModelForSequenceClassification"].rpartition(".")[2]
    sequence = getattr(sys.modules[causal.__module__], name)
    AutoConfig.register(config.model_type, config)
    for auto, cls, names in (
        (AutoModel, base, modeling_auto.MODEL_MAPPING_NAMES),
        (AutoModelForCausalLM, causal, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (
            AutoModelForSequenceClassification,
            sequence,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
    ):
        auto.register(config, cls)
        names[config.model_type] = cls.__name__
    return SimpleNamespace(config=config, base=base, causal=causal, sequence=sequence)


QWEN3 = SimpleNamespace(
    config=Qwen3Config,
    base=Qwen3Model,
    causal=Qwen3ForCausalLM,
    sequence=Qwen3ForSequenceClassification,
)
for name, classes in {"qwen3": QWEN3, **{name: find_classes(name) for name in EXPORTED}}.items():
    models = (classes.base, classes.causal, classes.sequence)
    globals()[name] = type(
        name,
        (DecoderTests, unittest.TestCase),
        {"classes": classes, "all_model_classes": models, "__module__": __name__},
    )
