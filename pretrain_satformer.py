"""Pretrain a cross-layer-access transformer, or a plain one, with Megatron-core.

    torchrun --nproc_per_node N pretrain_satformer.py --architecture satformer <Megatron flags>

The five names of Megatron-LM's pretrain_gpt.py are here: get_batch, loss_func, forward_step,
train_valid_test_datasets_provider, and the model builder (build_model_config).
"""

import time

_PROGRAM_START_TIME = time.time()  # before the heavy imports: Megatron reports start-up times

import json
import warnings
from functools import cache, partial
from typing import Any

# Megatron tells a dozen times per rank what is not installed; the report at start says it once.
warnings.filterwarnings("ignore", "(?i).*(apex|transformer.engine)", UserWarning)

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import (
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
)
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import (
    get_args,
    get_timers,
    get_tokenizer,
    pretrain,
    print_rank_0,
    set_startup_timestamps,
)
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import _initialize_distributed
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_satformer import arguments, metrics, refusals, required, stopping
from megatron_satformer.backend import parameter_groups, schedule
from megatron_satformer.backend.device import choose_device
from megatron_satformer.checkpoint.hugging_face.tokenizer_source import own_tokenizer_options
from megatron_satformer.checkpoint.megatron import saving
from megatron_satformer.checkpoint.megatron.recovery import recover
from megatron_satformer.checkpoint.megatron.resume import check_resume, hand_on
from megatron_satformer.checkpoint.megatron.room import check_room
from megatron_satformer.checkpoint.megatron.source import starts_from_transformer
from megatron_satformer.checkpoint.megatron.training_data import describe_data
from megatron_satformer.cli import usage_errors
from megatron_satformer.data.tokenizers.exportable import export_warning
from megatron_satformer.data.training import index_cache, preflight
from megatron_satformer.data.training.samples import planned_samples
from megatron_satformer.files.run_lock import claim
from megatron_satformer.layout import check_layout
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.builder import DecoderModelConfig, build_layer_spec
from megatron_satformer.model.packing import is_one_stream, pack_documents
from megatron_satformer.parallel.carry import check_ranks_hold_something
from megatron_satformer.parallel.p2p import CarryP2PCommunicator
from megatron_satformer.parallel.stages import finish_chunks
from megatron_satformer.report import describe_run

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
PACKED_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
OTHER_KEYS = ("local_cp_size", "hybrid_cp_group")
SPIKE = 10.0  # times the largest loss seen


def get_batch(data_iterator: Any, vp_stage: int | None = None) -> dict[str, Any]:
    """One micro-batch on this rank.

    Args:
        data_iterator: yields the dataset's dicts on tensor-parallel rank 0.
        vp_stage: virtual pipeline stage.

    Returns:
        tokens, labels, loss_mask, position_ids, each [b, s/cp]; attention_mask [b, 1, s, s] or
        None; cu_seqlens, cu_seqlens_padded, max_seqlen of packed documents or None. A stage that
        needs none of it gets None throughout. Transformer Engine packs a micro-batch into one
        sample, b = 1.
    """
    args = get_args()
    keys = BATCH_KEYS + PACKED_KEYS + OTHER_KEYS
    packed = args.dataloader_inter_document_masking
    if not is_first_or_last_pipeline_stage(vp_stage) and not packed:
        return dict.fromkeys(keys)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {
            key: None if sample.get(key) is None else sample[key].cuda(non_blocking=True)
            for key in keys
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    if is_one_stream(args):
        batch = flatten_batch_for_packed_sequences(batch)
    if is_first_or_last_pipeline_stage(vp_stage):
        batch = get_batch_on_this_cp_rank(
            batch,
            is_hybrid_cp=False,
            cp_group=mpu.get_context_parallel_group(),
            use_per_sequence_balancing=packed,
        )
    return {key: batch.get(key) for key in keys}


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses of one micro-batch.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        output_tensor: [b, s] cross entropies, nats.

    Returns:
        The summed loss, the number of tokens, and what is logged: [sum, tokens] under "lm loss".
    """
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for rejected, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"found {what} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    logged = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    if args.context_parallel_size > 1 and not args.calculate_per_token_loss:
        # The schedules (0.19.2) divide by this rank's tokens and take the mean over ranks: where a
        # loss mask leaves them unequal, a token must weigh as in the whole sample.
        everywhere = num_tokens.float()
        torch.distributed.all_reduce(everywhere, group=mpu.get_context_parallel_group())
        loss = loss * (args.context_parallel_size * num_tokens / everywhere.clamp(min=1))
    return loss, num_tokens, {"lm loss": logged}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Any, Any]:
    """One forward pass of one pipeline chunk.

    Args:
        data_iterator: see get_batch.
        model: the chunk, as Megatron wrapped it.

    Returns:
        The chunk's output and the loss function that the last stage applies to it.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=_packed_seq_params(batch),
    )
    return output, partial(loss_func, batch["loss_mask"])


