"""An architecture that the package does not know, put into its table as another package would."""

from megatron_satformer.model.architectures import TABLE

TABLE["meanformer"] = "tests.architectures.meanformer:MEANFORMER"
