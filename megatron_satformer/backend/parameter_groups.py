"""Parameters whose learning rate or weight decay is their own.

Megatron's optimizer takes overrides by parameter (get_megatron_optimizer's config_overrides), but
megatron.training (0.19.2) asks nobody for them: setup_model_and_optimizer takes those that its own
get_megatron_optimizer_config gives it, by that name. Wrapping it is the narrowest way in. The
scheduler, the checkpoint and a resume know overrides as they are.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.optimizer import OptimizerConfig, ParamKey
from megatron.training import training

Groups = Mapping[str, Mapping[str, float]]
_plain = training.get_megatron_optimizer_config


def activate(groups: Callable[[Namespace], Groups]) -> None:
    """Let the optimizer treat parameters as `groups` says; a second call replaces the first.

    Args:
        groups: parsed arguments -> patterns of names, and what Megatron's ParamGroupOverride says
            of the parameters that have one: max_lr, min_lr, wd_mult and so on.
    """

    def get_config(args: Namespace) -> tuple[OptimizerConfig, dict[ParamKey, Any]]:
        config, overrides = _plain(args)
        own = {ParamKey(name=pattern): dict(values) for pattern, values in groups(args).items()}
        return config, overrides | own

    training.get_megatron_optimizer_config = get_config
