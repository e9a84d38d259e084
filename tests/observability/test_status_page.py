"""The status page in a real browser: what it shows, how it moves, who can use it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from mell_ray.serving.page import status_page
from tests.observability.browser import Page, chromium, find_chromium
from tests.observability.fake_fleet import CAPACITY, FakeFleet, serving
from tests.observability.take_screenshots import SCHEMES, path_of

needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here (Debian's package is called chromium)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as page:
        page.size(1280, 900)
        yield page


@pytest.fixture(autouse=True)
def no_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "page" in request.fixturenames:
        found = request.getfixturevalue("page").errors
        errors, found[:] = list(found), []
        # The page asks on when a test has stopped its server, and is refused without a key.
        assert not [error for error in errors if not error.endswith("/mell/v1/live")]


def two_gpus() -> FakeFleet:
    return FakeFleet(["a", "b"], {"r1": ("a", 64), "r2": ("a", 32), "r3": ("b", 16)})


def bins(count: int) -> str:
    return f"document.querySelectorAll('.bin').length === {count}"


def block(request: str) -> str:
    return f"homes.get('{request}')"


def test_page_is_self_contained_and_small() -> None:
    text = status_page().decode()
    elsewhere = re.findall(r"(?:src|href|url|import)\W{1,3}(?:https?:)?//[^\s'\"]+", text)
    assert not elsewhere
    assert "@import" not in text
    assert len(text) < 40_000


@pytest.mark.parametrize("scheme", SCHEMES)
def test_screenshots_for_the_readme_are_small(scheme: str) -> None:
    assert path_of(scheme).read_bytes().startswith(b"\x89PNG")
    assert path_of(scheme).stat().st_size < 100_000


@needs_chromium
def test_room_reserved_for_a_request_on_its_way_is_drawn(page: Page) -> None:
    fleet = two_gpus()
    fleet.reserved["b"] = 64
    with serving(fleet) as url:
        page.open(f"{url}/mell", still=True)
        page.wait(bins(2))
        share = page.evaluate(
            "(() => { const bin = bins.get('b');"
            " return bin.reserved.offsetHeight / bin.tank.clientHeight; })()"
        )
        assert share == pytest.approx(64 / CAPACITY, abs=0.01)


@needs_chromium
@pytest.mark.parametrize("num_gpus", [1, 8, 200])
def test_fleets_of_all_sizes_are_drawn_to_scale(page: Page, num_gpus: int) -> None:
    fleet = FakeFleet.random(num_gpus)
    with serving(fleet) as url:
        page.open(f"{url}/mell", still=True)
        page.wait(bins(num_gpus))
        name, (gpu, blocks) = max(fleet.requests.items(), key=lambda item: item[1][1])
        height, tank = page.evaluate(
            f"[{block(name)}.offsetHeight, {block(name)}.parentNode.clientHeight]"
        )
        assert height == pytest.approx(tank * blocks / CAPACITY, abs=1.5)
        assert page.evaluate(f"{block(name)}.dataset.gpu") == gpu
        drawn = page.evaluate("document.querySelectorAll('.tank > .block:not(.rest)').length")
        assert drawn <= len(fleet.requests)
        assert drawn >= min(len(fleet.requests), 8 * num_gpus) * 0.9
        figures = page.evaluate("document.getElementById('figures').innerText")
        running = len({gpu for gpu, _ in fleet.requests.values()})
        assert re.search(rf"GPUs used\s+{running} of", figures)
        overflow = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not page.evaluate(overflow)
        hosts = page.evaluate(
            "performance.getEntriesByType('resource').map(e => new URL(e.name).origin)"
        )
        assert set(hosts) <= {url}


@needs_chromium
def test_request_flies_to_its_new_gpu(page: Page) -> None:
    fleet = two_gpus()
    with serving(fleet) as url:
        page.open(f"{url}/mell")
        page.wait(bins(2))
        page.evaluate(
            "window.flights = 0; new MutationObserver(all => all.forEach(m => m.addedNodes.forEach("
            "n => { if (n.classList?.contains('ghost')) flights++; })))"
            ".observe(document.body, {childList: true})"
        )
        fleet.migrating.add("r1")
        page.wait(f"{block('r1')}.classList.contains('moving')")
        fleet.requests["r1"] = ("b", 64)
        fleet.migrating.clear()
        page.wait(f"{block('r1')}.closest('.bin').id === 'gpu-b'")
        page.wait("flights === 1")
        # Landed: the block itself is seen again, and the one that flew is gone.
        page.wait(f"!{block('r1')}.classList.contains('away') && !document.querySelector('.ghost')")
        assert page.evaluate(f"{block('r2')}.closest('.bin').id") == "gpu-a"


@needs_chromium
def test_nothing_flies_for_those_who_prefer_less_motion(page: Page) -> None:
    fleet = two_gpus()
    with serving(fleet) as url:
        page.open(f"{url}/mell", still=True)
        page.wait(bins(2))
        page.evaluate("window.seen = 0; Element.prototype.animate = () => { seen++; }")
        fleet.requests["r1"] = ("b", 64)
        fleet.gpus.append("c")
        page.wait(f"{block('r1')}.closest('.bin').id === 'gpu-b' && {bins(3)}")
        assert page.evaluate("seen") == 0
        durations = "getComputedStyle(document.querySelector('.block')).transitionDuration"
        assert page.evaluate(durations) == "0s"


@needs_chromium
def test_gpus_open_and_close_and_an_empty_fleet_says_so(page: Page) -> None:
    fleet = two_gpus()
    with serving(fleet) as url:
        page.open(f"{url}/mell")
        page.wait(bins(2))
        fleet.gpus.append("c")
        fleet.states["c"] = "starting"
        page.wait("document.getElementById('gpu-c')?.classList.contains('starting')")
        fleet.states["c"] = "ready"
        page.wait("document.getElementById('gpu-c').classList.contains('ready')")
        for state, told in (("asleep", "its GPU is free"), ("lent", "its GPU is lent")):
            fleet.states["c"] = state
            page.wait(f"document.getElementById('gpu-c').textContent.includes({told!r})")
        fleet.requests.clear()
        page.wait("homes.size === 0")
        fleet.gpus.clear()
        page.wait(f"{bins(0)} && !document.getElementById('none').hidden")


@needs_chromium
def test_keyboard_reaches_every_gpu(page: Page) -> None:
    with serving(FakeFleet.random(30)) as url:
        page.open(f"{url}/mell", still=True)
        page.wait(bins(30))
        focused = "document.activeElement.classList.contains('bin')"
        for _ in range(5):
            if page.evaluate(focused):
                break
            page.press("Tab")
        order = "[...document.querySelectorAll('.bin')]"
        at = f"{order}.indexOf(document.activeElement)"
        assert page.evaluate(at) == 0
        page.press("ArrowRight")
        page.press("ArrowRight")
        assert page.evaluate(at) == 2
        page.press("ArrowDown")
        down = page.evaluate(at)
        assert down > 3
        page.press("ArrowUp")
        page.press("ArrowLeft")
        assert page.evaluate(at) == 1
        page.press("End")
        assert page.evaluate(at) == 29
        page.press("ArrowRight")
        assert page.evaluate(at) == 29
        page.press("Home")
        label = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert re.fullmatch(
            rf"GPU mell-\w+, ready, \d+ of {CAPACITY} blocks used, \d+ requests", label
        )
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
        chosen = page.evaluate("document.activeElement.title")
        assert page.evaluate("document.querySelector('#detail h3').textContent") == chosen
        stops = page.evaluate(f"{order}.filter(bin => bin.tabIndex === 0).length")
        assert stops == 1, "one stop for Tab, the arrows do the rest"


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_is_readable_in_both_schemes(page: Page, dark: bool) -> None:
    """WCAG's 4.5:1, for text on cards and on the blocks."""
    with serving(two_gpus()) as url:
        page.open(f"{url}/mell", dark=dark, still=True)
        page.wait(bins(2))
        contrasts = page.evaluate(
            """(() => {
              const context = document.createElement('canvas').getContext('2d');
              const light = (color) => {
                context.fillStyle = color;
                context.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
                  v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                return .2126 * r + .7152 * g + .0722 * b;
              };
              const style = getComputedStyle(document.documentElement);
              const of = (name) => light(style.getPropertyValue(name).trim());
              const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
              const tone = style.getPropertyValue('--tone');
              const blocks = HUES.map(h => light(`oklch(${tone} ${h})`));
              return {
                paper: of('--card'),
                all: [...['--ink', '--muted', '--accent', '--bound', '--bad'].map(
                        name => ratio(of(name), of('--card'))),
                      ratio(of('--muted'), of('--bg')), ratio(of('--muted'), of('--bin')),
                      ...blocks.map(block => ratio(of('--block-ink'), block))],
              };
            })()"""
        )
        assert (contrasts["paper"] < 0.1) == dark
        assert min(contrasts["all"]) >= 4.5


