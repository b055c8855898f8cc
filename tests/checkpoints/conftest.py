"""A fixture of the tests of Hugging Face's files."""

import pytest
from huggingface_models import random_model


@pytest.fixture
def saved(tmp_path):
    """A small model and its folder."""
    model = random_model()
    model.save_pretrained(tmp_path)
    return model, tmp_path
