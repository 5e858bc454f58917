from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from record_factory import failed, record, write

from analysis.collect import aggregate, collect_all
from analysis.figures import Drawings
from analysis.page import page
from analysis.report import main, write_report

VOID = {"meta", "input", "img", "br", "link"}
NASTY = "<script>alert('x')</script> & 50 %"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is on the PATH")


class Page(HTMLParser):
    """Tags as they nest, and what is found on the way."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                assert value not in self.ids
                self.ids.add(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for method, loss in (("rtn", 4.0), ("comq", 1.0)):
        write(folder, *(record(method=method, bits=b, result=98 - loss * 2.0 ** (4 - b)) for b in (4, 3)))
    return write(folder, failed(NASTY, method="gptq", bits=3))


@pytest.fixture(scope="module")
def text(sweep: Path) -> str:
    write_report([sweep], sweep / "out", html=True)
    return (sweep / "out" / "report.html").read_text()


def test_the_page_is_sound_html_and_needs_no_network(text: str) -> None:
    parsed = Page(text)
    linked = [value for _, name, value in parsed.attributes if name in ("src", "href", "action", "srcset")]
    assert linked
    assert all(value.startswith(("#", "data:image/svg+xml;base64,")) for value in linked)
    assert {value[1:] for value in linked if value.startswith("#")} <= parsed.ids
    assert not re.search(r"@import|url\(|<link|<script[^>]* src", text)


def test_everything_is_on_the_page(text: str) -> None:
    assert {"summary", "model1", "failed", "environment", "jobs"} <= Page(text).ids
    assert text.count("<img") == 3  # curves, times, layers
    assert "Bits saved against rtn" in text
    assert "Relative error of each layer at W3" in text
    assert text.count("sweeps: 3") == 5  # the config of each job
    assert "ptq-run model=digits_resnet data=digits method=rtn grid=affine bits=w4" in text
    assert "5 jobs, 1 failed" in text
    assert "0.750" not in text  # a number nobody measured


def test_text_of_records_is_escaped(text: str) -> None:
    assert NASTY not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; 50 %" in text


def test_seeds_are_one_row_with_their_spread(tmp_path: Path) -> None:
    found = collect_all([write(tmp_path, *(record(result=90.0 + s, seed=s) for s in range(3)))])
    text = page("seeds", found, aggregate(found.frame), pd.DataFrame(), Drawings(), [])
    assert "<b>91.00 ± 1.00</b>" in text
    assert "seed 2" in text  # each job is listed


def test_only_failed_jobs_still_make_a_page(tmp_path: Path) -> None:
    main([str(write(tmp_path, failed("no memory"))), "--html"])
    text = (tmp_path / "report.html").read_text()
    Page(text)
    assert "RuntimeError: no memory" in text


def run_browser(*arguments: str) -> str:
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000"]
    done = subprocess.run(
        [BROWSER, *flags, *arguments], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


def column(dom: str, section: str, place: int) -> list[str]:
    body = re.search(rf'id="{section}".*?<tbody>(.*?)</tbody>', dom, re.DOTALL).group(1)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [re.sub("<[^>]*>", "", re.findall(r"<td.*?</td>", row, re.DOTALL)[place]) for row in rows]


@needs_browser
def test_a_browser_sorts_by_a_click(text: str, tmp_path: Path) -> None:
    heads = 'document.querySelectorAll("#summary th")'
    for clicks, wanted in ((1, ["90.00", "94.00", "96.00", "97.00", "failed"]), (2, None)):
        file = tmp_path / f"{clicks}.html"
        file.write_text(text + f"<script>for (let i = 0; i < {clicks}; i++) {heads}[3].click();</script>")
        found = column(run_browser("--dump-dom", file.as_uri()), "summary", 3)
        assert found == (wanted or ["97.00", "96.00", "94.00", "90.00", "failed"])


@needs_browser
def test_a_browser_shows_it(text: str, tmp_path: Path) -> None:
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(text)
    run_browser("--window-size=1200,1600", f"--screenshot={picture}", file.as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000  # a blank page has a tenth of that
