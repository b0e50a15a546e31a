"""The dashboard's page in a real browser: what it shows, and that it can be used."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.lowlevel
import attrs
import httpx
import pytest

from kvfleet.config.schema import (
    BudgetConfig,
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.dashboard import DashboardState, start_dashboard
from kvfleet.gateway.server import Serving, running
from kvfleet.runtime import Router
from tests.gateway.chromium import CHROMIUM, Browser, Tab, chromium

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here; on Debian: apt-get install chromium"),
]

EVIL = "<img src=x onerror=document.title='owned'>"
ASK = {"model": "auto", "messages": [{"role": "user", "content": "CANARYPROMPT"}]}
FLEET = FleetConfig(
    fleet_name=EVIL,
    models=(
        ModelConfig(name="bad", endpoint="mock://1", provider="mock", quality_score=1.0, options={"fail": "overloaded"}),
        ModelConfig(name="good", endpoint="mock://2", provider="mock", quality_score=0.5),
        ModelConfig(name="open", endpoint="mock://3", provider="mock", allowed_data_classes=("public",)),
    ),
    strategy="quality_first",
    policy=PolicyConfig(enabled=True),
    telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    gateway=GatewayConfig(max_concurrent=8),
)  # fmt: skip
ROWS = "document.querySelectorAll('#routes tbody tr').length"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A fresh browser."""
    async with chromium() as one:
        yield one


async def ask(serving: Serving, *, times: int = 1, **headers: str) -> None:
    """Send requests."""
    async with httpx.AsyncClient(base_url=serving.url, headers=headers) as client:
        for _ in range(times):
            assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
    await serving.router.settled()


async def opened(browser: Browser, url: str, width: int = 1200, height: int = 900, *, dark: bool = False) -> Tab:
    """The page, once it shows something."""
    tab = await browser.tab()
    await tab.size(width, height, dark=dark)
    await tab.go(url)
    return tab


async def text(tab: Tab, selector: str) -> str:
    """What can be read there."""
    return str(await tab.run(f"document.querySelector({selector!r}).innerText"))


async def test_it_shows_the_live_fleet(browser: Browser) -> None:
    """Replicas, counters, charts and decisions, and what comes while one looks; nothing from elsewhere, no complaint."""
    async with running(FLEET) as serving:
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until("document.querySelectorAll('#replicas tbody tr').length === 3")
        assert "No request has come yet." in await text(tab, "#routes")
        await ask(serving, times=2)
        await tab.until(f"{ROWS} === 2")
        await tab.until("document.querySelectorAll('#charts path[d^=M]').length >= 3")
        cells = "[...document.querySelectorAll('#counters div')].map(d => [...d.children].map(c => c.textContent))"
        counters = dict(await tab.run(cells))
        replicas = await text(tab, "#replicas")
        stages = await text(tab, "#stages")
        assert (counters["Requests"], counters["Errors"], counters["Policy blocks"]) == ("2", "0", "2")
        assert int(counters["Fallbacks"]) >= 1
        assert all(name in replicas for name in ("bad#1", "good#1", "open#1"))
        assert "admit.concurrency" in stages
        assert "Budgets" not in stages
        assert await text(tab, "#link") == "live"
        assert "CANARYPROMPT" not in await text(tab, "body")
        assert all(url.startswith((serving.url, "data:")) for url in tab.urls)
        assert tab.errors == []


async def test_it_shows_what_is_left_of_rate_limits(browser: Browser) -> None:
    """A table of those that are known, and the replica that is limited says for how long; none without any limit."""
    good = FLEET.models[1]
    limited = attrs.evolve(good, name="limited", endpoint="mock://4", quality_score=0.9, rpm=2)
    async with running(attrs.evolve(FLEET, models=(good, limited))) as serving:
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until("document.querySelectorAll('#replicas tbody tr').length === 2")
        await ask(serving, times=3)
        await tab.until("document.querySelector('#stages table[aria-label=\"Rate limits\"] .bad')")
        shown = await text(tab, "#stages table[aria-label='Rate limits']")
        assert "limited#1" in shown
        assert "0 of 2" in shown
        assert "its limit of requests is used up, for another" in shown
        assert "good#1" not in shown
        assert "rate limited for" in await text(tab, "#replicas")
        assert tab.errors == []


async def test_what_others_named_is_shown_as_text(browser: Browser) -> None:
    """Markup in a fleet's name or a request's identifier stays what it is."""
    async with running(FLEET) as serving:
        await ask(serving, **{"X-Request-ID": "a<b>c"})
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until(f"{ROWS} === 1")
        assert await text(tab, "#fleet") == EVIL
        assert await tab.run("document.querySelectorAll('img').length") == 0
        assert await tab.run("document.title") == f"{EVIL} · kvfleet"
        assert tab.errors == []


