"""The README's pictures of the status page: ``python -m tests.observability.take_screenshots``.

The fleet is made up, and its model is called so.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image

from tests.observability.browser import Page, chromium
from tests.observability.fake_fleet import FakeFleet, serving

SCHEMES = ("light", "dark")
FOLDER = Path(__file__).parents[2] / "mell_ray" / "observability"
COLOURS = 200


def path_of(scheme: str) -> Path:
    return FOLDER / f"screenshot-{scheme}.png"


def fleet() -> FakeFleet:
    """Nine GPUs, one being emptied, with a request on its way."""
    fleet = FakeFleet.random(9)
    draining = fleet.gpus[-2]
    moving, blocks = next((n, size) for n, (gpu, size) in fleet.requests.items() if gpu == draining)
    target = min(fleet.gpus[:-2], key=lambda gpu: used(fleet, gpu))
    fleet.migrating.add(moving)
    fleet.reserved[target] = blocks
    return fleet


def used(fleet: FakeFleet, gpu: str) -> int:
    return sum(size for on, size in fleet.requests.values() if on == gpu)


def take(page: Page, url: str, scheme: str) -> None:
    page.size(1280, 860)
    page.open(f"{url}/mell", dark=scheme == "dark", still=True)
    page.wait("bins.size === 9")
    page.evaluate("choose([...bins.keys()][1])")
    page.size(1280, page.evaluate("document.querySelector('main').offsetHeight"))
    page.wait("document.querySelector('#chart').viewBox.baseVal.width > 600")
    page.screenshot(path_of(scheme))
    picture = Image.open(io.BytesIO(path_of(scheme).read_bytes())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path_of(scheme), optimize=True)


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as scratch,
        chromium(Path(scratch) / "profile") as page,
        serving(fleet()) as url,
    ):
        for scheme in SCHEMES:
            take(page, url, scheme)
