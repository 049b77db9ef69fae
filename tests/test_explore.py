"""The interactive page in a real browser: the static book's controls, and the same notebook live in JupyterLab."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, export_code
from nbclient import NotebookClient
from nbformat.sign import NotebookNotary
from playwright.sync_api import expect

from book.ledger import certificates
from nb_utils import tasks
from nb_utils.record import tables
from nb_utils.show import widgets
from nb_utils.statistics import rows

SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PAIRS = "\n".join(f"a{i} -> b" for i in range(20))
WAIT = 120_000  # milliseconds; only a broken page waits so long


def watched(context, inside):
    """Open a tab that notes every complaint of the page: foreign requests, errors, what was not found."""
    tab, complaints = context.new_page(), []
    tab.on("request", lambda seen: seen.url.startswith(inside) or complaints.append(f"asked for {seen.url}"))
    tab.on("console", lambda seen: seen.type == "error" and complaints.append(seen.text))
    tab.on("pageerror", lambda seen: complaints.append(str(seen)))
    tab.on("dialog", lambda seen: complaints.append(f"opened a dialog: {seen.message}"))
    return tab, complaints


def text(box, name):
    return box.locator(f'[data-field="{name}"]').inner_text()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desk", "phone"])
def page(request, browser, built):
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, complaints = watched(context, (built.resolve().as_uri(), "data:", "blob:"))
    tab.goto((built / "book/explore.html").resolve().as_uri(), timeout=WAIT)
    tab.locator(".nbw").first.wait_for(timeout=WAIT)
    yield tab
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()
    assert not complaints


def stored(grid, task, layer, latent, scale):
    at = (grid["task"] == task) & (grid["layer"] == layer) & (grid["latent"] == latent) & (grid["scale"] == scale)
    return grid[at & (grid["target"] == task)].iloc[0]


def test_the_static_control_moves_and_shows_the_right_cell_of_the_grid(page):
    grid = tables.load("explore_steering")
    box = page.get_by_role("group", name="Steering control")
    assert box.get_attribute("data-mode") == "precomputed" and "Precomputed" in box.inner_text()
    assert not box.locator('[data-field="prompt"]').is_visible(), "a control that could do nothing"
    own = grid[grid["task"] == grid["target"]]
    scales = sorted(own["scale"].unique())
    for task, layer, example in (("en_es", 10, 1), ("antonyms", 6, 0)):
        latent = int(own[(own["task"] == task) & (own["layer"] == layer) & (own["latent"] >= 0)]["latent"].iloc[3])
        box.locator('[data-field="task"]').select_option(task)
        box.locator('[data-field="layer"]').select_option(str(layer))
        box.locator('[data-field="example"]').select_option(str(example))
        box.locator('[data-field="search"]').fill(str(latent))
        box.locator('[data-field="feature"]').select_option(str(latent))
        assert text(box, "ticks") == certificates.in_words()[task]
        slider = box.locator('[data-field="scale"]')
        for place in (0, len(scales) - 2):
            slider.fill(str(place))
            cell = stored(grid, task, layer, latent, scales[place])
            shown = cell["examples"][example]
            assert text(box, "loss-after") == f"{shown['loss']:.2f}".replace("-", "−")
            assert text(box, "rank-after") == str(shown["rank"])
            assert text(box, "mean-after") == f"{cell['loss']:.2f}"
            assert text(box, "accuracy-after") == f"{int(100 * cell['accuracy'] + 0.5)} %"
            tokens = box.locator(".nbw-bars").nth(1).locator("code").all_inner_texts()
            marks = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
            assert tokens == [token.translate(marks) for token in shown["tokens"]]


def test_the_address_leads_back_to_what_was_shown(page):
    assert not page.url.partition("#")[2], "nobody has moved anything"
    box = page.get_by_role("group", name="Steering control")
    box.locator('[data-field="task"]').select_option("en_es")
    box.locator('[data-field="layer"]').select_option("10")
    box.locator('[data-field="feature"]').select_option(index=2)
    box.locator('[data-field="example"]').select_option("1")
    box.locator('[data-field="scale"]').fill("3")
    shown = ("task", "layer", "feature", "example", "scale"), ("scale-text", "mean-after", "loss-after")

    def state(of):
        given = [of.locator(f'[data-field="{name}"]').input_value() for name in shown[0]]
        return given + [text(of, name) for name in shown[1]]

    other = page.context.new_page()
    other.goto(page.url, timeout=WAIT)
    there = other.get_by_role("group", name="Steering control")
    there.wait_for(timeout=WAIT)
    assert state(there) == state(box)
    for wrong in ("#task=none&block=10&feature=1", "#task=en_es&block=10&feature=-7&scale=x&example=99", "#%"):
        other.goto("about:blank")
        other.goto(page.url.partition("#")[0] + wrong, timeout=WAIT)
        there.wait_for(timeout=WAIT)
        assert text(there, "mean-after")


def test_the_first_page_shows_a_control_without_scrolling(page, built):
    page.goto((built / "book/index.html").resolve().as_uri(), timeout=WAIT)
    box = page.get_by_role("group", name="One vector, one slider")
    box.wait_for(timeout=WAIT)
    slider = box.locator('[data-field="scale"]')
    assert slider.bounding_box()["y"] < 900
    data = json.loads(widgets.glance().data)["tasks"]["en_es"]
    box.locator('[data-field="task"]').select_option("en_es")
    for place in (0, data["scales"].index(data["start"])):
        slider.fill(str(place))
        accuracy = int(100 * data["accuracy"][place] + 0.5)
        assert f"{accuracy} % right, loss {data['loss'][place]:.2f} nats" in text(box, "mean")
        said = box.locator("li").first.inner_text()
        assert data["views"][place][0][0].strip() in said and data["examples"][0][0] in said
        assert ("right" in said.split("%")[1]) == data["views"][place][0][2]


def test_the_static_control_is_moved_by_the_keyboard_alone(page):
    box = page.get_by_role("group", name="Steering control")
    slider = box.locator('[data-field="scale"]')
    slider.focus()
    before = text(box, "scale-text"), text(box, "mean-after")
    page.keyboard.press("ArrowRight")
    after = text(box, "scale-text"), text(box, "mean-after")
    assert before[0] != after[0] and before[1] != after[1]
    assert slider.get_attribute("aria-valuetext") == after[0]
    for control in box.locator("select:visible, input:visible, textarea:visible").all():
        assert control.evaluate("node => node.labels.length > 0 || node.hasAttribute('aria-label')")


def test_the_static_strip_follows_its_menus(page):
    strip = page.get_by_role("group", name="Token strip")
    frame = tables.load("explore_tokens")
    strip.locator('[data-field="task"]').select_option("en_es")
    strip.locator('[data-field="layer"]').select_option("10")
    part = frame[(frame["task"] == "en_es") & (frame["layer"] == 10) & (frame["role"] == "executor")]
    numbers = strip.locator(".nbw-strip").nth(1).locator("small").all_inner_texts()
    fired = part.sort_values("position")["activation"].tolist()
    assert numbers == ["–", *(str(int(a + 0.5)) if a > 0 else "·" for a in fired[1:])]
    assert f"latent {part['latent'].iloc[0]}" in strip.inner_text()


def test_without_javascript_words_and_numbers_stand_where_the_controls_would(browser, built):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((built / "book/explore.html").resolve().as_uri(), timeout=WAIT)
    said = tab.locator("article").inner_text()
    assert said.count("A control stands here, which JavaScript draws") == 3 and "nats unsteered; at best" in said
    assert ":has(" not in said and tab.locator(".nbw").count() == 0
    context.close()


def test_without_a_kernel_the_workbench_offers_nothing_that_could_not_work(page):
    bench = page.get_by_role("group", name="Clean your own vector")
    assert "make lab" in bench.inner_text()
    assert bench.locator("button, input, select, textarea").count() == 0


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Serve a copy of the page in JupyterLab, on 127.0.0.1 with a token; return its address and token."""
    home, settings = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings")
    (home / "book").mkdir()
    (home / "book/explore.ipynb").write_bytes((ROOT / "book/explore.ipynb").read_bytes())
    for name, values in SETTINGS.items():
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        Path(sys.executable).with_name("jupyter"), "lab", "--ip", "127.0.0.1", "--port", str(port), "--no-browser",
        "--allow-root", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home}",
        "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly",
        "--LabApp.news_url=", f"--LabApp.workspaces_dir={settings}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(settings)}
    log = (settings / "log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=home)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert server.poll() is None, (settings / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address, token, home
    finally:
        server.terminate()
        server.wait(30)
        log.close()


RUN_ALL = """async () => {
  const app = window.jupyterapp;
  for (;;) {
    const panel = app.shell.currentWidget;
    if (panel?.sessionContext) {
      await panel.context.ready;
      await panel.sessionContext.ready;
      await panel.sessionContext.session.kernel.info;
      return await app.commands.execute("notebook:run-all-cells");
    }
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}"""


@pytest.fixture(scope="module")
def live(browser, lab):
    """Open the page in JupyterLab and run all cells; return the tab once its controls are live."""
    address, token, _ = lab
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    inside = (address, address.replace("http", "ws"), "data:", "blob:")
    tab, complaints = watched(context, inside)
    tab.goto(f"{address}/lab/tree/book/explore.ipynb?token={token}", timeout=WAIT)
    tab.wait_for_function("window.jupyterapp", timeout=WAIT)
    tab.evaluate(RUN_ALL)
    for name in ("Steering control", "Clean your own vector", "Token strip"):
        tab.locator(f'.nbw[aria-label="{name}"][data-mode="live"]').wait_for(timeout=WAIT)
    assert tab.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
    yield tab
    context.close()
    assert not complaints


def test_a_saved_page_opened_again_says_what_to_do_and_shows_numbers_in_place_of_its_controls(browser, lab):
    """Saved with its outputs, by a kernel that has ended: the controls are gone with it."""
    address, token, home = lab
    page, inside = nbformat.read(ROOT / "book/explore.ipynb", as_version=4), {"metadata": {"path": str(home)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        NotebookClient(page, store_widget_state=False, resources=inside).execute()
    nbformat.write(page, home / "book/saved.ipynb")
    NotebookNotary().sign(page)
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(f"{address}/lab/workspaces/saved/tree/book/saved.ipynb?token={token}", timeout=WAIT)  # a tab of its own
    tab.locator("[data-words]").nth(2).wait_for(timeout=WAIT)
    lost = tab.get_by_text("model not found")
    expect(lost).to_have_count(3, timeout=WAIT)
    assert not any(line.is_visible() for line in lost.all())
    assert tab.get_by_text("no JavaScript").count() == 0, "what JupyterLab makes of a noscript element"
    numbers = ("nats unsteered; at best", "", "detector ")
    for words, number in zip(tab.locator("[data-words]").all_inner_texts(), numbers, strict=True):
        assert "Run > Run All Cells" in words and number in words
    tab.close()


def settled(tab, box):
    tab.wait_for_function("box => !box.hasAttribute('aria-busy')", arg=box.element_handle(), timeout=WAIT)


@pytest.fixture(scope="module")
def backend():
    return widgets.Backend()


def test_steering_live_shows_the_numbers_of_the_modules(live, backend):
    from nb_utils import interventions
    from nb_utils.show import microscope

    box = live.get_by_role("group", name="Steering control")
    assert "Live" in box.locator(".nbw-status").inner_text()
    box.locator('[data-field="layer"]').select_option("10")
    box.locator('[data-field="example"]').select_option("own")
    box.locator('[data-field="prompt"]').fill("big ->")
    box.locator('[data-field="answer"]').fill("small")
    box.locator('[data-field="latent"]').fill("1123")
    box.locator('[data-field="latent"]').blur()
    place = widgets.LIVE_SCALES.index(0.25)
    box.locator('[data-field="scale"]').fill(str(place))
    settled(live, box)
    vector = backend.steering_vector("antonyms", 10, 1123, 0.25)
    site = backend.prompt("big ->", "small")
    view = microscope.views(site, vector, 10)[0][0]
    assert text(box, "loss-after") == f"{view.loss:.2f}"
    assert text(box, "rank-after") == str(view.rank)
    steered = interventions.Intervention({10: interventions.add(vector)})
    went_on = interventions.continuations(backend.model, site.prompts[0], steered, widgets.N_TOKENS)[0]
    assert text(box, "continuation-after") == (went_on.replace(" ", "␣") or "∅")
    first, whole = (box.get_attribute(f"data-{name}") for name in ("milliseconds", "whole"))
    print(f"the first numbers after {first} ms, all after {whole} ms")


def test_steering_live_agrees_with_the_grid_where_both_have_a_number(live):
    box = live.get_by_role("group", name="Steering control")
    box.locator('[data-field="task"]').select_option("antonyms")
    box.locator('[data-field="layer"]').select_option("8")
    box.locator('[data-field="example"]').select_option("2")
    box.locator('[data-field="feature"]').select_option(str(widgets.WHOLE))
    box.locator('[data-field="scale"]').fill(str(widgets.LIVE_SCALES.index(0.3)))
    settled(live, box)
    cell = stored(tables.load("explore_steering"), "antonyms", 8, widgets.WHOLE, 0.3)
    assert float(text(box, "loss-after")) == pytest.approx(cell["examples"][2]["loss"], abs=0.011)
    assert text(box, "rank-after") == str(cell["examples"][2]["rank"])
    assert float(text(box, "mean-after")) == pytest.approx(cell["loss"], abs=0.011)


@pytest.mark.parametrize(
    "prompt, latent, says",
    [
        ("", 3, "The prompt is empty"), ("hot", 3, "has no separator"),
        ("<b>hot</b> <unk> ->", 3, "special token <unk>"), ("hot ->", 99999, "There is no latent 99999"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_gives_a_sentence_and_the_control_stays_alive(live, prompt, latent, says):
    box = live.get_by_role("group", name="Steering control")
    box.locator('[data-field="example"]').select_option("own")
    box.locator('[data-field="latent"]').fill(str(latent))
    box.locator('[data-field="prompt"]').fill(prompt)
    box.locator('[data-field="latent"]').blur()
    settled(live, box)
    assert says in box.locator(".nbw-error").inner_text()
    box.locator('[data-field="latent"]').fill("3")
    box.locator('[data-field="latent"]').blur()
    box.locator('[data-field="prompt"]').fill("<img src=x onerror=alert(1)> ->")
    settled(live, box)
    assert not box.locator(".nbw-error").is_visible() and text(box, "rank-after")
    assert box.locator("img").count() == 0, "what was typed became markup"


def test_the_workbench_cleans_reweights_and_exports_live(live, lab, backend):
    from nb_utils import exports, models, workbench

    box = live.get_by_role("group", name="Clean your own vector")
    start = time.monotonic()
    box.locator('[data-field="start"]').click()
    box.locator('[data-field="loss"]').wait_for(timeout=WAIT)
    print(f"20 pairs cleaned in {time.monotonic() - start:.1f} s")
    shown = text(box, "loss")
    box.locator('.nbw-features input[type="checkbox"]').first.uncheck()
    live.wait_for_function("([node, old]) => node.textContent !== old", arg=[
        box.locator('[data-field="loss"]').element_handle(), shown], timeout=WAIT)  # fmt: skip
    followed = float(text(box, "loss"))
    box.locator('[data-field="folder"]').fill("my-vector")
    box.locator('[data-field="export"]').click()
    box.locator('[data-field="files"]').get_by_text("Written to").wait_for(timeout=WAIT)
    found = exports.load(lab[2] / "book/my-vector", backend.model, backend.sae(10))
    assert len(found.latents) == 9 and found.card.loss == pytest.approx(followed, abs=1e-4)
    (lab[2] / "book/.cache").symlink_to(models.cache_dir())
    plain = subprocess.run(
        [sys.executable, "-I", "-c", export_code()], cwd=lab[2] / "book", capture_output=True, text=True, check=True)
    assert float(plain.stdout.split()[0]) == pytest.approx(found.card.loss, abs=1e-4), "the code on the page"
    trial, weighted = workbench.restore(found, backend.model, backend.sae(10))
    assert workbench.loss(trial, weighted) == pytest.approx(found.card.loss, abs=1e-4)
    box.locator('[data-field="export"]').click()
    box.locator(".nbw-error").get_by_text("exists already").wait_for(timeout=WAIT)
    box.locator('[data-field="import"]').click()
    box.locator('[data-field="files"]').get_by_text("Loaded").wait_for(timeout=WAIT)
    assert box.locator(".nbw-features > div").count() == 9
    assert float(text(box, "loss")) == pytest.approx(followed, abs=1e-3)


def test_the_workbench_stops_when_told(live):
    box = live.get_by_role("group", name="Clean your own vector")
    pool = tasks.split(tasks.load("antonyms")).vector[:200]
    box.locator('[data-field="pairs"]').fill("\n".join(f"{pair.x} -> {pair.y}" for pair in pool))
    box.locator('[data-field="start"]').click()
    live.wait_for_function("([bar]) => bar.value > 1", arg=[box.locator("progress").element_handle()], timeout=WAIT)
    box.locator('[data-field="stop"]').click()
    box.get_by_text("Stopped: the best so far.").wait_for(timeout=WAIT)
    assert box.locator('[data-field="size"] option').count() == 1


@pytest.mark.parametrize(
    "pairs, says",
    [
        ("hot -> cold", "1 pairs and a task needs 20"),
        (f"{PAIRS}\n<img src=x onerror=alert(1)> ->", "the answer must be a non-empty string"),
        ("\n".join(f"a{i} -> b" for i in range(10_000)), "10,000 pairs are more than the 1,000"),
    ],
    ids=["one pair", "an empty answer", "10,000 pairs"],
)
def test_wrong_pairs_give_a_sentence_and_the_button_stays_alive(live, pairs, says):
    box = live.get_by_role("group", name="Clean your own vector")
    paste = "(area, text) => { area.value = text; area.dispatchEvent(new Event('input', {bubbles: true})); }"
    box.locator('[data-field="pairs"]').evaluate(paste, pairs)  # typing 10,000 lines takes chromium half a minute
    box.locator('[data-field="start"]').click()
    box.locator(".nbw-error").get_by_text(says).wait_for(timeout=WAIT)
    assert box.locator('[data-field="start"]').is_enabled()
    assert box.locator("img").count() == 0, "what was typed became markup"


def test_the_strip_follows_a_typed_prompt(live, backend):
    from nb_utils.show import microscope

    strip = live.get_by_role("group", name="Token strip")
    strip.locator('[data-field="layer"]').select_option("8")
    known = rows(tables.load("explore_tokens"), task="antonyms", layer=8, role="executor")
    latent = int(known["latent"].iloc[0])
    strip.locator('[data-field="executor"]').fill(str(latent))
    strip.locator('[data-field="prompt"]').fill("up -> down\nbig -> small\n<i>hot ->")
    read = microscope.prompt(backend.model.tokenizer, "up -> down\nbig -> small\n<i>hot ->")
    found = microscope.activations(backend.model, backend.sae(8), read, [latent])[1:, 0]
    shown = strip.locator(".nbw-strip").nth(1).locator("small")
    expect(shown).to_have_count(len(found) + 1, timeout=WAIT)  # BOS first; the strip before had more tokens
    assert shown.all_inner_texts()[1:] == [str(int(a + 0.5)) if a > 0 else "·" for a in found.tolist()]
    assert found.max() > 0
