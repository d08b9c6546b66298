from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from flapkit.execution.executor import CalibrationText
from flapkit.execution.lightning.data import PruningData, collate
from flapkit.system.errors import DataError
from flapkit.text.windows import Windows, cut_windows


def quiet(test: Any) -> Any:
    """Leave out Lightning's advice on worker processes (these windows are in memory), and its own use of torch."""
    for warning in ("The '.*_dataloader' does not have many workers", ".*treespec, LeafSpec.* is deprecated"):
        test = pytest.mark.filterwarnings(f"ignore:{warning}")(test)
    return test


class Rows(Dataset[Any]):
    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Recorder(LightningModule):
    """A module that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calibrated: list[Any] = []
        self.tested: list[Any] = []

    def predict_step(self, batch: Any) -> int:
        self.calibrated.append(batch)
        return len(batch)  # Lightning warns of nothing

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tested.append((dataloader_idx, batch))


def trainer() -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def evaluations() -> dict[str, Windows]:
    return {"a": cut_windows(torch.arange(20), 4), "b": cut_windows(torch.arange(100, 119), 8, stride=4)}


def share(data: PruningData, rank: int, ranks: int) -> PruningData:
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank})  # type: ignore[assignment]
    return data


def first_tokens(loader: Any) -> list[int]:
    return [int(token) for batch in loader for token in batch["input_ids"][:, 0]]


@quiet
def test_calibration_under_lightning() -> None:
    tokens = torch.arange(30).view(10, 3)
    recorder = Recorder()
    trainer().predict(recorder, datamodule=PruningData(tokens, batch_size=4), return_predictions=False)
    assert [len(batch["input_ids"]) for batch in recorder.calibrated] == [4, 4, 2]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in recorder.calibrated]), tokens)
    assert all(batch.keys() == {"input_ids", "attention_mask", "held_out"} for batch in recorder.calibrated)
    held_out = torch.cat([batch["held_out"] for batch in recorder.calibrated])
    assert held_out.nonzero().flatten().tolist() == [3, 7]
    assert all(batch["attention_mask"].all() for batch in recorder.calibrated)


@quiet
def test_evaluations_under_lightning() -> None:
    sets = evaluations()
    data = PruningData(evaluations=sets, evaluation_batch_size={"a": 2, "b": 3})
    recorder = Recorder()
    trainer().test(recorder, datamodule=data, verbose=False)
    assert data.evaluation_names == ("a", "b")
    for index, (name, size) in enumerate((("a", 2), ("b", 3))):
        batches = [batch for number, batch in recorder.tested if number == index]
        assert len(batches[0]["input_ids"]) == size
        for key in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(torch.cat([batch[key] for batch in batches]), getattr(sets[name], key))


def test_a_dataset_of_mappings() -> None:
    rows = Rows(
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0], "text": "x"},
        {"input_ids": torch.tensor([4, 5, 6]), "attention_mask": torch.tensor([1, 1, 1]), "text": "y"},
    )
    (batch,) = PruningData(rows).predict_dataloader()
    assert batch.keys() == {"input_ids", "attention_mask", "held_out"}
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(("windows", "ranks"), [(8, 2), (9, 2), (10, 4), (3, 3)])
def test_devices_see_each_window_once(windows: int, ranks: int) -> None:
    """Nothing is repeated or dropped where the windows cannot be shared equally."""
    tokens = torch.arange(windows).repeat_interleave(4)
    calibration, sets = tokens.view(windows, 4), {"a": cut_windows(tokens, 4)}
    seen: dict[str, list[int]] = {"calibration": [], "test": []}
    for rank in range(ranks):
        data = share(PruningData(calibration, sets, batch_size=2, evaluation_batch_size=2), rank, ranks)
        seen["calibration"] += first_tokens(data.predict_dataloader())
        seen["test"] += first_tokens(data.test_dataloader()[0])
        assert first_tokens(CalibrationText(calibration, 2).batches()) == list(range(windows))
        given = PruningData(calibration, batch_size=2, share={"rank": rank, "num_replicas": ranks})
        assert first_tokens(given.predict_dataloader()) == first_tokens(data.predict_dataloader())
    assert sorted(seen["calibration"]) == sorted(seen["test"]) == list(range(windows))


@pytest.mark.parametrize(("windows", "ranks"), [(8, 2), (9, 2), (10, 4), (1, 3)])
def test_devices_that_wait_for_each_other_have_equal_shares(windows: int, ranks: int) -> None:
    """Each window counts once, and what fills a share up scores nothing."""
    tokens = torch.arange(windows).repeat_interleave(4)
    calibration, sets = tokens.view(windows, 4), {"a": cut_windows(tokens, 4)}
    counted, scored, batches = [], [], set()
    for rank in range(ranks):
        data = share(PruningData(calibration, sets, batch_size=2, evaluation_batch_size=2), rank, ranks)
        data.trainer.strategy, data.trainer.world_size = ModelParallelStrategy(), ranks
        loader, test = list(data.predict_dataloader()), list(data.test_dataloader()[0])
        batches.add((len(loader), len(test)))
        counted += [int(row[0]) for batch in loader for row in batch["input_ids"][batch["counted"]]]
        scored += [int(row[1]) for batch in test for row in batch["labels"] if (row != -100).any()]
        assert all(batch["attention_mask"].all() for batch in loader)
    assert len(batches) == 1
    assert sorted(counted) == sorted(scored) == list(range(windows))


def test_fewer_windows_than_devices() -> None:
    data = share(PruningData(torch.ones(2, 4, dtype=torch.long), evaluations()), 0, 3)
    with pytest.raises(DataError, match="calibration: 2 windows cannot be shared by 3 devices"):
        data.predict_dataloader()
    with pytest.raises(DataError, match="a: 5 windows cannot be shared by 6 devices"):
        share(data, 0, 6).test_dataloader()


@pytest.mark.parametrize(
    "calibration", [torch.ones(4, dtype=torch.long), torch.ones(2, 4), torch.ones(1, 2, 4, dtype=torch.long)]
)
def test_calibration_of_a_wrong_shape_or_type(calibration: Tensor) -> None:
    with pytest.raises(DataError, match=r"LongTensor \[windows, tokens\], got"):
        PruningData(calibration)


def test_no_calibration() -> None:
    with pytest.raises(DataError, match="PruningData has no calibration text"):
        PruningData().predict_dataloader()
    for empty in (torch.ones(0, 4, dtype=torch.long), Rows()):
        with pytest.raises(DataError, match="there are no windows"):
            PruningData(empty)


def test_a_dataset_without_a_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield {"input_ids": [1]}

    with pytest.raises(DataError, match="a dataset with a length"):
        PruningData(Stream())


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"input_ids": [1, 2]}, {"input_ids": [1]}], r"got shapes \[1\], \[2\] in one batch; pad them"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], r"got shapes \[1\], \[2\]"),
        ([{"input_ids": [1]}, {"input_ids": [1], "attention_mask": [1]}], "rows must have the same keys"),
        ([{"input_ids": [[1]]}], r"got shapes \[1, 1\]"),
        ([{"text": "x"}], "got a mapping of text"),
        ([torch.ones(2)], "got a Tensor"),
    ],
)
def test_rows_of_another_form(rows: list[Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        collate(rows)
