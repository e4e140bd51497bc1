"""Each notebook as its reader meets it: in JupyterLab, in a browser, run from its menu, sliders moved by keyboard."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import BITSANDBYTES_SAYS, ROOT

NOTEBOOKS = ["LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]
NEEDED = ["lora_utils.py", "lora_lab", "data", "benchmarks"]
SHORT = {"TRAIN_SENTENCES": 160, "BATCH_SIZE": 8, "EPOCHS": 1}
LONGEST = 450  # seconds for the cells, two minutes of work, on a crowded machine; the test as a whole may take 600
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # or cells out of sight are not in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # or it asks
}

# what can be seen of each code cell: its number, the percentages of its bars, its errors, its figures
LOOK = """() => [...document.querySelectorAll(".jp-Notebook .jp-CodeCell")].map(cell => {
    const kind = name => [...cell.querySelectorAll(`[data-mime-type="application/vnd.jupyter.${name}"]`)];
    return {
        number: cell.querySelector(".jp-InputPrompt").textContent.trim(),
        bars: kind("stdout").flatMap(text => text.textContent.match(/[0-9]+(?=%\\|)/g) || []),
        errors: [...kind("error"), ...kind("stderr")].map(text => text.textContent).filter(text => !SAID.test(text)),
        images: [...cell.querySelectorAll(".jp-OutputArea-output img")].map(image => image.naturalWidth),
    };
})""".replace("SAID", f"/^{BITSANDBYTES_SAYS}/")


@pytest.fixture
def page():
    """An empty page of whatever Chromium is installed."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not (found and importlib.util.find_spec("playwright")):
        missing = "a browser and playwright must be installed"
        (pytest.fail if os.environ.get("BROWSER_TEST") == "required" else pytest.skip)(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 2000})
        page.set_default_timeout(120_000)  # JupyterLab takes more than a minute to load on a crowded machine
        yield page
        browser.close()


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the project, with a few sentences as data, and nobody's settings but its own."""
    folder, own = tmp_path / "project", tmp_path / "jupyter"
    folder.mkdir()
    for name in NEEDED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    for name, values in SETTINGS.items():
        file = own / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    environment = dict.fromkeys(["JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"], str(own))
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(own / "log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}"]
        server = subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log)
    try:
        until(lambda: list(own.glob("jpserver-*.json")) or server.poll() is not None, 60)
        assert server.poll() is None, (own / "log").read_text()
        about = json.loads(next(own.glob("jpserver-*.json")).read_text())
        yield folder, lambda name: f"{about['url']}lab/tree/{name}?token={about['token']}"
    finally:
        server.terminate()  # it ends its kernels first
        server.wait(30)


def until(happened, seconds):
    """Ask until it happened or time is over, often enough to see a bar move. Return the last answer."""
    end = time.monotonic() + seconds
    while not (it := happened()) and time.monotonic() < end:
        time.sleep(0.1)
    return it


def shortened(notebook, dataset):
    """Set a notebook for a run of a minute, and return (source, number of figures) of its code cells as committed."""
    committed = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            figures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
            committed.append((cell.source, figures))
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in (SHORT | {"DATASET": dataset}).items())
    return committed


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_in_a_browser_its_bars_move_and_its_sliders_change_its_figures(name, lab, page, few_phrases):
    folder, address = lab
    notebook = nbformat.read(ROOT / name, as_version=4)
    committed = shortened(notebook, str(few_phrases))
    nbformat.write(notebook, folder / name)
    page.goto(address(name))
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    assert until(lambda: len(page.evaluate(LOOK)) == len(committed), 60)  # the page fills cell by cell

    for menu in ("Run", "Run All Cells"):
        page.locator(f'.lm-MenuBar-itemLabel:text-is("{menu}"), .lm-Menu-itemLabel:text-is("{menu}")').click()
    percentages = [set() for _ in committed]

    def ended():
        cells = page.evaluate(LOOK)
        for seen, cell in zip(percentages, cells, strict=True):
            seen.update(cell["bars"])
        return all(re.fullmatch(r"\[\d+\]:", cell["number"]) for cell in cells) or any(cell["errors"] for cell in cells)

    in_time = until(ended, LONGEST)
    cells = page.evaluate(LOOK)
    assert [cell["errors"] for cell in cells if cell["errors"]] == []
    assert in_time, [cell["number"] for cell in cells]
    assert any(percentages) and all(len(seen) >= 2 for seen in percentages if seen), percentages

    for number, ((source, figures), now) in enumerate(zip(committed, cells, strict=True)):
        has_sliders = "ipywidgets.interact(" in source
        assert all(now["images"]) and (has_sliders or len(now["images"]) == figures), source
        if has_sliders:
            assert move_every_slider(page.locator(".jp-Notebook .jp-CodeCell").nth(number)), source


def move_every_slider(cell):
    """Move each by a step, by keyboard. The figure must be another one then. Return the number of sliders."""
    image, handles = cell.locator(".jp-OutputArea-output img").first, cell.locator(".noUi-handle")
    for number in range(handles.count()):
        handle, before = handles.nth(number), image.get_attribute("src")
        at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        handle.press("ArrowLeft" if at_the_end else "ArrowRight")
        assert until(lambda: image.count() and image.get_attribute("src") != before, 60), cell.text_content()  # noqa: B023
    return handles.count()
