"""The text of a run as a LightningDataModule: calibration and evaluation windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flapkit.pruning.collector import COUNTED
from flapkit.system.errors import DataError
from flapkit.system.sizes import counted
from flapkit.text.windows import UNSCORED, Windows

Row = Mapping[str, Any]
Batch = dict[str, Tensor]

BATCH_KEYS = ("input_ids", "attention_mask", "labels")
"""Keys of a batch with one value per token; other columns of a dataset are ignored."""

MARKS = ("held_out", COUNTED)
"""Keys of a batch with one value per window, if the rows have them."""

HELD_OUT_ONE_IN = 4
"""One calibration window in this many is held out, to evaluate what was fitted on the others."""


def held_out(windows: int) -> Tensor:
    """Mark the held-out calibration windows, bool [windows]: the last of every four."""
    return torch.arange(windows) % HELD_OUT_ONE_IN == HELD_OUT_ONE_IN - 1


class WindowRows(Dataset[Row]):
    """Windows as a dataset of mappings, one per window.

    Args:
        tensors: name -> [windows, tokens].
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors["input_ids"])

    def __getitem__(self, index: int) -> Row:
        """Return the tensors [tokens] of one window."""
        return {name: tensor[index] for name, tensor in self._tensors.items()}


class _CalibrationRows(Dataset[Row]):
    """Calibration windows, marked as held out or not by their index."""

    def __init__(self, rows: Dataset[Row]) -> None:
        self._rows = rows
        self._held_out = held_out(_count(rows))

    def __len__(self) -> int:
        return _count(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        if not isinstance(row, Mapping):
            return row
        return {**row, "held_out": self._held_out[index]}


class _FilledRows(Dataset[Row]):
    """Rows padded to a multiple of the devices by repeating the first ones, which do not count."""

    def __init__(self, rows: Dataset[Row], devices: int) -> None:
        self._rows = rows
        self._windows = _count(rows)
        self._total = devices * math.ceil(self._windows / devices)

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index % self._windows]
        if not isinstance(row, Mapping):
            return row
        counted = index < self._windows
        if "labels" in row and not counted:
            row = {**row, "labels": torch.full_like(row["labels"], UNSCORED)}
        return {**row, COUNTED: torch.tensor(counted)}


