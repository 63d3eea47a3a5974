"""GPTDataset with a loss mask that is read from disk; see loss_masks."""

import copy
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_satformer.data.training.gpt_dataset import GPTDataset
from megatron_satformer.data.training.loss_masks import has_mask, mask_prefix


class MaskedGPTDataset(GPTDataset):
    """GPTDataset whose loss counts the marked tokens alone, where its data set has a mask.

    Samples, their order and everything else are GPTDataset's.
    """

    # MegatronDataset.__init__, 0.19.2, also writes the description that names the index cache;
    # whether there is a mask changes no index.
    def __init__(self, indexed_dataset: Any, dataset_path: str | None, *rest: Any) -> None:
        super().__init__(indexed_dataset, dataset_path, *rest)
        self.mask: IndexedDataset | None = None
        if dataset_path is not None and has_mask(dataset_path):
            self.mask = IndexedDataset(
                mask_prefix(dataset_path), multimodal=False, mmap=self.config.mmap_bin_files
            )

    # GPTDataset.__getitem__, 0.19.2: its loss mask knows padding and the end of documents alone.
    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """One sample; "loss_mask" [s] is 1 where the label is a marked token."""
        sample = super().__getitem__(idx)
        if self.mask is not None:
            twin = copy.copy(self)  # the same indices, over the other file
            twin.dataset = self.mask
            read = super(GPTDataset, twin)._query_document_sample_shuffle_indices  # Megatron's
            marks, _, _ = read(0 if idx is None else idx)
            marked = torch.from_numpy(marks[1:] == 1)
            sample["loss_mask"] = sample["loss_mask"] * marked  # not in place: it may be a cache
        return sample
