"""The pages: what is in them is what torch computes from the run; they work in a browser, offline."""

import base64
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, load, one_line, run_inside
from PIL import Image

TINY = ("--steps 3 --batch 32 --width 10 --depth 2 --pairs 64 --pair-steps 2 --eval-size 64 --w2-size 16 --device cpu "
        "--log-every 3").split()
PAGE = ROOT / "notebooks" / "explorer.html"
SLICE = ROOT / "notebooks" / "slice.html"
rf = load("01_rectified_flow")
chapter_4 = load("04_distill")


def load_builder():
    """notebooks/explorer.py as a module."""
    spec = importlib.util.spec_from_file_location("explorer", ROOT / "notebooks" / "explorer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


explorer = load_builder()


def content(page):
    """What the builder put into a page."""
    return json.loads(re.search(r'<script type="application/json" id="run">(.*?)</script>', page.read_text(), re.S)[1])


def decoded(text):
    """The numbers of a base64 of float16."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32))


def network(packed):
    """A flow of a page as chapter 1's network, by the description in the builder alone."""
    shapes, numbers = packed["shapes"], decoded(packed["weights"])
    flow = rf.VelocityMLP(width=shapes[0][0], depth=len(shapes) - 1).requires_grad_(False)
    linear = [layer for layer in flow.layers if isinstance(layer, torch.nn.Linear)]
    for layer, (outputs, inputs) in zip(linear, shapes, strict=True):
        weight, bias, numbers = numbers.split([outputs * inputs, outputs, len(numbers) - outputs * (inputs + 1)])
        layer.weight.copy_(weight.reshape(outputs, inputs))
        layer.bias.copy_(bias)
    assert len(numbers) == 0
    return flow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """built(*flags): folder and page of a tiny run of chapter 1."""
    def built(*flags):
        cwd = tmp_path_factory.mktemp("run")
        run_inside(rf, *TINY, *flags, "--out", "run", cwd=cwd,
                   change=lambda patch: patch.setattr(rf, "draw_paths", lambda *arguments: None))
        explorer.main([str(cwd / "run"), "--out", str(cwd / "page.html")])
        return cwd / "run", cwd / "page.html"
    return built


@pytest.fixture
def distilled(tmp_path):
    """Folder of a tiny run of chapter 4, and its networks by name.  None is trained: they need not know anything."""
    config = chapter_4.Config(image_size=8, channels=4, attention=(4,), seed=3)
    run, flows = tmp_path / "runs" / "04_distill" / "quick", {}
    torch.manual_seed(0)
    files = {"1-RF": "../../02_reflow/quick/1-rf", "rf": "rf", "progressive": "progressive-1", "ict": "ict"}
    for name, file in files.items():
        flows[name] = chapter_4.Flow(config, 3, 32).eval().requires_grad_(False)
        for weights in flows[name].parameters():
            weights += 0.1 * torch.randn_like(weights)
        chapter_4.save_checkpoint(run / f"{file}.pt", config=dataclasses.asdict(config),
                                  model=flows[name].state_dict())
    settings = dataclasses.asdict(config)
    rf.save_json(run / "run.json", {"script": "04_distill.py", "settings": settings})
    rf.save_json(run / "results.json", {"methods": {"real data": {}} | {name: {} for name in files}})
    return run, flows


def sprite(page):
    """The pictures of a slice, in bytes: (names, rows, columns, S, S, 3)."""
    run = content(page)
    image = Image.open(io.BytesIO(base64.b64decode(run["sprite"].split(",")[1])))
    side, size = run["side"], run["size"]
    return torch.from_numpy(np.array(image)).reshape(-1, side, size, side, size, 3).transpose(2, 3).float()


# ---- The builder -----------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_run(built):
    folder, page = built("--rounds", 2)
    for k, packed in enumerate(content(page)["flows"], 1):
        flow = rf.VelocityMLP(10, 2).requires_grad_(False)
        flow.load_state_dict(torch.load(folder / f"{k}-rf.pt", weights_only=True)["model"])
        x, t = torch.randn(50, 2), torch.rand(50)
        assert torch.allclose(network(packed)(x, t), flow(x, t), atol=1e-2)
        noise = decoded(content(page)["noise"]).reshape(-1, 2)
        ends = rf.integrate(flow, noise, 200, "heun")[-1]
        assert torch.allclose(decoded(packed["ends"]).reshape(-1, 2), ends, atol=1e-2)
    assert content(page)["shuffled"]["steps"] == 3


def test_shuffled_training_keeps_noises_and_ends_but_not_the_pairs(monkeypatch):
    draws = []
    monkeypatch.setattr(rf, "draw_stored", lambda z0, z1, n: draws.append((z0, z1)) or (z0[:n], z1[:n]))
    monkeypatch.setattr(explorer, "rf", rf)
    first = rf.VelocityMLP(10, 2).requires_grad_(False)
    explorer.train_shuffled(first, rf.Config(steps=1, batch=8, pairs=64, pair_steps=2, width=10, depth=2))
    z0, torn = draws[0]
    _, z1 = rf.make_pairs(first, z0, 2)
    assert not torch.equal(torn, z1)
    assert torch.equal(torn.sort(0).values, z1.sort(0).values)


@pytest.mark.parametrize("spoil, words", [
    (lambda run: shutil.rmtree(run), "holds no run of 01_rectified_flow.py"),
    (lambda run: (run / "run.json").write_text('{"script": "02_reflow.py", "settings": {}}'), "holds no run"),
    (lambda run: (run / "run.json").write_text("["), "holds no run"),
    (lambda run: (run / "results.json").unlink(), "is not finished"),
    (lambda run: (run / "1-rf.pt").unlink(), "1-rf.pt is missing"),
    (lambda run: (run / "1-rf.pt").write_bytes(b"no"), "1-rf.pt is broken"),
    (lambda run: rf.save_checkpoint(run / "1-rf.pt", config={}, model=rf.VelocityMLP(7).state_dict()), "does not fit"),
], ids=["nothing", "another script's", "half a file", "not finished", "missing", "broken", "another width"])
def test_errors_in_one_line(tmp_path, capsys, spoil, words):
    run, page = tmp_path / "run", tmp_path / "page.html"
    run.mkdir()
    settings = dict(vars(rf.Config(rounds=1)))
    (run / "run.json").write_text(json.dumps({"script": "01_rectified_flow.py", "settings": settings}))
    (run / "results.json").write_text('{"rounds": [{"loss_by_t": []}]}')
    rf.save_checkpoint(run / "1-rf.pt", config={}, model=rf.VelocityMLP().state_dict())
    spoil(run)
    with pytest.raises(SystemExit, match="2"):
        explorer.main([str(run), "--out", str(page)])
    one_line(capsys.readouterr().err, words)
    assert not page.exists()


def test_the_committed_page_is_the_template_with_a_default_run():
    page, template = PAGE.read_text(), (PAGE.parent / "explorer_template.html").read_text()
    numbers = re.search(r'id="run">(.*?)</script>', page, re.S)[1]
    assert page.replace(numbers, explorer.PLACE) == template, "build it again: see notebooks/explorer.py"
    assert "<" not in numbers
    assert len(page.encode()) <= 600_000
    assert not re.search(r"https?://|@import|url\(", page)                 # a browser has no server to ask
    run, default = json.loads(numbers), rf.Config()
    assert (len(run["flows"]), run["width"], run["steps"]) == (default.rounds, default.width, default.steps)


def test_corners_of_the_slice_are_chapter_4s_own_pictures(distilled, tmp_path, monkeypatch):
    """Three corners: pictures that the run itself draws, of noises 22, 54 and 86, all of class 22."""
    folder, flows = distilled
    monkeypatch.setattr(explorer, "load_chapter", lambda name: chapter_4)
    monkeypatch.setattr(chapter_4, "UserError", chapter_4.UserError)            # the builder changes it
    monkeypatch.setattr(chapter_4, "JUMP_TIMES", [0.7])                         # later, to tell ict's jump from a step
    explorer.main([str(folder), "--out", str(tmp_path / "page.html")])
    assert content(tmp_path / "page.html")["names"] == ["the noise", "1-RF, 20 evaluations", *flows]
    cells = sprite(tmp_path / "page.html")[2:]
    index = torch.tensor([22, 54, 86])
    noise = chapter_4.pair_noise(chapter_4.seed_for(3, 999), index, (3, 8, 8))
    for picture, (name, flow) in zip(cells, flows.items(), strict=True):
        drawn = chapter_4.Generator(flow, name)(noise, index % 32)
        drawn = chapter_4.to_bytes(drawn).permute(0, 2, 3, 1).float()
        corners = torch.stack([picture[0, 0], picture[0, -1], picture[-1, 0]])
        error = (corners[:, None] - drawn).square().mean((2, 3, 4)).sqrt()      # (corners, noises)
        assert error.diagonal().max() < 12 and error.fill_diagonal_(1e9).min() > 20     # JPEG of mere noise: 9


def test_noises_between_three_are_as_long_as_noise():
    corners = torch.randn(3, 10000)
    noise = explorer.noises_between(corners).reshape(17, 17, -1)
    assert torch.allclose(torch.stack([noise[0, 0], noise[0, -1], noise[-1, 0]]), corners)
    assert torch.allclose(noise.std(2), torch.ones(17, 17), atol=0.05)
    assert torch.allclose(noise[8, 8], (corners[1] + corners[2]) / 2**0.5, atol=1e-5)


@pytest.mark.parametrize("name", ["rf.pt", "../../02_reflow/quick/1-rf.pt"])
def test_a_slice_without_its_networks_is_one_line(distilled, tmp_path, capsys, name):
    (distilled[0] / name).unlink()
    with pytest.raises(SystemExit, match="2"):
        explorer.main([str(distilled[0]), "--out", str(tmp_path / "page.html")])
    one_line(capsys.readouterr().err.splitlines()[-1], name.split("/")[-1], "is missing")


def test_the_committed_slice_is_the_template_with_a_default_run():
    page, template = SLICE.read_text(), (SLICE.parent / "slice_template.html").read_text()
    numbers = re.search(r'id="run">(.*?)</script>', page, re.S)[1]
    assert page.replace(numbers, explorer.PLACE) == template, "build it again: see notebooks/explorer.py"
    assert len(page.encode()) <= 1_500_000 and not re.search(r"https?://|@import|url\(", page)
    assert len(json.loads(numbers)["names"]) == 12 and sprite(SLICE).shape == (12, 17, 17, 16, 16, 3)


# ---- In a browser ----------------------------------------------------------------------------------------------------

SETTLED = """const done = arguments[0];
(function look(quiet) {
  const busy = explorer.isWaiting() || explorer.panels.some(panel => panel.moving);
  if (quiet > 3) done(); else requestAnimationFrame(() => look(busy ? 0 : quiet + 1));
})(0);"""


class Browser:
    """A page opened from disk in headless Chromium, and what a test does with it."""

    def __init__(self, driver):
        self.driver = driver
        self.js = driver.execute_script

    def open(self, page):
        """Open a page from disk, wait until all is drawn."""
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)                       # of the page before
        self.driver.get(page.as_uri())
        self.settle()

    def settle(self):
        self.driver.execute_async_script(SETTLED)

    def do(self, script):
        self.js(script)
        self.settle()

    def slide(self, name, value):
        """Move a slider as a hand would: the value, then its event."""
        self.do(f"const slider = document.getElementById('{name}'); slider.value = {value};"
                "slider.dispatchEvent(new Event('input'))")

    def number(self, panel, name):
        """A number that stands below a panel; panel 0 holds the pairs."""
        return self.numbers(panel, name)[0]

    def numbers(self, panel, name):
        text = self.js(f"return explorer.panels[{panel}].box.querySelector('[data-id=\"{name}\"]').textContent")
        return [float(number) for number in re.findall(r"[-\d.]+", text.replace("\u2212", "-"))]

    def complaints(self):
        """Lines on the console and addresses that were asked for, but for the page itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return self.driver.get_log("browser") + [url for url in asked if url != self.driver.current_url
                                                 and not url.startswith("data:")]


@pytest.fixture(scope="module")
def chromium():
    """A browser, or the reason why there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver here; Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in ("--headless=new", "--window-size=1280,1000", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")                # Chromium refuses to be started by root with it
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.set_script_timeout(120)
    yield Browser(browser)
    browser.quit()


@pytest.fixture
def page(chromium):
    """The committed page, opened anew; at the end nothing may have been complained about."""
    chromium.open(PAGE)
    yield chromium
    assert chromium.complaints() == []


def test_paths_are_those_of_torch(page):
    """The landing of N Euler steps, the exact end and the velocity, of every flow."""
    run = content(PAGE)
    starts = torch.tensor([[0.3, -1.2], [1.4, 0.9], [-2.0, 0.1]])
    flows = {f"flows[{k}]": flow for k, flow in enumerate(run["flows"])} | {"shuffledFlow": run["shuffled"]}

    def end(name, path):
        return torch.tensor([page.js(f"return explorer.{path.format(f'explorer.{name}.velocity, {start}')}.at(-1)")
                             for start in starts.tolist()])
    for name, packed in flows.items():
        flow = network(packed)
        for steps in (1, 7, 50):
            landing = end(name, f"euler({{}}, {steps})")
            assert torch.allclose(landing, rf.integrate(flow, starts, steps)[-1], atol=1e-2)
        assert torch.allclose(end(name, "exactPath({})"), rf.integrate(flow, starts, 400, "heun")[-1], atol=1e-2)
    t = torch.tensor([0.0, 0.4, 0.9])
    exact = [page.js(f"return explorer.exactFlow.velocity({x}, {y}, {time})")
             for (x, y), time in zip(starts.tolist(), t.tolist())]
    assert torch.allclose(torch.tensor(exact), rf.exact_velocity(starts, t), atol=1e-3)


@pytest.mark.parametrize("pointer", ["mouse", "touch"])
def test_drag_the_ring(page, pointer):
    """The ring follows, its numbers are torch's; how many frames a second there were is printed, not judged."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    page.slide("steps", 3)
    page.js("window.frames_seen = []; (function note(now) { frames_seen.push(now); requestAnimationFrame(note); })(0)")
    hand = ActionBuilder(page.driver, mouse=PointerInput(pointer, pointer), duration=30)
    hand.pointer_action.move_to(page.js("return explorer.panels[2].handle")).pointer_down()
    for i in range(20):
        hand.pointer_action.move_by(round(12 * math.cos(i / 4)), round(9 * math.sin(i / 4)))
    hand.perform()
    page.settle()
    assert page.js("return explorer.state.noise") != pytest.approx([-0.7, 1.75], abs=0.3)      # before it is let go
    seen = page.js("return frames_seen")[1:]
    print(f"frames per second: {1000 * (len(seen) - 1) / (seen[-1] - seen[0]):.0f}")
    hand.clear_actions()                                    # lets go
    page.settle()
    start = torch.tensor([page.js("return explorer.state.noise")])
    for k, packed in enumerate(content(PAGE)["flows"], 1):
        path = rf.integrate(network(packed), start, 400, "heun")[:, 0]
        few = rf.integrate(network(packed), start, 3)[-1, 0]
        ratio = path.diff(dim=0).norm(dim=1).sum() / (path[-1] - path[0]).norm()
        assert page.numbers(k, "end") == pytest.approx(path[-1].tolist(), abs=0.03)
        assert page.number(k, "miss") == pytest.approx((few - path[-1]).norm().item(), abs=0.03)
        assert page.number(k, "ratio") == pytest.approx(ratio.item(), abs=0.01)


def test_one_step_of_the_first_flow_lands_on_the_mean_and_shuffling_brings_that_back(page):
    page.slide("steps", 1)
    assert page.number(1, "all") > 4.5 and page.number(2, "all") < 0.2 and page.number(3, "all") < 0.2
    page.do("document.getElementById('exact').click()")                    # the network is not to blame
    assert page.number(1, "all") > 4.5
    page.do("document.getElementById('shuffled').click()")
    assert page.number(2, "all") > 4.5 and page.js("return explorer.panels[0].title.textContent") == "Shuffled pairs"
    page.slide("steps", 50)
    assert page.number(1, "all") < 0.2 and page.number(2, "all") < 0.2


def test_a_border_flips_the_mode(page):
    """By keyboard: one press beside the border moves the end further than ten presses away from it."""
    from selenium.webdriver.common.keys import Keys
    page.do("document.querySelector('[data-show=border] button').click()")
    ring = page.driver.switch_to.active_element
    ends = []
    for key in [Keys.ARROW_DOWN] * 3 + [Keys.ARROW_UP] * 6:
        ring.send_keys(key)
        page.settle()
        ends.append([page.numbers(k, "end") for k in (1, 2, 3)])
    jumps = torch.tensor(ends).diff(dim=0).norm(dim=2)                     # (presses, flows)
    assert (jumps.max(0).values > 1).all() and (jumps.median(0).values < 0.5).all()


def test_every_control_draws_something_else(page):
    """Play, time, the toggles and the examples change the picture; time comes to rest at its end."""
    seen = set()

    def picture():
        page.settle()
        return page.js("return [...document.querySelectorAll('canvas')].map(c => c.toDataURL()).join()")
    seen.add(picture())
    for name in ("arrows", "exact", "shuffled", "loss"):
        page.js(f"document.getElementById('{name}').click()")
        seen.add(picture())
    at_the_end = picture()
    page.slide("t", 0.4)
    seen.add(picture())
    page.js("document.getElementById('play').click()")
    page.driver.execute_async_script("const done = arguments[0]; (function look() {"
                                     "explorer.state.t < 1 ? requestAnimationFrame(look) : done() })()")
    assert picture() == at_the_end
    for name in ("bend", "one", "border", "shuffle"):
        page.js(f"document.querySelector('[data-show={name}] button').click()")
        seen.add(picture())
    assert len(seen) == 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280, 1920])
def test_nothing_is_wider_than_the_screen(page, width, scheme):
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
    page.settle()
    assert page.js("return document.documentElement.scrollWidth") <= width
    tops = page.js("return explorer.panels.map(panel => panel.box.getBoundingClientRect().top)")
    assert (len(set(tops)) == 1) == (width > 1000) and (len(set(tops)) == 4) == (width < 600)
    background = page.js("return getComputedStyle(document.documentElement).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("flags", [["--rounds", 1, "--target", "two_moons"], ["--rounds", 5, "--width", 6]], ids=str)
def test_other_runs(chromium, built, flags):
    """Of another target, number of rounds, width: no exact v*, nothing to shuffle in a single round."""
    _, page = built(*flags)
    chromium.open(page)
    run = content(page)
    assert len(chromium.js("return explorer.panels")) == len(run["flows"]) + 1
    hidden = chromium.js("return ['exact', 'shuffled'].map(id => document.getElementById(id).checkVisibility())")
    assert hidden == ["mixture" in run, "shuffled" in run]
    end = chromium.js("return explorer.euler(explorer.flows.at(-1).velocity, [0.5, -0.5], 5).at(-1)")
    torchs = rf.integrate(network(run["flows"][-1]), torch.tensor([[0.5, -0.5]]), 5)[-1, 0]
    assert end == pytest.approx(torchs.tolist(), abs=1e-2)
    chromium.do("document.querySelector('[data-show=border] button').click(); document.getElementById('loss').click()")
    assert chromium.complaints() == []


@pytest.mark.parametrize("width", [360, 1280])
def test_moving_over_the_slice_changes_all_pictures(chromium, width):
    """By keys and by mouse: every tile shows the cell where the ring is; at the border the flow itself jumps most."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    chromium.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    chromium.open(SLICE)
    cells = sprite(SLICE)

    def shown():
        """(column, row) of the ring, which must be the cell of every tile."""
        place = chromium.js("return [explorer.state.column, explorer.state.row]")
        tiles = chromium.js("return explorer.tiles.map(({picture}) => [...picture])")
        for tile, sheet in zip(torch.tensor(tiles).float(), cells, strict=True):
            error = (sheet - tile.reshape(16, 16, 4)[..., :3]).abs().mean((2, 3, 4))
            assert divmod(error.argmin().item(), 17) == (place[1], place[0])
        return place

    column, row = shown()
    ring = chromium.driver.find_element("id", "ring")
    ring.send_keys(Keys.ARROW_DOWN)
    assert shown() == [column, row + 1]
    notes = chromium.js("return explorer.tiles.map(({note}) => note.textContent)")
    flow, *others = [float(note.removeprefix("changed by ")) for note in notes[1:]]
    assert flow > max(others)
    ring.send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert shown() == [column - 1, row]
    cell = chromium.js("return document.getElementById('stage').clientWidth") / 17
    ActionChains(chromium.driver).click_and_hold(ring).move_by_offset(round(3 * cell), round(-2 * cell)).perform()
    assert shown() == [column + 2, row - 2]
    ActionChains(chromium.driver).release().perform()
    chromium.js("explorer.tiles[3].box.click()")
    assert chromium.js("return document.getElementById('shown').textContent") == "2-RF"
    assert chromium.js("return document.documentElement.scrollWidth") <= width
    chromium.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert chromium.complaints() == []
