"""What the tests of this folder run on, and for what."""

import torch

from megatron_satformer.model.architectures import TABLE
from tests.parallel.layouts import CARRYING

GPU = torch.cuda.is_available()
# On a CPU other tests have them all, in more layouts: here it is enough that every line has run.
ARCHITECTURES = tuple(TABLE) if GPU else CARRYING[:2]
