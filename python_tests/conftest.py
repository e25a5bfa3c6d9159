import os
import shutil

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items):
    """Leaves out what this machine cannot run: ``cuda`` without a GPU, ``nvcc`` without a toolkit."""
    there = {"cuda": torch.cuda.is_available(), "nvcc": shutil.which("nvcc") is not None}
    missing = [name for name, is_there in there.items() if not is_there]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in missing)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
