# SPDX-License-Identifier: Apache-2.0
"""`layerwise report` makes one page that loads nothing, escapes everything, and can be read on any screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from kit.cli import call, call_json
from kit.crash import build, train
from kit.events import BEGAN, checkpoint, event, start, write

import layerwise_dist as lwd
from layerwise_dist.report import charts as drawing
from layerwise_dist.report import page as pages
from layerwise_dist.report.charts import charts
from layerwise_dist.report.facts import Branch, Commit, Facts
from layerwise_dist.report.page import render
from layerwise_dist.telemetry.figures import median, percentile

HOSTILE = "</text><script>alert(1)</script><img src=x onerror=alert(1)> $\\frac{1}{$ & \"' \x1b[31m \u202e {{ 7*7 }}"


def facts(hostile: str = "", ranks: int = 3, steps: int = 120) -> Facts:
    """A run with two starts, failures, a branch, and a slow rank."""
    told = [start(rank=rank, framework=f"ddp{hostile}") for rank in range(ranks)]
    for step in range(1, steps + 1):
        for rank in range(ranks):
            slow = {"slowest_rank": 2, "slowest_behind_s": 0.25} if rank == 0 else {}
            if step % 40 == 0:
                why = f"rank 1: No space left on device {hostile} {'/long/path' * 20}"
                told.append(checkpoint(step, 10.0 * step, rank, outcome="failed", reason=why))
            elif step % 30 == 0:
                told.append(checkpoint(step, 10.0 * step, rank, outcome="skipped", reason="2 are in flight"))
            else:
                fast = 1.0 + 0.1 * (step % 7) - 0.2 * rank
                told.append(
                    checkpoint(step, 10.0 * step, rank, gb_per_s=fast, stall_s=0.002 * (1 + step % 11), **slow)
                )  # fmt: skip
    told += [start(10.0 * steps + 50, rank, world_size=ranks) for rank in range(ranks)]
    told.append(event("stopped", 10.0 * steps + 60, reason=f"five in a row {hostile}"))
    commits = [
        Commit(10, 40, BEGAN, 4 * 10**9, 0, None, "lineage", None),
        Commit(11, 50, BEGAN, 4 * 10**9, 0, 10, "abandoned", f"best{hostile}"),
        Commit(13, 50, BEGAN, 4 * 10**9, 12, 10, "lineage", None),
        Commit(14, 60, BEGAN, 4 * 10**9, 12, 13, "newest", None),
    ]
    layers = {f"model.layers.{n}.attention{hostile}": (30 - n) * 10**7 for n in range(30)}
    problems = [f"damaged {hostile}"] if hostile else []
    return Facts(f"/data/run{hostile}", BEGAN + 2000, told, commits, [Branch(12, 10)], layers, problems)


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def dangers(page: str) -> list[str]:
    """What could run or load something: elements, handlers, and addresses."""
    found = []
    for tag, attributes in Elements(page).tags:
        if tag in ("script", "img", "iframe", "object", "embed", "base", "form", "a", "foreignobject"):
            found.append(tag)
        for name, value in attributes.items():
            if name.startswith("on"):
                found.append(f"{tag} {name}")
            address = name.endswith(("href", "src")) and not (value or "").startswith(("#", "data:,"))
            if address or "javascript:" in (value or "") or re.search(r"url\((?!#)", value or ""):
                found.append(f"{tag} {name}={value}")
    return found + re.findall(r"@import|url\((?!#)", page)


@pytest.fixture(scope="module")
def made() -> str:
    pytest.importorskip("matplotlib")
    return render(facts())


@pytest.fixture(scope="module")
def hostile() -> str:
    pytest.importorskip("matplotlib")
    return render(facts(HOSTILE))


def test_it_says_what_happened_in_words(made: str) -> None:
    text = " ".join(" ".join(Elements(made).text).split())
    for said in (
        "newest commit step 60", "committed 114", "failed 3", "skipped 3", "No space left on device",
        "checkpoints stopped five in a row", "Rank 2 was last in 114 of 114 checkpoints; the last is 250 ms after",
        "seq 12: rolled back to seq 10", "2 starts; the last on 3 ranks, ddp, mode direct.", "16 others", "branch 2",
        "milliseconds of the training thread",
    ):  # fmt: skip
        assert said in text, said
    assert made.count("<svg") == 5


def test_it_loads_and_runs_nothing_whatever_the_names(made: str, hostile: str) -> None:
    assert dangers(made) == dangers(hostile) == []
    assert "default-src 'none'" in made
    text = "".join(Elements(hostile).text)
    assert "<script>alert(1)</script>" in text and "{{ 7*7 }}" in text and "\\u202e" in text
    assert not {"\x1b", "\u202e"} & set(hostile)
    ids = [attributes["id"] for _, attributes in Elements(made).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20


def test_mutation_a_page_that_escapes_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pages, "_PAGE", pages._PAGE.replace("{{ why }}", "{{ why | safe }}"))
    assert dangers(render(facts(HOSTILE))) != []


def test_colors_are_the_page_s_own(made: str) -> None:
    """So that they follow light and dark; matplotlib's defaults would not."""
    inside = re.findall(r"<svg.*?</svg>", made, re.DOTALL)
    assert not [color for svg in inside for color in re.findall(r"#[0-9a-f]{6}\b", svg)]
    assert "prefers-color-scheme: dark" in made


def test_mutation_a_color_of_matplotlib_s_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(drawing, "FIRST", "#1f77b4")
    with pytest.raises(AssertionError):
        test_colors_are_the_page_s_own(render(facts()))


