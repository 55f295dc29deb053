# SPDX-License-Identifier: Apache-2.0
"""The report as a table, as JSON and as a page, with times that a test made up."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

import jax_bolt
from jax_bolt._src import arch, ir
from jax_bolt._src.floor import floor
from jax_bolt._src.site import Pool, Site

H200 = arch.of_device("9.0", "NVIDIA H200", 132)
HOSTILE = "<script>alert('x')</script> & \"q\" [red]\x1b[31m\u202e</summary>"


def region(dtype: ir.DType = "bf16", out: ir.DType = "bf16", **sizes) -> ir.Region:
    problem = ir.ConvProblem(
        **{"n": 32, "h": 28, "w": 28, "c": 128, "k": 128, "r": 3, "s": 3, **sizes},
        dtype=dtype,
    )
    return ir.Region(
        problem=problem, epilogue=ir.Epilogue((ir.Op("acc"),), 0, out_dtype=out)
    )


MADE = region(padding=(1, 1, 1, 1))
FLOOR = floor(MADE, H200)


def site(name: str = "Net/Conv_0", **changes) -> Site:
    return dataclasses.replace(
        Site(
            name=name,
            line="net.py:7 (Net.__call__)",
            root="conv_general_dilated",
            problem=MADE.problem.text,
            epilogue="conv3x3+bn+relu",
            region=MADE,
            fused=True,
            kernel="implicit_gemm_sm90 pixels=88 (hwio)",
            provenance="user",
            estimate="13.0 µs: 7 tiles on the busiest SM",
            prologue="mul, add",
            floor=FLOOR,
            time_us=15.0,
            xla_time_us=30.0,
            kernel_time_us=14.5,
            error=1e-3,
            xla_error=2e-3,
            candidates=31,
            tuned="2026-01-02, jax 0.11.2",
        ),
        **changes,
    )


KEPT = site("Net/Conv_1", kernel="xla", provenance="xla", xla_time_us=12.0)
KEPT = dataclasses.replace(KEPT, reason="XLA was timed faster: 12.0 µs", estimate="")
REFUSED = Site(
    name=HOSTILE,
    line="net.py:9 (f)",
    root="dot_general",
    reason="dtype int8",
    kernel="xla",
    provenance="xla",
)


@pytest.fixture
def report() -> jax_bolt.Report:
    sites = (site(), KEPT, site("Net/Conv_2", time_us=None), REFUSED)
    return jax_bolt.Report(sites, "sm_90a", {"tuned": 3}, "NVIDIA H200")


# --- The floor


def test_a_floor_by_hand():
    found = floor(region(n=1, h=8, w=8, c=16, k=32, r=1, s=1), H200)
    assert found.flops == 2 * 64 * 16 * 32
    assert found.bytes_moved == 2 * (64 * 16 + 16 * 32 + 64 * 32)
    assert found.memory_us == pytest.approx(found.bytes_moved / 4800e9 * 1e6)
    assert found.compute_us == pytest.approx(found.flops / 989e12 * 1e6)
    assert found.compute_us is not None
    assert found.time_us == found.memory_us > found.compute_us


def test_a_floor_that_products_set_and_tf32_doubles():
    sizes = {"n": 32, "c": 512, "k": 512, "padding": (1, 1, 1, 1)}
    bf16, tf32 = floor(region(**sizes), H200), floor(region("f32", **sizes), H200)
    assert bf16.compute_us is not None
    assert bf16.time_us == bf16.compute_us
    assert tf32.compute_us == pytest.approx(2 * bf16.compute_us)


def test_a_strided_1x1_conv_reads_a_quarter_of_its_image():
    found = floor(region(n=2, h=8, w=8, c=16, k=32, r=1, s=1, stride=(2, 2)), H200)
    assert found.bytes_moved == 2 * (2 * 16 * 16 + 16 * 32 + 2 * 16 * 32)


def test_side_inputs_and_the_output_count_with_their_own_dtypes():
    gemm = ir.GemmProblem(m=64, n=32, k=16, dtype="bf16")
    ops = (ir.Op("acc"), ir.Op("side", attr=0), ir.Op("add", (0, 1)))
    epilogue = ir.Epilogue(ops, 2, out_dtype="f32", sides=("bf16",))
    found = floor(ir.Region(problem=gemm, epilogue=epilogue), H200)
    assert found.bytes_moved == 2 * (64 * 16 + 16 * 32) + 64 * 32 * (4 + 2)


def test_without_a_published_peak_only_bytes_make_a_floor():
    found = floor(region(), arch.from_name("sm_87"))
    assert found.compute_us is None
    assert found.time_us == found.memory_us > 0


def test_an_auxiliary_output_counts_and_groups_lessen_the_filter():
    conv = ir.ConvProblem(n=1, h=8, w=8, c=32, k=32, r=1, s=1, groups=32, dtype="bf16")
    epilogue = ir.Epilogue(
        (ir.Op("acc"),), 0, out_dtype="bf16", auxiliary=(ir.Output(0, "f32"),)
    )
    found = floor(ir.Region(problem=conv, epilogue=epilogue), H200)
    assert found.bytes_moved == 2 * (64 * 32 + 32) + 64 * 32 * (2 + 4)
    assert found.flops == 2 * 64 * 32


# --- Totals, text, JSON


def test_totals_are_of_the_timed_sites(report):
    found = report.totals
    assert found.timed == 2
    assert (found.xla_us, found.chosen_us) == (42.0, 27.0)
    assert found.floor_us == pytest.approx(2 * FLOOR.time_us)


def test_the_text_is_the_same_everywhere(report, monkeypatch):
    plain = str(report)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    assert str(report) == plain
    assert "\x1b" not in plain and "\u202e" not in plain
    assert "2 timed sites" in plain and "42.0" in plain and "27.0" in plain
    assert max(map(len, plain.splitlines())) <= 160


def test_in_a_terminal_the_table_is_as_wide_as_that(report):
    console = Console(width=100, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(report)
    shown = captured.get()
    styles = re.findall(r"\x1b\[([\d;]*)m", shown)
    assert any("33" in style for style in styles), "a refused site is yellow"
    bare = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "\x1b" not in bare and "\u202e" not in bare
    assert max(map(len, bare.splitlines())) <= 100


def of_width(report, width):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(report)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def test_a_narrow_table_has_templates_without_their_configs(report):
    made = dataclasses.replace(report, sites=report.sites[:2])
    assert "pixels=88" in " ".join(of_width(made, 140))
    narrow = of_width(made, 139)
    assert "pixels=88" not in " ".join(narrow)
    (row,) = (line for line in narrow if "Net/Conv_0" in line)
    assert re.search(r"│ implicit_gemm_sm90 +│ 15\.0 ", row)
    # What it keeps is why XLA runs a site.
    assert "xla: XLA was timed faster: 12.0 µs" in " ".join(narrow)
    assert "n32h28" in " ".join(of_width(made, 110))
    assert "n32h28" not in " ".join(of_width(made, 109))
    # A line for the site on a kernel, in a terminal of the usual width.
    (row,) = (line for line in of_width(made, 80) if "Net/Conv_0" in line)
    assert "│ conv3x3+bn+relu │ implicit_gemm_sm90 " in row
    pool = Pool(name="Net", line="", problem="max3x3/2[bf16 2x2x2x2]", passes=2)
    pooled = " ".join(of_width(dataclasses.replace(made, pools=(pool,)), 80))
    assert "xla, one axis" in pooled and "2x2x2x2" not in pooled


def test_a_function_without_sites(report):
    empty = jax_bolt.Report((), "sm_90a", {})
    assert str(empty).startswith("no conv or product here")
    assert "no conv or product here" in empty._repr_html_()


def test_json_has_it_all(report):
    found = json.loads(report.to_json())
    assert found["device"] == "NVIDIA H200"
    assert found["totals"]["timed"] == 2
    first, *_, last = found["sites"]
    assert first["floor"]["flops"] == FLOOR.flops
    assert (first["candidates"], first["kernel_time_us"]) == (31, 14.5)
    assert last["floor"] is None and last["name"] == HOSTILE


# --- The page


class Page(html.parser.HTMLParser):
    """Elements, attributes and text; fails where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.count: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.count[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def written(report: jax_bolt.Report, folder: Path) -> str:
    report.to_html(folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_has_every_fact(report, tmp_path):
    text = written(report, tmp_path)
    shown = " ".join(Page(text).texts)
    for fact in (
        "3 of 4 roots fused",
        "NVIDIA H200",
        "Time before and after: 1.56 times as fast",
        "net.py:7 (Net.__call__)",
        "bf16 32x28x28x128 → 128, 3x3",
        "conv3x3+bn+relu",
        "implicit_gemm_sm90 pixels=88 (hwio)",
        "31 timed",
        "13.0 µs: 7 tiles on the busiest SM",
        "XLA 30.0 µs; best kernel, with what it needs around it 15.0 µs",
        "7.4 GFLOP at the tensor cores' peak (7.5 µs)",
        "XLA was timed faster: 12.0 µs",
        "dtype int8",
        "%0 = acc()\nbf16 %0",
        "mul, add",
        "1.00e-03, XLA's 2.00e-03",
        "2026-01-02, jax 0.11.2",
    ):
        assert fact in shown, fact
    assert Page(text).count["details"] == 4


def test_nothing_in_a_name_becomes_markup(report, tmp_path):
    page = Page(written(report, tmp_path))
    assert not {"script", "img", "iframe", "link", "object"} & set(page.count)
    shown = "".join(page.texts)
    assert "<script>alert('x')</script> & \"q\" [red]" in shown
    assert "\x1b" not in shown and "\u202e" not in shown


def test_the_page_asks_for_nothing_else(report, tmp_path):
    text = written(report, tmp_path)
    for _tag, name, value in Page(text).attributes:
        assert name not in ("src", "srcset", "action", "onclick", "onload")
        if name == "href":
            assert re.fullmatch(r"#site-\d+", value)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", "content", policy) in Page(text).attributes
    assert not re.search(r"url\(|@import|https?:", text)


def test_a_chart_has_a_bar_for_every_time_and_a_line_for_every_floor(report, tmp_path):
    page = Page(written(report, tmp_path))
    bars = [(t, v) for t, n, v in page.attributes if n == "class" and t == "rect"]
    assert Counter(v for _, v in bars) == {"xla": 3, "ours": 2}
    heights = [float(v) for t, n, v in page.attributes if (t, n) == ("rect", "height")]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert ("line", "class", "floor") in page.attributes


@pytest.mark.parametrize(
    "sites",
    [
        (),
        (REFUSED,),
        (site(time_us=None, xla_time_us=None),),
        (site(kernel="", provenance="", floor=None, time_us=None, xla_time_us=None),),
        (site(time_us=0.0, xla_time_us=0.0),),
        (site(time_us=1e-9, xla_time_us=1e12),),
        tuple(site(str(i)) for i in range(400)),
    ],
)
def test_a_page_of_any_sites(sites, tmp_path):
    made = jax_bolt.Report(sites, "", {})
    text = written(made, tmp_path)
    assert Page(text).count["details"] == len(sites)
    assert not re.search(r"\b(nan|inf)\b", text)
    assert str(made) and json.loads(made.to_json())


def headings(page: str) -> list[str]:
    (row,) = re.findall(r'<div class="row heading">(.*?)</div>', page)
    return Page(row).texts


def test_columns_that_no_site_fills_are_left_out(report, tmp_path):
    texts = ["#", "site", "region", "runs on"]
    assert headings(written(report, tmp_path)) == [
        *texts,
        *("XLA", "now", "speed-up", "floor", "of floor"),
    ]
    untimed = (site(time_us=None, xla_time_us=None), REFUSED)
    text = written(jax_bolt.Report(untimed, "sm_90a", {}), tmp_path)
    assert headings(text) == [*texts, "floor"]
    (columns,) = re.findall(r"--columns: ([^\"]*)", text)
    assert len(re.findall(r"minmax\([^)]*\)|\d+px", columns)) == 5
    assert "Times in µs" not in text


def test_a_row_has_the_last_folders_of_a_path_and_breaks_between_steps(tmp_path):
    line = "/home/someone/project/models/net.py:7:12 (Net.__call__)"
    made = (
        site(line=line, epilogue="conv3x3+relu+mean28x28"),
        site(f"{line} #2", line=line),
        site("Net/a/Conv_0", line="models/net.py:7"),
    )
    page = Page(written(jax_bolt.Report(made, "sm_90a", {}), tmp_path))
    assert page.texts.count("…/models/net.py:7:12 (Net.__call__)") == 2
    assert page.texts.count("…/models/net.py:7:12 (Net.__call__) #2") == 1
    assert page.texts.count(line) == 2, "in the row that opens"
    assert {"Net/a/Conv_0", "models/net.py:7"} <= {*page.texts}
    assert {"conv3x3", "+relu", "+mean28x28"} <= {*page.texts}
    style = (Path(jax_bolt.__file__).parent / "_src" / "report_page.css").read_text()
    assert re.search(r"^\.number \{[^}]*white-space: nowrap", style, re.M)


def test_constants_are_decimal(tmp_path):
    numbers = [float.fromhex("0x1.4f8b58p-17"), 0.0, 1.0, -1 / 3, float("inf")]
    constants = [ir.Op("const", attr=number) for number in numbers]
    epilogue = ir.Epilogue((ir.Op("acc"), *constants), 0, out_dtype="bf16")
    of_it = site(region=dataclasses.replace(MADE, epilogue=epilogue))
    shown = written(jax_bolt.Report((of_it,), "sm_90a", {}), tmp_path)
    found = re.findall(r"const\[(.*?)\]", shown)
    assert found[:3] == ["1e-05", "0", "1"] and found[4] == "inf"
    assert struct.pack("f", float(found[3])) == struct.pack("f", -1 / 3)
    assert len(found[3]) <= len("-0.333333343")


def test_a_page_says_what_its_floors_are_of(report, tmp_path):
    h100 = dataclasses.replace(report, device="", board="H100 SXM")
    assert "published peak and bandwidth of the H100 SXM." in written(h100, tmp_path)
    orin = arch.from_name("sm_87")
    sites = (site(floor=floor(MADE, orin)),)
    text = written(jax_bolt.Report(sites, "sm_87", {}, board=orin.board), tmp_path)
    assert "published bandwidth of the Orin, without its peak" in text


def test_the_title_names_the_board_of_a_bare_architecture(report):
    assert "planned for sm_90a\n" in re.sub(" +\n", "\n", str(report))
    bare = dataclasses.replace(report, device="", board="H100 SXM")
    assert "planned for sm_90a (H100 SXM)" in str(bare)
    assert json.loads(bare.to_json())["board"] == "H100 SXM"


def test_a_notebook_shows_the_page_in_a_frame(report, tmp_path):
    frame = Page(report._repr_html_())
    assert frame.count == {"iframe": 1}
    attributes = {name: value for _, name, value in frame.attributes}
    assert attributes["srcdoc"] == written(report, tmp_path)
    assert attributes["sandbox"] == ""  # nothing in it may run


def test_a_page_that_cannot_be_written(report, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"no directory {tmp_path / 'missing'} "
    ):
        report.to_html(tmp_path / "missing" / "report.html")


def test_the_page_in_a_browser(report, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    report.to_html(tmp_path / "report.html")
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            "--force-device-scale-factor=1",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,900",
            f"--screenshot={tmp_path / 'page.png'}",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    width, height, pixels = read_png((tmp_path / "page.png").read_bytes())
    assert (width, height) == (1200, 900)
    # Its style was applied, and bars are as long as the times: 42.0, 27.0, the floor.
    style = (Path(jax_bolt.__file__).parent / "_src" / "report_page.css").read_text()
    lengths = {
        name: longest_run(pixels, width, bytes.fromhex(color))
        for name, color in re.findall(
            r"--(xla|ours|floor): #(\w{6})", style.partition("@media")[0]
        )
    }
    total = report.totals
    assert lengths["ours"] / lengths["xla"] == pytest.approx(27 / 42, rel=0.02)
    expected = total.floor_us / total.xla_us
    assert lengths["floor"] / lengths["xla"] == pytest.approx(expected, rel=0.02)


def longest_run(pixels: list[bytes], width: int, color: bytes) -> int:
    """The longest row of pixels of ``color``, in an image of RGB rows."""
    assert len(color) == 3
    runs = (
        match
        for row in pixels
        for match in re.finditer(rb"(?:%b)+" % re.escape(color), row)
        if match.start() % 3 == 0
    )
    return max((len(run[0]) // 3 for run in runs), default=0)


def read_png(content: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and the RGB rows of an 8-bit PNG without interlacing."""
    position, data = 8, b""
    width = height = channels = 0
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        body = content[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, depth, color, _, _, interlaced = struct.unpack(
                ">IIBBBBB", body
            )
            assert (depth, interlaced) == (8, 0)
            channels = {2: 3, 6: 4}[color]
        elif kind == b"IDAT":
            data += body
        position += length + 12
    raw, stride = zlib.decompress(data), width * channels
    previous, rows = bytearray(stride), []
    for start in range(0, len(raw), stride + 1):
        line = bytearray(raw[start + 1 : start + 1 + stride])
        unfilter(raw[start], line, previous, channels)
        previous = line
        if channels == 4:
            del (line := bytearray(line))[3::4]
        rows.append(bytes(line))
    return width, height, rows


def unfilter(kind: int, line: bytearray, above: bytearray, step: int) -> None:
    """Undoes one of PNG's five filters, in place."""
    for i in range(len(line)):
        left = line[i - step] if i >= step else 0
        up, corner = above[i], above[i - step] if i >= step else 0
        nearest = min(
            (left, up, corner), key=lambda v, p=left + up - corner: abs(p - v)
        )
        line[i] = (line[i] + (0, left, up, (left + up) // 2, nearest)[kind]) & 255