def _packed_seq_params(batch: dict[str, Any]) -> PackedSeqParams | None:
    """What attention needs to keep packed documents apart."""
    if batch["cu_seqlens"] is None:
        return None
    packed = pack_documents(batch, get_args())
    update_seqlen_stats_from_cu_seqlens(packed.cu_seqlens_q)
    return packed


def train_valid_test_datasets_provider(
    train_val_test_num_samples: list[int], vp_stage: int | None = None
) -> list[Any]:
    """Build the three datasets.

    Args:
        train_val_test_num_samples: samples wanted of each.
        vp_stage: virtual pipeline stage.
    """
    args = get_args()
    if args.rank == 0:
        with usage_errors():
            prepare_data(tuple(train_val_test_num_samples))  # done already, as a rule
    print_rank_0("> building train, validation, and test datasets ...")
    datasets = _build_datasets(
        args, train_val_test_num_samples, partial(_reads_data, vp_stage), _dataset_config(args)
    )
    print_rank_0("> finished creating datasets ...")
    return datasets


# Megatron's sign that datasets are built on every rank that reads data.
setattr(train_valid_test_datasets_provider, "is_distributed", True)  # noqa: B010


def choose_provider(plan: schedule.Continuation | None) -> Any:
    """The provider of a run that begins, or of one that goes on.

    Args:
        plan: How it goes on. Megatron asks for its steps times today's batch, and another number
            of samples is another order of the data.
    """
    if plan is None or get_args().phase_transition_iterations:
        return train_valid_test_datasets_provider

    def provide(samples: list[int], vp_stage: int | None = None) -> list[Any]:
        return train_valid_test_datasets_provider([plan.end, *samples[1:]], vp_stage)

    setattr(provide, "is_distributed", True)  # noqa: B010
    return provide


def _build_datasets(args: Any, samples: Any, reads: Any, config: GPTDatasetConfig) -> list[Any]:
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, reads, config).build()


def _reads_data(vp_stage: int | None) -> bool:
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    packed = get_args().dataloader_inter_document_masking
    return packed or is_first_or_last_pipeline_stage(vp_stage)


def _dataset_config(args: Any) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences = json.load(file)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=sequences,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def build_model_config(args: Any) -> DecoderModelConfig:
    """The model that the arguments describe; its `builder` builds it."""
    config = core_transformer_config_from_args(args, find_architecture(args.architecture).config)
    if starts_from_transformer(args):
        config.expect_transformer(True)
    model = gpt_config_from_args(args, config, DecoderModelConfig)
    model.transformer_layer_spec = build_layer_spec
    model.pre_wrap_hooks = [*model.pre_wrap_hooks, finish_chunks]
    return model


@cache
def check_data() -> preflight.DataSummary:
    """Look at every data file before any work starts; see data.preflight."""
    args = get_args()
    return preflight.check_data_options(vars(args), get_tokenizer().vocab_size)


@cache
def prepare_data(samples: tuple[int | None, ...]) -> None:
    """Check that the data serve the samples, and have every index of them whole on disk.

    Args:
        samples: wanted of train, valid and test.
    """
    args = get_args()
    if args.mock_data:
        cached = args.data_cache_path is not None
    else:
        print(*preflight.describe_data(check_data(), samples, vars(args)), sep="\n", flush=True)
        cached = not check_data().unseen
    if not cached:
        return
    with index_cache.muted_logging():
        planned = _build_datasets(
            args, samples, lambda: True, index_cache.plan_config(_dataset_config(args))
        )
        sets = index_cache.find_index_sets(planned, args.data_cache_path)
        index_cache.prepare_index_sets(sets, args.num_dataset_builder_threads)


