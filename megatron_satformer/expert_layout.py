"""Experts over ranks: what does not divide, or is given without them.

Megatron (0.19.2) says it in words of its own, some of it only in the first step. Must not know:
modules, process groups, architectures.
"""

from argparse import Namespace

from megatron_satformer.fitting import flag, require_multiple

# Options of experts that are numbers, and None where they are not given.
_OF_EXPERTS = (
    *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("moe_router_num_groups", "moe_router_group_topk"),
)


def check_experts(args: Namespace) -> None:
    """Refuses experts that ranks, groups or layers cannot share.

    Args:
        args: as parsed, with the defaults of a size.

    Raises:
        ValueError: naming option, value, what it must fit, and a value that does.
    """
    ranks, experts = args.expert_model_parallel_size, args.num_experts
    if experts is None:
        given = [("expert_model_parallel_size", ranks)] if ranks > 1 else []
        given += [(name, getattr(args, name)) for name in _OF_EXPERTS if getattr(args, name)]
        for name, value in given:
            raise ValueError(
                f"{name} ({value}) must come with num_experts (None). Add --num-experts, or leave "
                f"{flag(name)} out."
            )
        return
    if experts < 1:
        raise ValueError(
            f"num_experts ({experts}) must be at least 1. Use more, or leave --num-experts out."
        )
    require_multiple(args, "num_experts", "expert_model_parallel_size")
    _check_expert_ranks(args)
    _check_router(args)
    _check_layers(args)


def _check_expert_ranks(args: Namespace) -> None:
    tp, etp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    each = etp or tp
    name = "expert_tensor_parallel_size" if etp else "tensor_model_parallel_size"
    sizes = {
        name: each,
        "expert_model_parallel_size": args.expert_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
    }
    total = each * args.expert_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size % total:
        used = [f"{option} ({size})" for option, size in sizes.items() if size > 1]
        raise ValueError(
            f"the number of processes ({args.world_size}) must be a multiple of "
            f"{' times '.join(used)}, that is {total}: so many hold one set of experts. Start "
            f"{total}, or a multiple of it, or use smaller ones."
        )
    own = "moe_ffn_hidden_size" if args.moe_ffn_hidden_size else "ffn_hidden_size"
    for option, by in (
        (own, name),
        ("moe_shared_expert_intermediate_size", "tensor_model_parallel_size"),
    ):
        if getattr(args, option):
            require_multiple(args, option, by)
    if args.add_bias_linear and each > 1:
        raise ValueError(
            f"add_bias_linear (True) must be off with {name} ({each}): experts that are cut have "
            "no bias. Leave --add-bias-linear out, or use --expert-tensor-parallel-size 1."
        )


def _check_router(args: Namespace) -> None:
    experts, topk = args.num_experts, args.moe_router_topk
    if not 1 <= topk <= experts:
        raise ValueError(
            f"moe_router_topk ({topk}) must be from 1 to num_experts ({experts}). Use less, or "
            "more experts."
        )
    plain = args.moe_router_score_function == "softmax" and not args.moe_router_pre_softmax
    if topk == 1 and plain and args.moe_router_load_balancing_type != ["sinkhorn"]:
        raise ValueError(
            "moe_router_topk (1) must come with --moe-router-pre-softmax: the softmax of one score "
            "is 1, and the router would learn nothing. Add it, or choose more experts."
        )
    groups, chosen = args.moe_router_num_groups, args.moe_router_group_topk
    if not groups and not chosen:
        return
    if not groups or not chosen:
        one, other = "moe_router_num_groups", "moe_router_group_topk"
        missing, given = (one, other) if not groups else (other, one)
        raise ValueError(
            f"{given} ({getattr(args, given)}) must come with {missing} (None): a token chooses "
            f"among the experts of so many groups. Add {flag(missing)}, or leave both out."
        )
    require_multiple(args, "num_experts", "moe_router_num_groups")
    if chosen > groups:
        raise ValueError(
            f"moe_router_group_topk ({chosen}) must be at most moe_router_num_groups ({groups}). "
            "Use less, or more groups."
        )
    there = experts // groups * chosen
    if not chosen <= topk <= there:
        raise ValueError(
            f"moe_router_topk ({topk}) must be from {chosen} to {there}: a token's experts are of "
            f"moe_router_group_topk ({chosen}) groups of {experts // groups} experts. Change one "
            "of them."
        )


def _check_layers(args: Namespace) -> None:
    pattern = args.moe_layer_freq
    if isinstance(pattern, list) and len(pattern) != args.num_layers:
        raise ValueError(
            f"moe_layer_freq ({pattern}) must be of num_layers ({args.num_layers}) numbers, 1 for "
            f"a layer of experts and 0 for another; it has {len(pattern)}. Use as many, or N, "
            "for every N-th layer."
        )
