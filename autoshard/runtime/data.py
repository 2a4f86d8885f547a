"""Which samples a rank trains on, and the checks of what a user passes as a batch.

The global batch lies along dim 0 of every per-sample tensor: data-parallel rank ``r`` of ``n``
takes the ``r``-th of ``n`` equal runs of samples, and micro-batches are equal runs of those. All
ranks of one data-parallel coordinate (its stages and tensor-parallel ranks) take the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from autoshard.errors import OptionError
from autoshard.ir import Value

Batch = dict[str, Tensor]


def named_batch(batch: object, values: Sequence[Value]) -> Batch:
    """A batch as a dict in the order of ``values``.

    Args:
        batch: a mapping by input name, or a sequence in the order of the model's inputs.

    Raises:
        OptionError: if tensors are missing, or there are others than the model was captured with.
    """
    names = [v.name for v in values]
    if isinstance(batch, Mapping):
        given: dict[str, Any] = {str(k): v for k, v in batch.items() if v is not None}
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        if len(batch) != len(names):
            raise OptionError(
                f"expected a batch of {len(names)} tensors ({', '.join(names)}) but got "
                f"{len(batch)}; pass one tensor for each input"
            )
        given = dict(zip(names, batch, strict=True))
    else:
        raise OptionError(
            f"expected a batch as a dict of tensors but got {type(batch).__name__}; "
            f"pass {{{', '.join(f'{n!r}: ...' for n in names)}}}"
        )
    missing = [n for n in names if n not in given]
    extra = [n for n in given if n not in names]
    if missing or extra:
        raise OptionError(
            f"expected a batch with the keys {', '.join(names)} but got {', '.join(given)}"
            + (f"; add {', '.join(missing)}" if missing else "")
            + (f"; remove {', '.join(extra)} or compile with it as an example" if extra else "")
        )
    for name in names:
        if not isinstance(given[name], Tensor):
            raise OptionError(
                f"expected batch[{name!r}] to be a tensor but got "
                f"{type(given[name]).__name__}; convert it with torch.as_tensor"
            )
    return {name: given[name] for name in names}


def check_batch(batch: Mapping[str, Tensor], values: Sequence[Value], parts: int) -> None:
    """Every tensor has the dtype and shape it was captured with, dim 0 divided by ``parts``.

    Raises:
        OptionError: names the tensor, what was expected and what was given.
    """
    for value in values:
        tensor = batch[value.name]
        shape = list(value.type.shape)
        if value.type.per_sample and shape:
            shape[0] //= parts
        if list(tensor.shape) != shape:
            hint = "compile with such an example, or change the batch"
            if value.type.per_sample and list(tensor.shape[1:]) == shape[1:]:
                given = f"{tensor.shape[0]} samples"
                hint = f"pass {shape[0]} samples"
                if parts > 1:
                    hint += " (this rank's part of the global batch: see local_batch and sampler)"
                raise OptionError(
                    f"expected batch[{value.name!r}] to have {shape[0]} samples but got {given}; "
                    f"{hint}"
                )
            raise OptionError(
                f"expected batch[{value.name!r}] of shape {tuple(shape)} but got "
                f"{tuple(tensor.shape)}; {hint}"
            )
        if tensor.dtype != value.type.dtype:
            raise OptionError(
                f"expected batch[{value.name!r}] of dtype {value.type.dtype} but got "
                f"{tensor.dtype}; convert it with .to({value.type.dtype})"
            )


def local_batch(batch: object, values: Sequence[Value], *, rank: int, size: int) -> Batch:
    """What data-parallel rank ``rank`` of ``size`` trains on of a global batch.

    Args:
        values: the batch tensors that the model was captured with, at the global batch size.

    Returns:
        The ``rank``-th of ``size`` equal runs along dim 0 of per-sample tensors, others whole.

    Raises:
        OptionError: if the batch is not of the captured keys, shapes and dtypes.
    """
    named = named_batch(batch, values)
    check_batch(named, values, 1)
    return {
        v.name: run_of(named[v.name], rank, size) if v.type.per_sample else named[v.name]
        for v in values
    }


def micro_batches(local: Mapping[str, Tensor], values: Sequence[Value], count: int) -> list[Batch]:
    """``count`` equal runs of a local batch; tensors that are not per sample are whole in each."""
    return [
        {
            v.name: run_of(local[v.name], index, count) if v.type.per_sample else local[v.name]
            for v in values
        }
        for index in range(count)
    ]


def run_of(tensor: Tensor, index: int, count: int) -> Tensor:
    """The ``index``-th of ``count`` equal runs along dim 0."""
    length = tensor.shape[0] // count
    return tensor[index * length : (index + 1) * length]


class GlobalBatchSampler(Sampler[int]):
    """Indices for one data-parallel rank, such that step ``k`` of all ranks is global batch ``k``.

    Give it to a ``DataLoader`` whose batch size is :attr:`local_batch_size`. The order depends on
    the seed and the epoch only, never on the number of ranks, so a run may go on with another
    plan. Samples at the end that do not fill a global batch are left out.

    Args:
        dataset: anything with a length.
        rank, size: this rank's data-parallel coordinate and their number.

    Raises:
        OptionError: if the dataset is smaller than one global batch, or that does not divide.
    """

    def __init__(
        self,
        dataset: Sized,
        global_batch_size: int,
        *,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self._length = len(dataset)
        if global_batch_size < 1 or global_batch_size % size:
            raise OptionError(
                f"expected a global batch that {size} data-parallel ranks can share but got "
                f"{global_batch_size} samples; choose a multiple of {size}"
            )
        if self._length < global_batch_size:
            raise OptionError(
                f"expected a dataset of at least one global batch ({global_batch_size} samples) "
                f"but got {self._length}; use more data or a smaller global_batch_size"
            )
        self._global_batch_size = global_batch_size
        self._rank = rank
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._step = 0

    @property
    def local_batch_size(self) -> int:
        """Samples per step on this rank."""
        return self._global_batch_size // self._size

    @property
    def steps_per_epoch(self) -> int:
        return self._length // self._global_batch_size

    def __len__(self) -> int:
        """Samples that this rank still gets in this epoch."""
        return (self.steps_per_epoch - self._step) * self.local_batch_size

    def __iter__(self) -> Iterator[int]:
        """This rank's indices from the current step to the end of the epoch.

        Iterating does not move the position: the sampler of a ``DataLoader`` runs ahead of
        training. Say :meth:`set_epoch` or :meth:`resume_at` to move it.
        """
        order = list(range(self._length))
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
            order = torch.randperm(self._length, generator=generator).tolist()
        local = self.local_batch_size
        for step in range(self._step, self.steps_per_epoch):
            first = step * self._global_batch_size + self._rank * local
            yield from order[first : first + local]

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch: another order, the same on every rank."""
        self._epoch, self._step = epoch, 0

    def resume_at(self, step: int) -> None:
        """Go to where training stands after ``step`` steps counted over all epochs."""
        self._epoch, self._step = divmod(step, self.steps_per_epoch)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._epoch, self._step = state["epoch"], state["step"]
