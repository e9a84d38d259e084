"""The model in the box: small enough to ship in the package, real enough to serve.

A Llama-architecture checkpoint with its tokenizer and chat template lies in ``weights/``, so a
first deployment, the tests and the load generators need neither a download nor an accelerator.
``training/`` holds the code that produced it and is never imported at run time.
"""

from pathlib import Path

MODEL_ID = "mell-tiny"


def model_path() -> Path:
    """Directory to pass to ``from_pretrained``: config, weights, tokenizer and chat template."""
    return Path(__file__).resolve().parent / "weights"
