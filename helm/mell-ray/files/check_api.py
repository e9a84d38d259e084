"""Waits until the API answers, then compares the models it names with those that it should serve.

What `helm test` runs, from the environment: MELL_URL, MELL_MODELS (separated by blanks),
MELL_TIMEOUT in seconds, and MELL_KEYS, a directory with an API key, where keys are needed.
"""

import json
import os
import pathlib
import sys
import time
import urllib.error
import urllib.request


def key() -> str:
    directory = pathlib.Path(os.environ.get("MELL_KEYS", ""))
    for path in sorted(directory.glob("[!.]*")) if os.environ.get("MELL_KEYS") else ():
        for line in path.read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                return line.strip()
    return ""


def get(path: str) -> bytes:
    request = urllib.request.Request(os.environ["MELL_URL"] + path)
    if key():
        request.add_header("Authorization", f"Bearer {key()}")
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read()


def main() -> str:
    deadline = time.monotonic() + float(os.environ["MELL_TIMEOUT"])
    while True:
        try:
            get("/health")
            break
        except OSError as error:
            if time.monotonic() > deadline:
                return f"the API does not answer: {error}"
            time.sleep(1)
    try:
        served = {model["id"] for model in json.loads(get("/v1/models"))["data"]}
    except urllib.error.HTTPError as error:
        return f"/v1/models answers {error.code}: {error.read()[:500]!r}"
    missing = set(os.environ["MELL_MODELS"].split()) - served
    if missing:
        return f"not served: {sorted(missing)}; served: {sorted(served)}"
    print(f"served: {sorted(served)}")
    return ""


sys.exit(main() or None)
