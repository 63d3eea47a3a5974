"""GPUs as their vendors' data sheets have them. Must not know: models."""

from dataclasses import dataclass

from megatron_satformer.benchmark.utilization import peak_flops

GB = 10**9


@dataclass(frozen=True)
class GPU:
    """What a plan has to know of a GPU.

    Attributes:
        name: as `benchmark.utilization` has it.
        memory: GB.
        reads: bytes per second, from its own memory and to it.
        inside: bytes per second, one way, between two of one node.
        outside: bytes per second, one way, to another node.
        per_node: how many there are in one.
    """

    name: str
    memory: float
    reads: float
    inside: float
    outside: float = 50e9  # a network card of 400 Gbit/s for each
    per_node: int = 8

    @property
    def flops(self) -> float:
        """Dense bf16 FLOP/s."""
        found = peak_flops(self.name)
        assert found is not None, self.name
        return found

    def bandwidth(self, ranks: int) -> float:
        """Bytes per second, one way, between so many ranks that lie next to each other."""
        return self.inside if ranks <= self.per_node else self.outside


GPUS = {
    "h100": GPU("H100", 80, 3.35e12, 450e9),
    "h200": GPU("H200", 141, 4.8e12, 450e9),
    "b200": GPU("B200", 180, 8e12, 900e9),
    "a100": GPU("A100", 80, 2.0e12, 300e9, 25e9),
}


def find_gpu(name: str) -> GPU:
    """A GPU by the name that --gpu takes.

    Raises:
        ValueError: it is not known.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"gpu ({name}) must be one of {', '.join(GPUS)}. Use the nearest.")
    return GPUS[name.lower()]
