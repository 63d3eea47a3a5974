"""Training from perturbed coefficients: an identity start hides lost and swapped sources."""

import sys

import torch

import pretrain_satformer
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.builder import DecoderModelBuilder

SCALE = 0.1


def train(argv: list[str]) -> None:
    """pretrain_satformer.main() on one rank, from an architecture's own tensors with noise added.

    Those that ride in a larger parameter, as gates do, are random without it.
    """
    build = DecoderModelBuilder.build_model

    def build_perturbed(builder, *args, **kwargs):
        model = build(builder, *args, **kwargs)
        architecture = find_architecture(model.config.architecture)
        own = {tensor.megatron for _, tensor in architecture.all_tensors(model.config)}
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in own:
                    noise = SCALE * torch.randn(parameter.shape, generator=generator)
                    parameter += noise.to(parameter.device)
        return model

    DecoderModelBuilder.build_model = build_perturbed
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()
