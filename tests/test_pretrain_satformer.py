"""pretrain_satformer.py itself, on gloo ranks, on real text: layouts, resume, bad input."""

import pytest

SHAPE = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
--lr 3e-3 --min-lr 3e-4 --log-interval 1 --eval-iters 1 --eval-interval 100 --num-workers 0
--init-method-std 0.05""".split()
RTOL = 1e-5  # fp32, same weights and data: only the order of additions differs
PP2, TP2 = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2"
SP, DO = "--sequence-parallel", "--use-distributed-optimizer"
LAYOUTS = {
    "PP2": (2, PP2),
    "PP2, uneven": (2, f"{PP2} --decoder-first-pipeline-num-layers 3"),
    "TP2": (2, TP2),
    "TP2+SP": (2, f"{TP2} {SP}"),
    "PP2 x 2 virtual": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "DP2, distributed optimizer": (2, f"{DO} --overlap-grad-reduce --overlap-param-gather"),
    "TP2 x PP2 + SP": (4, f"{TP2} {PP2} {SP}"),
    "PP2, full recompute": (
        2,
        f"{PP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}


@pytest.fixture(scope="session")
def started(pretrain, data_flags, tmp_path_factory):
    """Architecture -> a checkpoint of one rank after two steps, and one rank's next five steps."""
    made = {}

    def start(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            flags = [*SHAPE, *data_flags, "--architecture", architecture]
            pretrain(1, *flags, "--train-iters", 2, "--save", folder, "--save-interval", 2)
            flags += ["--load", folder, "--finetune", "--no-load-optim", "--no-load-rng"]
            flags += ["--train-iters", "5"]
            made[architecture] = flags, pretrain(1, *flags)
        return made[architecture]

    return start


@pytest.mark.parametrize("architecture", ["satformer", "resformer", "transformer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(started, pretrain, architecture, layout):
    flags, one = started(architecture)
    ranks, extra = LAYOUTS[layout]
    run = pretrain(ranks, *flags, *extra.split())
    assert len(run.losses) == 5
    assert run.losses == pytest.approx(one.losses, rel=RTOL)
    assert run.grad_norms == pytest.approx(one.grad_norms, rel=RTOL)


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(1, ""), (2, f"{PP2} --bf16"), (2, DO), (2, f"{PP2} --attention-dropout 0.1")],
    ids=str,
)
def test_resume_continues_to_the_last_digit(pretrain, data_flags, tmp_path, ranks, extra):
    flags = [*SHAPE, *data_flags, *extra.split(), "--train-iters", 20]
    straight = pretrain(ranks, *flags)
    saving = [*flags, "--save", tmp_path, "--save-interval", 10]
    first = pretrain(ranks, *saving, "--exit-interval", 10)
    second = pretrain(ranks, *saving, "--load", tmp_path)
    assert first.losses + second.losses == straight.losses
    assert first.grad_norms + second.grad_norms == straight.grad_norms


def test_bf16_follows_fp32(started, pretrain):
    flags, one = started("satformer")
    run = pretrain(2, *flags, *PP2.split(), "--bf16")
    assert run.losses == pytest.approx(one.losses, rel=2e-2)


def test_report_and_validation(pretrain, data_flags):
    flags = [*SHAPE, *data_flags, *PP2.split(), "--train-iters", 2, "--eval-interval", 1]
    run = pretrain(2, *flags)
    assert "parameters: 198,080 = 32,768 embeddings + 164,544 layers + 768 value" in run.output
    assert "satformer, 3 of 4 layers mix V1, relu gate" in run.output
    assert "128 elements per row instead of 64 (2.00x)" in run.output
    assert set(run.scalars("lm loss validation")) == {1, 2}


@pytest.mark.parametrize(
    "flags",
    [
        "--attention-backend local",
        "--squared-relu --normalization LayerNorm --add-bias-linear",
        "--no-swiglu --no-qk-layernorm --untie-embeddings-and-output-weights",
        "--reset-attention-mask --reset-position-ids --eod-mask-loss",
        "--position-embedding-type learned_absolute --scaled-output-init",
        "--group-query-attention --num-query-groups 2 --add-qkv-bias --value-gate-bias",
        "--attention-dropout 0.1 --hidden-dropout 0.1 --calculate-per-token-loss",
        "--recompute-granularity selective --rotary-percent 0.5 --rotary-base 50000",
        "--architecture transformer --num-experts 4 --moe-router-topk 2",
        "--optimizer sgd --clip-grad 0.5 --weight-decay 0.0 --lr-decay-style linear",
        "--fp16 --initial-loss-scale 1024",
    ],
)
def test_megatrons_flags_keep_working(pretrain, data_flags, flags):
    run = pretrain(1, *SHAPE, *data_flags, "--train-iters", 3, *flags.split())
    assert len(run.losses) == 3
    assert all(0 < loss < 10 for loss in run.losses)


def test_explicit_flag_wins_over_the_familys_default(pretrain, data_flags):
    run = pretrain(
        1,
        *[*SHAPE, *data_flags, "--train-iters", 1, "--norm-epsilon", 1e-3],
        *["--weight-decay", 0.01, "--adam-beta2", 0.99, "--hidden-dropout", 0.1],
    )
    dump = [line.split() for line in run.output.splitlines() if " ....." in line]
    told = {words[0]: words[-1] for words in dump}
    assert told["layernorm_epsilon"] == "0.001"
    assert told["weight_decay"] == "0.01"
    assert told["adam_beta2"] == "0.99"
    assert told["hidden_dropout"] == "0.1"
    assert told["normalization"] == "RMSNorm"  # not given: the family's


def test_help_has_our_flags_in_one_group(pretrain):
    shown = pretrain(1, "--help", code=0, board=False).output
    group = shown[shown.index("\nsatformer:") :]
    assert "\n\n" not in group[group.index("--architecture") :].rstrip()  # one group, the last
    for flag in (
        *("--architecture", "--value-gate", "--value-gate-bias", "--value-gate-init-std"),
        *("--value-residual-last-k", "--scaled-output-init", "--device", "--no-swiglu"),
    ):
        assert flag in group


BAD_FLAGS = {
    "--num-query-groups 6": "num_query_groups (6) must come with --group-query-attention",
    "--value-gate cube": "argument --value-gate: invalid choice: 'cube'",
    "--value-residual-last-k 4": "value_residual_last_k (4) must be at least 1 and less than",
    "--architecture resformer --value-gate tanh": "value_gate (tanh) must not be given with",
    "--context-parallel-size 2": "context_parallel_size (2) needs Transformer Engine",
    "--transformer-impl transformer_engine": "Install it (pip install",
    "--fp8-format hybrid": "fp8_format (hybrid) needs Transformer Engine",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
    "--spec a b": "spec (a b) must not be given: --architecture (satformer) chooses",
    "--multi-latent-attention": "multi_latent_attention (True) is not supported",
    "--num-experts 4": "num_experts (4) is not supported",
    "--device cuda": "device (cuda) must be available",
    "--tokenizer-model /nowhere.model": "tokenizer_model (/nowhere.model) must be an existing file",
    "--data-path /nowhere": "data_path (/nowhere) must be a complete data set",
    "--split 100,0.001,0": "or another --split (weight 0 turns valid off)",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_input_is_one_clear_line(pretrain, data_flags, flags):
    run = pretrain(1, *SHAPE, "--train-iters", 1, *data_flags, *flags.split(), code=2)
    told = [line for line in run.output.splitlines() if "error: " in line]
    assert len(told) == 1, run.output[-3000:]
    assert BAD_FLAGS[flags] in told[0]
    assert "Traceback" not in run.output


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--architecture resformer", "architecture (resformer) must be that of the checkpoint"),
        ("--value-gate tanh", "value_gate (tanh) must be that of the checkpoint in load"),
        ("--value-residual-last-k 2", "value_residual_last_k (2) must be that of the checkpoint"),
    ],
)
def test_a_checkpoint_is_not_continued_as_another_model(started, pretrain, flags, told):
    common, _ = started("satformer")
    resumed = [flag for flag in common if flag != "--finetune"]
    run = pretrain(1, *resumed, *flags.split(), code=2)
    assert told in run.output
    assert "which is (" in run.output


def test_too_few_groups_for_tensor_parallelism(pretrain, data_flags):
    flags = "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2"
    run = pretrain(1, *SHAPE, "--train-iters", 1, *data_flags, *flags.split(), code=2)
    assert (
        "num_query_groups (2) must be a multiple of tensor_model_parallel_size (4): V1 is sharded "
        "by KV head. Use TP 1 or 2." in run.output
    )


def test_only_rank_0_speaks(pretrain, data_flags):
    flags = [*SHAPE, "--train-iters", 1, *data_flags, *PP2.split(), "--value-gate", "cube"]
    run = pretrain(2, *flags, code=2)
    assert run.output.count("invalid choice") == 1