@needs_chromium
def test_names_are_text_and_never_markup(page: Page) -> None:
    evil = "<img src=x onerror='window.hacked=1'>"
    fleet = FakeFleet(["a"], {evil: ("a", 200)})
    with serving(fleet) as url:
        page.open(f"{url}/mell")
        page.wait(bins(1))
        assert page.evaluate("document.querySelector('.tank .block span').textContent") == evil
        assert page.evaluate("document.images.length") == 0


@needs_chromium
def test_a_server_with_keys_is_asked_with_one(page: Page) -> None:
    fleet = two_gpus()
    fleet.key = "secret"
    with serving(fleet) as url:
        page.open(f"{url}/mell")
        page.wait("document.getElementById('door').classList.contains('open')")
        page.evaluate("document.getElementById('key').value = 'secret'")
        page.evaluate("document.getElementById('door').requestSubmit()")
        page.wait(bins(2))
        assert "secret" not in page.evaluate("document.documentElement.innerText")


@needs_chromium
def test_a_server_that_goes_away_is_told_and_taken_up_again(page: Page) -> None:
    fleet = two_gpus()
    with serving(fleet) as url:
        page.open(f"{url}/mell")
        page.wait("document.getElementById('link').className === 'live'")
        page.evaluate(
            "window.truly = window.fetch; window.fetch = () => Promise.reject(new Error('down'))"
        )
        page.wait("document.getElementById('link').className === 'lost'")
        page.evaluate("window.fetch = window.truly")
        page.wait("document.getElementById('link').className === 'live'")
