"""Megatron's GPTDataset (0.19.2), whose samples say where they are from and whether they are sound.

A file that is cut off while a run reads it would end the process with a bus error, and an id beyond
the vocabulary would be read as another token, or stop the GPU: neither would name a document. A
sample that cannot be trusted is given as tokens 0 that do not count, with the reason.
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np
from megatron.core.datasets import gpt_dataset

from megatron_satformer.data.training.data_paths import read_json

ORIGIN, FAULT = "origin", "fault"


# The name is part of what Megatron finds its cached indices by.
class GPTDataset(gpt_dataset.GPTDataset):
    """Adds to each sample `origin`, its file and documents, and `fault`, "" where there is none."""

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """As Megatron's, with `origin` and `fault`; the loss mask of one with a fault is empty."""
        self._origin = self._fault = ""
        sample = super().__getitem__(idx)
        if self._fault:
            sample["loss_mask"] = sample["loss_mask"] * 0
        return sample | {ORIGIN: self._origin, FAULT: self._fault}

    # GPTDataset's, 0.19.2: the one place that reads tokens.
    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, Any, list[int]]:
        if self.shuffle_index is None:  # opened by the first sample (--dataloader-defer-...)
            super()._query_document_sample_shuffle_indices(0)
        first, last = self._documents(idx)
        self._fault = self._missing_bytes(first, last)
        if not self._fault:
            tokens, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
            self._origin = f"{self.dataset_path}, {_name_documents(documents)}"
            self._fault = self._foreign_tokens(tokens, documents, lengths)
            if not self._fault:
                return tokens, documents, lengths
        documents = np.asarray(self.document_index[first : last + 1])
        self._origin = f"{self.dataset_path}, {_name_documents(documents)}"
        size = self.config.sequence_length + self.config.add_extra_token_to_sequence
        return np.zeros(size, np.int64), documents, [size]

    def _documents(self, idx: int) -> tuple[int, int]:
        """First and last place in `document_index` of a sample's documents."""
        place = int(self.shuffle_index[idx])
        return int(self.sample_index[place][0]), int(self.sample_index[place + 1][0])

    def _missing_bytes(self, first: int, last: int) -> str:
        file = f"{self.dataset_path}.bin"
        try:
            there = os.stat(file).st_size
        except OSError:  # in object storage; or removed, and still there for who has it open
            return ""
        index = self.dataset.index
        for document in self.document_index[first : last + 1]:
            size = int(index.sequence_lengths[document]) * index.dtype_size
            end = int(index.sequence_pointers[document]) + size
            if end > there:
                return (
                    f"{file} has {there:,} bytes, and document {document} ends at {end:,}: it has "
                    "been cut off since the run began"
                )
        return ""

    def _foreign_tokens(self, tokens: Any, documents: Any, lengths: list[int]) -> str:
        entries = self.config.tokenizer.vocab_size
        read = tokens[: sum(lengths)]  # what follows is padding
        if read.max() < entries and read.min() >= 0:
            return ""
        for document, part in zip(documents, _parts(tokens, lengths), strict=True):
            foreign = part[(part < 0) | (part >= entries)]
            if foreign.size:
                return (
                    f"{self.dataset_path}.bin has the token {foreign[0]} in document {document}, "
                    f"and the tokenizer's vocabulary is {entries:,}: the file is damaged, or has "
                    "been replaced since the run began"
                )
        return ""


def _parts(tokens: Any, lengths: list[int]) -> Iterator[Any]:
    begin = 0
    for length in lengths:
        yield tokens[begin : begin + length]
        begin += length


def _name_documents(documents: Any) -> str:
    first, last = documents[0], documents[-1]
    if len(documents) == 1:
        return f"document {first}"
    consecutive = np.array_equal(documents, np.arange(first, first + len(documents)))
    named = f"{first} to {last}" if consecutive else _listed([str(one) for one in documents])
    return f"documents {named}"


def _listed(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def build_dataset_config(
    args: Namespace, tokenizer: Any, blend: Any, blend_per_split: Any
) -> gpt_dataset.GPTDatasetConfig:
    """What Megatron's builder needs to know of a run's data.

    Args:
        args: Megatron's, validated.
        tokenizer: Megatron's.
        blend: prefixes and weights of all splits, as Megatron's get_blend_and_blend_per_split says.
        blend_per_split: the same of each split.
    """
    path = args.per_dataset_sequences_path
    sequences = None if path is None else read_json("per_dataset_sequences_path", path)
    return gpt_dataset.GPTDatasetConfig(
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
        tokenizer=tokenizer,
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