async def test_the_newest_decisions_are_shown_and_the_others_on_demand(browser: Browser) -> None:
    """Fifteen on a desk, six on a phone, all of them at the press of a button; what comes later does not take them away."""
    async with running(FLEET) as serving:
        await ask(serving, times=18)
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until(f"{ROWS} === 15")
        await tab.size(390, 844)
        await tab.until(f"{ROWS} === 6")
        await tab.run("document.querySelector('#routes button.more').click()")
        await tab.until(f"{ROWS} === 18")
        await ask(serving)
        await tab.until(f"{ROWS} === 19")


async def test_a_decision_opens_as_a_waterfall_by_keyboard(browser: Browser) -> None:
    """Enter on a decision opens it: stages, drops with rules, candidates with units, attempts; Escape goes back."""
    async with running(FLEET) as serving:
        await ask(serving)
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until(f"{ROWS} === 1")
        for _ in range(20):
            await tab.press("Tab")
            if await tab.run("document.activeElement.matches('#routes button')"):
                break
        assert "Open the decision of" in str(await tab.run("document.activeElement.getAttribute('aria-label')"))
        await tab.press("Enter")
        await tab.until("document.querySelector('#trace[open] .fall')")
        shown = await text(tab, "#trace")
        for words in (
            "filter.policy",
            "open#1",
            "Candidates",
            "quality",
            "Dropped",
            "Attempts",
            "overloaded",
            "answered",
        ):
            assert words in shown
        assert await tab.run("document.querySelector('#trace').contains(document.activeElement)") is True
        await ask(serving)
        await tab.until(f"{ROWS} === 2")  # the list is drawn anew behind the decision
        await tab.press("Escape")
        await tab.until("!document.querySelector('#trace').open")
        await tab.until("document.activeElement.matches('#routes button')")
        assert tab.errors == []


async def test_the_key_is_asked_for_and_never_stands_in_an_address(browser: Browser) -> None:
    """A wrong key is refused with a word, the right one opens; it is kept for this tab and sent as a header."""
    async with running(FLEET, api_key="s3cret") as serving:
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until("!document.querySelector('#door').hidden")
        assert await tab.run("document.querySelector('#board').hidden") is True
        assert await tab.run("document.activeElement.id") == "key"
        await tab.type("wrong")
        await tab.press("Enter")
        await tab.until("document.querySelector('#refusal').textContent.includes('not one of')")
        await tab.type("s3cret")
        await tab.press("Enter")
        await tab.until("!document.querySelector('#board').hidden")
        assert await tab.run("sessionStorage.getItem('kvfleet-key')") == "s3cret"
        assert (
            await tab.run("Object.values(localStorage).includes('s3cret') || document.cookie.includes('s3cret')")
            is False
        )
        assert not any("s3cret" in url for url in tab.urls)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
