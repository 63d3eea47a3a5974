"""Value embeddings: which layers have a table, where it starts, how it learns, what is refused."""

from argparse import Namespace
from fnmatch import fnmatch

import pytest
import torch

from megatron_satformer.model.architectures.value_embeddings import VALUE_EMBEDDINGS, has_table
from tests.models import build_config, build_exported, build_twin

NAME = "value_embeddings"
SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
TWIN = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


@pytest.mark.parametrize(
    ("layers", "tables"), [(1, [1]), (4, [2, 4]), (5, [1, 3, 5]), (11, [1, 3, 5, 7, 9, 11])]
)
def test_every_other_layer_and_the_last(layers, tables):
    config = build_config(NAME, **SHAPE | {"num_layers": layers})
    assert [n for n in range(1, layers + 1) if has_table(config, n)] == tables
    assert f"{len(tables)} of {layers} layers have a table" in config.summary
    found = {n for n, _ in VALUE_EMBEDDINGS.all_tensors(config)}
    assert found == {*tables}


@torch.no_grad()
def test_equation_written_out():
    attention = build_twin(NAME, **TWIN).model.layers[2].self_attn
    x, v = torch.randn(1, 3, 24), torch.randn(1, 3, 2, 6)
    ids = torch.tensor([[5, 60, 5]])
    _, mixed, _, shown = attention.mix(x, v, v, (ids,))
    table, gate = attention.value_embedding.weight, attention.value_embedding_gate.weight
    assert gate.shape == (2, 12)
    for t, token in enumerate(ids[0].tolist()):
        for g in range(2):
            logit = sum(float(gate[g, i] * x[0, t, i]) for i in range(12))
            factor = 3 / (1 + torch.tensor(-logit).exp())
            torch.testing.assert_close(shown[0, t, g], factor)
            wanted = v[0, t, g] + factor * table[token, 6 * g : 6 * g + 6]
            torch.testing.assert_close(mixed[0, t, g], wanted)


def test_tables_learn_as_the_trunk_or_as_published():
    args = Namespace(lr=2e-3, min_lr=2e-4, weight_decay=0.1, value_embedding_rates="trunk")
    assert VALUE_EMBEDDINGS.parameter_groups(args) == {}
    args.value_embedding_rates = "native"
    ((pattern, group),) = VALUE_EMBEDDINGS.parameter_groups(args).items()
    assert group == {
        "wd_mult": pytest.approx(0.1),
        "max_lr": pytest.approx(1e-3),
        "min_lr": pytest.approx(1e-4),
    }
    named = "decoder.layers.1.self_attention.value_embedding"
    assert fnmatch(named, pattern)
    assert not fnmatch(f"{named}_gate", pattern)


def test_random_tables_over_a_transformers_weights_are_told():
    told = build_config(NAME, **SHAPE, from_transformer=True).warning
    assert "value_embedding_init (uniform) with from_transformer (True)" in told
    zero = {"from_transformer": True, "value_embedding_init": "zero"}
    assert build_config(NAME, **SHAPE, **zero).warning is None
    assert build_config(NAME, **SHAPE).warning is None


def test_heads_that_ranks_would_share_are_told():
    with pytest.raises(ValueError, match=r"value embeddings are sharded by KV head. Use TP 1 or 2"):
        build_config(NAME, **SHAPE, num_query_groups=2, tensor_model_parallel_size=4)


def test_embeddings_in_place_of_ids_are_told():
    model = build_exported(build_twin(NAME, **TWIN)).eval()
    with pytest.raises(ValueError, match=r"inputs_embeds \(given\) must not take the place of"):
        model(inputs_embeds=torch.zeros(1, 3, 24))


@torch.no_grad()
def test_new_tokens_have_rows_in_every_table():
    model = build_exported(build_twin(NAME, **TWIN)).eval()
    ids = torch.tensor([[5, 60, 7]])
    before = model(ids).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(model(ids).logits[..., :67], before)
    assert model(torch.tensor([[69]])).logits.shape == (1, 1, 70)


def test_the_card_tells_what_the_tables_hold():
    config = build_exported(build_twin(NAME, **TWIN)).config
    told = VALUE_EMBEDDINGS.layers_note(config)
    assert told == f", of which 2 have a table; all tables hold {2 * 67 * 12:,} parameters"


@pytest.mark.parametrize("ranks", [1, 2])
def test_where_they_start(on_ranks, ranks):
    on_ranks(ranks, "tests.model.tables:start_as_published", ranks)


def test_zero_tables_start_as_a_transformer(on_ranks):
    options = {"architecture": NAME, "value_embedding_init": "zero"}
    on_ranks(1, "tests.model.ranks:starts_as_a_transformer", options)
