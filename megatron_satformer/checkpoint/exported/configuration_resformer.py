"""Configuration of ResFormer (arXiv 2410.17897) for Hugging Face transformers."""

from .configuration_value_residual import ValueResidualConfig

RESFORMER_FORMS = ("learnable_plus", "learnable", "identity", "sparse", "svformer")


class ResFormerConfig(ValueResidualConfig):
    """ValueResidualConfig with static weights.

    Attributes:
        resformer_form: Where the weights of V_1 and V_n come from, one of `RESFORMER_FORMS`.
        resformer_lambda: Weight of V_1 in the sparse form; None means 5.
    """

    model_type = "resformer"

    architecture: str = "resformer"
    resformer_form: str = "learnable_plus"
    resformer_lambda: float | None = None

    def __post_init__(self, **kwargs):
        if self.resformer_form not in RESFORMER_FORMS:
            raise ValueError(
                f"resformer_form ({self.resformer_form}) must be one of {RESFORMER_FORMS}."
            )
        super().__post_init__(**kwargs)

    @property
    def fixed_lambdas(self) -> tuple[float, float] | None:
        """Weights of V_1 and V_n that nothing learns; None: they are learned."""
        sparse = 5.0 if self.resformer_lambda is None else self.resformer_lambda
        fixed = {"identity": (0.5, 0.5), "sparse": (sparse, 1.0), "svformer": (1.0, 0.0)}
        return fixed.get(self.resformer_form)

    @property
    def lambdas(self) -> str:
        """What the weights are, in a line."""
        if self.fixed_lambdas is not None:
            return "lambda1_n = {}, lambda2_n = {}, fixed".format(*self.fixed_lambdas)
        if self.resformer_form == "learnable":
            return "lambda1_n and lambda2_n are learned scalars"
        return "lambda1_n = lambda_scale * softmax(lambda_logits)_n"


ResFormerConfig.register_for_auto_class()

__all__ = ["ResFormerConfig"]