def configure() -> tuple[Any, DecoderModelConfig, tuple[schedule.Continuation | None, dict]]:
    """Arguments and model, checked; nothing distributed exists yet.

    Returns:
        Both, and what rank 0 alone knows: how a run goes on, and what it has noted in its args.

    Raises:
        SystemExit: code 2 after one printed line, for anything the user can mend.
    """
    plan, noted = None, {}
    with usage_errors():
        preview = arguments.preview_arguments()
        required.check_required(preview)
        cuda = choose_device(preview.device)
        refusals.check_arguments(preview, cuda)
        check_layout(preview)
        if preview.rank == 0 and not preview.skip_train:
            claim(preview.save)
        recover(preview)  # before anything reads what --load holds
        defaults = arguments.resolve_defaults(preview, cuda)
        metrics.hold_arguments()
        args = arguments.finish_arguments(
            parse_and_validate_args(partial(arguments.add_arguments, defaults=defaults))
        )
        stopping.activate(args)
        if args.use_checkpoint_args:
            refusals.check_model(args, cuda)  # now that the checkpoint has spoken
        model = build_model_config(args)
        refusals.check_carry(model.transformer)
        check_ranks_hold_something(model.transformer)
        if args.rank == 0:
            given = set(vars(args))
            data = describe_data(args, None if args.mock_data else check_data())
            resumed = check_resume(args, data)
            plan = resumed.plan
            hand_on(args, resumed.args, get_tokenizer().vocab_size)
            check_room(args, model.transformer)
            noted = {name: value for name, value in vars(args).items() if name not in given}
            samples = planned_samples(vars(args))
            if samples is not None:
                prepare_data(samples if plan is None else (plan.end, *samples[1:]))
            report = describe_run(args, model.transformer, cuda, args.padded_vocab_size)
            print(metrics.tell_arguments(args), report, sep="\n", flush=True)
            for warning in (
                model.transformer.warning,
                export_warning(own_tokenizer_options(args)),
            ):
                if warning:
                    print(f"WARNING: {warning}", flush=True)
    model.pre_wrap_hooks = [*model.pre_wrap_hooks, *metrics.activate(args, cuda)]
    return args, model, (plan, noted)


def main() -> None:
    """Parse, check, build, train."""
    set_startup_timestamps(program_start=_PROGRAM_START_TIME, main_entry=time.time())
    args, model, begun = configure()
    # pretrain() would itself build the process groups, which a plan and a communicator need before;
    # this function of Megatron's (0.19.2) does just that and is skipped when done.
    _initialize_distributed(None, None, None)
    plan, noted = schedule.share(begun)
    vars(args).update(noted)  # which every rank's part of a checkpoint has
    if plan is not None:
        schedule.activate(plan, args)
    container = pretrain_cfg_container_from_args(args, model)
    communication = {}
    if args.pipeline_model_parallel_size > 1:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        # As Megatron's evaluate (0.19.2) counts its micro-batches.
        at_once = args.eval_micro_batch_size * args.data_parallel_size * args.gtp_weight_remat_size
        evaluated = args.eval_global_batch_size // at_once
        communicator = CarryP2PCommunicator(
            groups.pp, model.transformer, evaluated, is_one_stream(args)
        )
        communication = {"p2p_communicator": communicator, "pg_collection": groups}
    saving.activate(args, usage_errors)
    parameter_groups.activate(find_architecture(args.architecture).parameter_groups)
    kind = ModelType.encoder_or_decoder
    pretrain(container, choose_provider(plan), kind, forward_step, **communication)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # Megatron's first save starts a helper process by spawn, which would import this script again,
    # on every rank (8 s, 560 MB), had it a file.
    del __file__
    record(main)()  # torchrun's summary shows why a rank has failed
