"""One untrained model and a few rendered scenes serve all of these tests, which transformers 4.57 passes too."""

from __future__ import annotations

from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis draws scenes and cards")

from finegrain_ops.tiny_llava.model import new_model
from finegrain_ops.tiny_llava.tokenizer import make_processor, make_tokenizer
from finegrain_ops.tiny_llava.training import rendered
from finegrain_ops.tiny_llava.training.rendered import RenderedScenes

NUM_SCENES = 48


@pytest.fixture(scope="session")
def model() -> Any:
    return new_model(0).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def processor(tokenizer) -> Any:
    return make_processor(tokenizer)


@pytest.fixture(scope="session")
def rendering_here() -> Any:
    """A stand-in for rendered.multiprocessing whose workers are threads, for processes take seconds to start."""
    return SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))


@pytest.fixture(scope="session")
def scenes_folder(rendering_here, tmp_path_factory) -> Path:
    """A folder in which NUM_SCENES of the training split are rendered."""
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendered, "multiprocessing", rendering_here)
        RenderedScenes(folder, "train", NUM_SCENES, workers=1)
    return folder


@pytest.fixture(scope="session")
def data(scenes_folder) -> RenderedScenes:
    return RenderedScenes(scenes_folder, "train", NUM_SCENES, workers=1)