async def test_it_fits_and_can_be_read(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    """On a desk and on a phone, light and dark: nothing sticks out, and text stands out from its ground by 4.5 to 1."""
    async with running(FLEET) as serving:
        await ask(serving, times=3)
        tab = await opened(browser, f"{serving.url}/dashboard", width, 740, dark=dark)
        await tab.until(f"{ROWS} === 3")
        assert await tab.run("document.documentElement.scrollWidth <= innerWidth") is True
        assert await tab.run(CONTRAST) == []
        assert len(await tab.picture(tmp_path / "page.png")) > 10_000
        await tab.run("document.querySelector('#routes button').click()")
        await tab.until("document.querySelector('#trace[open] .fall')")
        assert await tab.run(
            "document.querySelector('#trace').scrollWidth <= document.querySelector('#trace').clientWidth"
        )
        assert await tab.run(CONTRAST) == []
        assert tab.errors == []


@pytest.mark.parametrize("width", [1200, 360])
async def test_budgets_have_a_section_if_the_fleet_has_them(browser: Browser, tmp_path: Path, width: int) -> None:
    """What stages tell of themselves is shown under its own name, also on a phone, and nothing sticks out."""
    config = attrs.evolve(
        FLEET,
        budget=BudgetConfig(enabled=True, monthly_budget_usd=5000),
        tenants={"team-a": TenantConfig(budget=BudgetConfig(enabled=True, monthly_budget_usd=50))},
    )
    async with running(config, router=Router(config, state_dir=tmp_path)) as serving:
        tab = await opened(browser, f"{serving.url}/dashboard", width)
        await tab.until("document.querySelector('#stages section[aria-label=Budgets] tbody')")
        shown = await text(tab, "#stages section[aria-label=Budgets]")
        assert "$5,000.00" in shown
        assert "team-a" in shown
        assert await tab.run("document.documentElement.scrollWidth <= innerWidth") is True
        cramped = "[...document.querySelectorAll('td, th')].filter(c => c.textContent && c.clientWidth < 18).length"
        assert await tab.run(cramped) == 0
        assert tab.errors == []


async def test_a_tenant_s_key_is_told_why_it_does_not_open(browser: Browser) -> None:
    """The page says so, and asks for another key."""
    config = attrs.evolve(
        FLEET,
        tenants={"team-a": TenantConfig()},
        gateway=GatewayConfig(api_key="operator", api_keys={"team-a": "theirs"}),
    )
    async with running(config) as serving:
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until("!document.querySelector('#door').hidden")
        await tab.type("theirs")
        await tab.press("Enter")
        await tab.until("document.querySelector('#refusal').textContent.includes('all tenants')")
        assert await tab.run("document.querySelector('#board').hidden") is True


async def test_the_colours_can_be_switched_and_stay(browser: Browser) -> None:
    """The switch goes against the system's wish, and is remembered."""
    async with running(FLEET) as serving:
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until("!document.querySelector('#board').hidden")
        ground = "getComputedStyle(document.body).backgroundColor"
        light = await tab.run(ground)
        await tab.run("document.querySelector('#theme').click()")
        dark = await tab.run(ground)
        assert dark != light
        await tab.go(f"{serving.url}/dashboard")
        await tab.until("!document.querySelector('#board').hidden")
        assert await tab.run(ground) == dark


async def test_the_measure_of_contrast_sees_what_is_faint(browser: Browser) -> None:
    """A measure that found nothing anywhere would let every page pass."""
    async with running(FLEET) as serving:
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until("!document.querySelector('#board').hidden")
        await tab.run("document.querySelector('#about').style.color = '#c0c4ca'")
        assert len(await tab.run(CONTRAST)) == 1


async def test_everything_has_a_name(browser: Browser) -> None:
    """What can be used, and every picture, table and part of the page, has a name that is read aloud."""
    async with running(FLEET) as serving:
        await ask(serving)
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until(f"{ROWS} === 1")
        tree = (await tab.send("Accessibility.getFullAXTree"))["nodes"]
        named = {"button", "image", "table", "region", "heading", "textbox", "dialog"}
        nameless = [
            node["role"]["value"]
            for node in tree
            if not node.get("ignored") and node["role"]["value"] in named and not node.get("name", {}).get("value")
        ]
        assert nameless == []
        assert {"button", "table", "region", "heading"} <= {node.get("role", {}).get("value") for node in tree}


async def test_the_stream_ends_with_the_tab(browser: Browser) -> None:
    """Nobody is counted as watching who has left."""
    async with running(attrs.evolve(FLEET, fleet_name="shop")) as serving:
        tab = await opened(browser, f"{serving.url}/dashboard")
        await tab.until("document.querySelector('#link').textContent === 'live'")
        assert serving.gateway.board.watchers == 1
        await tab.go("about:blank")
        with anyio.fail_after(10):
            while serving.gateway.board.watchers:
                await anyio.lowlevel.checkpoint()
        assert serving.gateway.meters.left == 0


async def test_a_program_s_own_state_is_shown_by_the_same_page(browser: Browser) -> None:
    """`start_dashboard` shows what was recorded, with its limits and budgets, and asks again by itself."""
    state = DashboardState()
    state.record_route(
        prompt_preview=EVIL, selected_model="m", strategy="semantic", latency_ms=350.0, scores={"m": 0.85}
    )
    state.update_health("m", "http://gpu-1:8000", healthy=True, latency_ms=50)
    state.update_budgets({"team-a": {"spent_usd": 3.2}})
    server = start_dashboard(state, port=0)
    try:
        tab = await opened(browser, f"http://127.0.0.1:{server.server_port}/")
        await tab.until(f"{ROWS} === 1")
        assert EVIL in await text(tab, "#routes")
        assert "team-a" in await text(tab, "#stages")
        assert "gpu-1:8000" in await text(tab, "#replicas")
        state.record_route(selected_model="m")
        await tab.until(f"{ROWS} === 2")
        assert tab.errors == []
    finally:
        server.shutdown()
        server.server_close()


CONTRAST = """(() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const parts = (colour) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const found = parts(getComputedStyle(node).backgroundColor);
            if (found[3] === 255) return found;
        }
        return [255, 255, 255];
    };
    const root = document.querySelector("dialog[open]") || document.body;
    return [...root.querySelectorAll("*")]
        .filter((node) => node.checkVisibility() && [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim()))
        .filter((node) => !["STYLE", "SCRIPT", "NOSCRIPT"].includes(node.tagName))
        .filter((node) => {
            const [a, b] = [light(parts(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05) < 4.5;
        })
        .map((node) => node.outerHTML.slice(0, 80));
})()"""
