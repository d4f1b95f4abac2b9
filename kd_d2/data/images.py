"""Images of data sets, read so that one that cannot be used is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.detection_utils import SizeMismatchError
from torch.utils.data import DataLoader

from ..errors import UserError
from .workers import init_worker


class DataError(UserError):
    """An image of a data set cannot be used."""

    def __init__(self, message: str):
        # A worker process hands its exception on as the text of a traceback, which ends with the sentence.
        super().__init__(message.rpartition(f"{__name__}.DataError: ")[2].strip())


class CheckedMapper:
    """A mapper that names the file of an image that cannot be used.

    Args:
        mapper: of data set dictionaries, as Detectron2's DatasetMapper.
    """

    def __init__(self, mapper: Callable[[dict], Any]):
        self.mapper = mapper

    def __call__(self, entry: dict) -> Any:
        """What the mapper makes of the entry.

        Raises:
            DataError: the image is not there, is none, or has another size than its annotations say.
        """
        try:
            return self.mapper(entry)
        except (OSError, SizeMismatchError) as error:
            raise DataError(f"The image {entry.get('file_name')} cannot be used: {error}") from error


def build_test_loader(
    cfg: CfgNode, dataset: str, mapper: Callable[[dict], dict] | None = None, **overrides: Any
) -> DataLoader:
    """Detectron2's loader of a test set.

    Args:
        cfg: INPUT and DATALOADER are read.
        dataset: its name.
        mapper: replaces Detectron2's DatasetMapper.
        overrides: of what `build_detection_test_loader` takes from the config, such as `num_workers`.
    """
    mapper = CheckedMapper(mapper or DatasetMapper(cfg, is_train=False))
    loader = build_detection_test_loader(cfg, dataset, mapper=mapper, **overrides)
    loader.worker_init_fn = init_worker
    return loader