class PruningData(LightningDataModule):
    """The text of a run: ``predict_dataloader`` loads calibration, ``test_dataloader`` returns a loader per evaluation.

    Batches are mappings with ``input_ids`` and ``attention_mask`` [windows, tokens], ``labels`` for evaluation, and
    ``held_out`` [windows] for calibration: whether a window is held out to evaluate what was fitted on the others.
    On several devices each window counts exactly once. Under a strategy whose devices wait for each other in every
    forward pass, the shares are padded to equal size; ``counted`` [windows] is false for the padding.

    Args:
        calibration: tokens [windows, tokens]; or a dataset of mappings with ``input_ids`` [tokens] and, where rows
            are padded, ``attention_mask`` [tokens].
        evaluations: name -> windows, in the order of the loaders.
        batch_size: calibration windows that go through the model at once.
        evaluation_batch_size: evaluation windows that go through the model at once, or a mapping from names.
        share: selects this process's windows, where no trainer distributes them
            (``flapkit.system.processes.window_share``); None for all.

    Raises:
        DataError: the calibration tokens have a wrong shape or dtype, or there are no windows.
    """

    def __init__(
        self,
        calibration: Tensor | Dataset[Row] | None = None,
        evaluations: Mapping[str, Windows] | None = None,
        *,
        batch_size: int = 8,
        evaluation_batch_size: int | Mapping[str, int] = 8,
        share: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.calibration = None if calibration is None else _calibration_rows(calibration)
        self.evaluations = dict(evaluations or {})
        self._batch_size = batch_size
        self._evaluation_batch_size = evaluation_batch_size
        self._share = share

    @property
    def evaluation_names(self) -> tuple[str, ...]:
        """The evaluations' names; ``dataloader_idx`` of a test step is an index into them."""
        return tuple(self.evaluations)

    @property
    def calibration_windows(self) -> int:
        """The number of calibration windows."""
        return 0 if self.calibration is None else _count(self.calibration)

    def calibration_rows(self) -> Iterator[Row]:
        """Yield the calibration windows one by one, as they reach the model."""
        rows = self.calibration
        return (rows[index] for index in range(_count(rows))) if rows is not None else iter(())

    def predict_dataloader(self) -> DataLoader[Row]:
        """Load the calibration windows, in their order.

        Raises:
            DataError: there are none, or fewer than the devices.
        """
        if self.calibration is None:
            raise DataError("calibration: PruningData has no calibration text")
        return self._loader("calibration", self.calibration, self._batch_size)

    def test_dataloader(self) -> list[DataLoader[Row]]:
        """Load the windows of each evaluation, in their order.

        Raises:
            DataError: an evaluation has fewer windows than the devices.
        """
        return [
            self._loader(name, _evaluation_rows(windows), self._size(name))
            for name, windows in self.evaluations.items()
        ]

    def _size(self, name: str) -> int:
        size = self._evaluation_batch_size
        return size if isinstance(size, int) else size[name]

    def _loader(self, name: str, rows: Dataset[Row], batch_size: int) -> DataLoader[Row]:
        rows = _filled(self, rows)
        # No workers: the windows are in memory. Keywords: Lightning rebuilds the loader to predict, and then mistakes a
        # positional batch size for a second one.
        sampler = _sampler(name, rows, self._share or _share_of(self))
        return DataLoader(rows, batch_size=batch_size, sampler=sampler, collate_fn=collate, num_workers=0)


class RecoveryData(LightningDataModule):
    """The text of a recovery: training windows, each used once and in order, and validation windows.

    On several devices the windows are distributed in turn: all devices together take in one optimizer step what one
    device would take with as many times the batch size. Every validation window is used exactly once.

    An epoch of the trainer lasts from one validation to the next. The trainer must reload the loader in every epoch
    (``reload_dataloaders_every_n_epochs=1``); a resumed training then continues with the next windows.

    Args:
        windows: training tokens [windows, tokens]; or a mapping with ``input_ids`` and ``attention_mask``, both of that
            shape.
        validation: validation tokens, in the same form; a multiple of the devices, since a device with an additional
            batch would wait for the others.
        batch_size: windows that go through the model at once, on each device.
        per_epoch: windows of one epoch, on all devices together; a multiple of the devices.
    """

    def __init__(
        self,
        windows: Tensor | Mapping[str, Tensor],
        validation: Tensor | Mapping[str, Tensor],
        *,
        batch_size: int,
        per_epoch: int,
    ) -> None:
        super().__init__()
        self._windows = _by_name(windows)
        self._validation = _by_name(validation)
        self._batch_size = batch_size
        self._per_epoch = per_epoch

    def train_dataloader(self) -> DataLoader[Row]:
        """Load the windows of the trainer's epoch."""
        first = (self.trainer.current_epoch if self.trainer else 0) * self._per_epoch
        epoch = {name: values[first : first + self._per_epoch] for name, values in self._windows.items()}
        return self._loader("recovery", epoch)

    def val_dataloader(self) -> DataLoader[Row]:
        """Load the validation windows."""
        return self._loader("validation", self._validation)

    def _loader(self, name: str, windows: Mapping[str, Tensor]) -> DataLoader[Row]:
        rows = WindowRows(windows)
        sampler = _sampler(name, rows, _share_of(self))
        return DataLoader(rows, batch_size=self._batch_size, sampler=sampler, collate_fn=collate, num_workers=0)


def _by_name(windows: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"input_ids": windows} if isinstance(windows, Tensor) else windows


def collate(rows: Sequence[Row]) -> Batch:
    """Stack rows into a batch; without an attention mask, all tokens are attended.

    Args:
        rows: mappings with ``input_ids`` [tokens], and perhaps ``attention_mask`` and ``labels`` of the same length.

    Raises:
        DataError: a row has another form, or rows have different lengths.
    """
    keys: list[tuple[str, ...]] = []
    for row in rows:
        if not isinstance(row, Mapping) or "input_ids" not in row:
            got = f"a mapping of {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise DataError(f"a dataset's rows must be mappings with `input_ids` and `attention_mask`; got {got}")
        keys.append(tuple(name for name in BATCH_KEYS if name in row))
    columns = {name: [torch.as_tensor(row[name], dtype=torch.long) for row in rows] for name in keys[0]}
    shapes = sorted({tuple(value.shape) for column in columns.values() for value in column})
    if len(set(keys)) > 1 or len(shapes) > 1 or len(shapes[0]) != 1:
        raise DataError(
            "a dataset's rows must have the same keys and the same shape [tokens]; got shapes "
            f"{', '.join(map(str, map(list, shapes)))} in one batch; pad them, and give an `attention_mask` that is 0 "
            "on the padding"
        )
    batch = {name: torch.stack(column) for name, column in columns.items()}
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch | {name: torch.stack([row[name] for row in rows]) for name in MARKS if name in rows[0]}


def _filled(data: LightningDataModule, rows: Dataset[Row]) -> Dataset[Row]:
    """Pad the rows where devices wait for each other in every forward pass."""
    trainer = data.trainer
    if trainer is None or not isinstance(getattr(trainer, "strategy", None), ModelParallelStrategy):
        return rows
    return _FilledRows(rows, trainer.world_size)


def _share_of(data: LightningDataModule) -> Mapping[str, int] | None:
    return data.trainer.distributed_sampler_kwargs if data.trainer else None


def _sampler(name: str, rows: Dataset[Row], share: Mapping[str, int] | None) -> Sampler[int] | None:
    """Distribute windows over the devices, in order; Lightning's own samplers would shuffle or repeat them."""
    if not share or share["num_replicas"] == 1:
        return None
    if _count(rows) < share["num_replicas"]:
        raise DataError(
            f"{name}: {counted(_count(rows), 'window')} cannot be shared by {share['num_replicas']} devices; "
            "give more windows, or lower trainer.devices"
        )
    return UnrepeatedDistributedSampler(rows, shuffle=False, **share)


def _calibration_rows(calibration: Tensor | Dataset[Row]) -> Dataset[Row]:
    if isinstance(calibration, Mapping):
        raise DataError(
            "calibration: expected tokens as a LongTensor [windows, tokens], or a dataset of rows, found a mapping of "
            f"{', '.join(map(str, calibration))}; give its `input_ids`"
        )
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.dtype != torch.long or not calibration.shape[1]:
            raise DataError(
                "calibration: expected tokens as a LongTensor [windows, tokens], "
                f"got {calibration.dtype} {list(calibration.shape)}"
            )
        calibration = WindowRows({"input_ids": calibration})
    if not hasattr(calibration, "__len__") or not hasattr(calibration, "__getitem__"):
        raise DataError("calibration: expected a tensor or a dataset with a length, so that devices can share it")
    if _count(calibration) == 0:
        raise DataError("calibration: there are no windows")
    return _CalibrationRows(calibration)


def _evaluation_rows(windows: Windows) -> Dataset[Row]:
    return WindowRows({name: getattr(windows, name) for name in BATCH_KEYS})


def _count(rows: Dataset[Row]) -> int:
    return len(rows)  # type: ignore[arg-type]