def test_of_nothing_and_of_little_there_is_a_page_too() -> None:
    pytest.importorskip("matplotlib")
    empty = render(Facts("/data", BEGAN, [], [], [], {}))
    assert "There are no events" in empty and "<svg" not in empty
    one = charts(Facts("/data", BEGAN, [checkpoint(1, 1.0, stall_s=0.0)], [], [], {"": 0}))
    assert {"timeline", "stalls", "throughput", "layers"} == set(one)
    for stall in (1e-9, 0.004, 1e15):
        assert "stalls" in charts(Facts("/data", BEGAN, [checkpoint(n, n, stall_s=stall) for n in (1, 2)], [], [], {}))
    wide = charts(Facts("/data", BEGAN, [checkpoint(n, n, stall_s=10.0**-n) for n in range(1, 5)], [], [], {}))
    assert "$" not in wide["stalls"] and ">0.1<" in wide["stalls"] and ">100<" in wide["stalls"]


def test_a_run_without_end_makes_a_page_with_an_end() -> None:
    pytest.importorskip("matplotlib")
    assert len(render(facts(ranks=1, steps=20_000))) < 3_000_000


def test_medians_and_percentiles() -> None:
    assert median([1.0, 3.0]) == 2.0 and median([]) is None
    hundred = [float(n) for n in range(1, 101)]
    assert (percentile(hundred, 99), percentile([7.0], 99), percentile([], 99)) == (99.0, 7.0, None)


def test_the_command_makes_a_page_of_a_job_and_replaces_nothing_unasked(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    root, out = tmp_path / "job", tmp_path / "report.html"
    model, optimizer = build(0)
    with lwd.attach(model, optimizer, dir=str(root), telemetry={"events": "events.jsonl"}) as ckpt:
        for step in ckpt.steps(3):
            train(model, optimizer, 0, 0, step)
    code, found = call_json("report", root, "-o", out)
    assert code == 0 and (found["checkpoints"], found["skipped_lines"]) == (2, 0), found
    page = out.read_text()
    assert found["bytes"] == len(page.encode()) and "newest commit" in page and dangers(page) == []
    assert page.count("<svg") == 5 and "step 3" in html.unescape(page)
    code, output = call("report", root, "-o", out)
    assert code == 2 and "already exists" in output and out.read_text() == page
    out.unlink()
    out.symlink_to(tmp_path / "elsewhere")
    assert call("report", root, "-o", out, "--force")[0] == 0
    assert not out.is_symlink() and not (tmp_path / "elsewhere").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "report.html"]


def test_events_that_are_none_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    root = tmp_path / "job"
    model, optimizer = build(0)
    with lwd.attach(model, optimizer, dir=str(root)) as ckpt:
        for step in ckpt.steps(1):
            train(model, optimizer, 0, 0, step)
    write(root / "events.jsonl", [start(), checkpoint(1, 1.0)])
    with (root / "events.jsonl").open("a") as file:
        file.write("none\n{}\n")
    code, output = call("report", root, "-o", tmp_path / "out.html")
    assert code == 0 and "2 lines skipped" in output


# -- in a browser ------------------------------------------------------------------------------------------------------

_LOOK = r"""<!DOCTYPE html><meta charset="utf-8"><body><script>
const pages = %s, found = [];
const brightness = color => {  // relative luminance, as WCAG 2 has it
  const part = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const [red, green, blue] = color.match(/[\d.]+/g).map(Number).map(part);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const contrast = (one, other) => {
  const [dark, light] = [brightness(one), brightness(other)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
};
function look(name, width) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    frame.srcdoc = pages[name];
    frame.onload = () => {
      const inside = frame.contentDocument, top = inside.documentElement;
      const small = [...inside.querySelectorAll("svg text")].filter(e => e.textContent.trim())
        .map(e => e.getBoundingClientRect().height);
      const outside = [...inside.querySelectorAll("section, dl, h1, svg, p")]
        .filter(e => e.getBoundingClientRect().right > width + 0.5).map(e => e.tagName);
      const style = element => frame.contentWindow.getComputedStyle(element);
      const ground = element => {
        const color = style(element).backgroundColor;
        return color === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : color;
      };
      const contrasts = [...inside.querySelectorAll("h1, h2, p, dt, dd, th, td, svg text")]
        .map(e => contrast(e.matches("svg text") ? style(e).fill : style(e).color, ground(e)));
      found.push({name, width, scroll: top.scrollWidth, texts: small.length, smallest: Math.min(...small), outside,
                  faintest: Math.min(...contrasts), ground: brightness(ground(inside.body))});
      done();
    };
    document.body.append(frame);
  });
}
(async () => {
  for (const name of Object.keys(pages)) for (const width of [1280, 390]) await look(name, width);
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


def test_a_browser_shows_it_on_wide_and_narrow_screens_without_a_complaint(
    made: str, hostile: str, tmp_path: Path
) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    harness = tmp_path / "look.html"
    dark = made.replace("(prefers-color-scheme: dark)", "all")
    faint = dark.replace("--ink: #e4e8ec", "--ink: #1d2329")  # the mutation: the light page's ink
    assert len({made, dark, faint}) == 3
    pages = {"made": made, "hostile": hostile, "dark": dark, "faint": faint}
    texts = json.dumps(pages).replace("<", "\\u003c")
    harness.write_text(_LOOK % texts)
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,1000",
        "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
        "--dump-dom", harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    found: list[dict[str, Any]] = json.loads(html.unescape(match[1]))
    assert len(found) == 2 * len(pages)
    for each in found:
        assert each["scroll"] <= each["width"] and each["outside"] == [], each
        assert each["texts"] > 30 and each["smallest"] >= 9, each
        assert (each["ground"] < 0.05) == (each["name"] in ("dark", "faint")), each
        assert (each["faintest"] >= 4.5) == (each["name"] != "faint"), each
