"The paper from outside: `make paper` in copies of the project, and what it says when something is wrong."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from project import copied, make, replace_once, resealed, sha256

HYBRID = "paper/results/cpu/ag_news/margin/hybrid"


def faults(folder: Path) -> tuple[int, str]:
    "Exit status and output of the check of the text there."
    done = subprocess.run([sys.executable, "-m", "deltaf1_al.report", "check"], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, text=True, capture_output=True)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def tex():
    if not shutil.which("latexmk") or not shutil.which("pdftotext"):
        pytest.skip("needs latexmk and pdftotext: apt-get install latexmk texlive-latex-recommended texlive-fonts-recommended poppler-utils")


def test_the_same_pdf_twice_and_elsewhere(built, tmp_path, tex):
    status, said = make(built, "paper")
    assert not status, said
    log = (built / "paper/build/main.log").read_text(errors="replace")
    assert "undefined" not in log and "multiply defined" not in log
    first = sha256(built / "paper/main.pdf")
    status, said = make(built, "paper")  # nothing has changed: nothing is computed
    assert not status and "Figures, tables" not in said and sha256(built / "paper/main.pdf") == first
    other = copied(tmp_path / "another place")
    status, said = make(other, "paper")
    assert not status, said
    assert sha256(other / "paper/main.pdf") == first
    for name in ("numbers.tex", "provenance.json", "results.tex", "curves.pdf"):
        assert sha256(other / "paper/build" / name) == sha256(built / "paper/build" / name), name


def test_fonts_and_pages(built, tex):
    assert not make(built, "paper")[0]
    fonts = subprocess.run(["pdffonts", built / "paper/main.pdf"], text=True, capture_output=True, check=True).stdout
    assert "Type 3" not in fonts and "TrueType" in fonts  # matplotlib's Type 42
    text = subprocess.run(["pdftotext", built / "paper/main.pdf", "-"], text=True, capture_output=True, check=True).stdout
    assert "??" not in text and "References" in text


def test_a_changed_digit_is_seen(built, tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(built, clone)
    [record] = clone.glob(f"{HYBRID}/seed-0-*")
    lines = (record / "rounds.jsonl").read_text().splitlines(keepends=True)
    f1 = json.loads(lines[-1])["test_macro_f1"]
    changed = float(str(f1).replace("0.8", "0.7", 1))
    (record / "rounds.jsonl").write_text("".join(lines[:-1]) + lines[-1].replace(f'"test_macro_f1": {f1}', f'"test_macro_f1": {changed}'))
    status, said = make(clone, "figures")  # it contradicts its own hash
    assert status and f"{record.relative_to(clone)}: its summary is not that of its rounds" in said, said
    resealed(record, test_macro_f1=changed)
    about = json.loads((record / "summary.json").read_text())
    [tail] = [path.parent for path in clone.glob("paper/results/switching/ag_news/margin/*/seed-0-*/summary.json") if f"fixed_round_{about['switch_round']}/" in str(path)]
    status, said = make(clone, "figures")  # the same run, said by the study of every switch round, ended otherwise
    assert status and "AssertionError" in said, said
    resealed(tail, (tail / "rounds.jsonl").read_text().replace(f'"test_macro_f1": {f1}', f'"test_macro_f1": {changed}'), test_macro_f1=changed)
    status, said = make(clone, "figures")
    assert not status, said
    number = lambda folder: re.search(r"\\hybridDiffAG}{(.*)}", (folder / "paper/build/numbers.tex").read_text())[1]  # noqa: E731
    assert number(clone) != number(built)
    for name in ("results.tex", "readme.md", "curves.pdf", "costs.pdf", "heat.pdf"):
        assert sha256(clone / "paper/build" / name) != sha256(built / "paper/build" / name), name
    status, said = faults(clone)
    assert status and "README.md: lacks the table paper/build/readme.md" in said


def test_other_code_or_a_missing_record_is_named(built, tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(built, clone)
    [record] = clone.glob(f"{HYBRID}/seed-1-*")
    resealed(record, code="0" * 16)
    status, said = make(clone, "paper")
    assert status and f"{record.relative_to(clone)}: was made by the code 0000000000000000, which nobody accepted" in said, said
    shutil.rmtree(record)
    status, said = make(clone, "paper")
    assert status and f"{record.relative_to(clone)}: is missing" in said and not (clone / "paper/main.pdf").exists(), said


def test_the_text_is_held_to_the_records(built, tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(built, clone)
    assert faults(clone) == (0, "")
    replace_once(clone / "paper/main.tex", r"\section{What we conclude}", r"\section{What we conclude} It saves 42 percent, \hybridSavesAG.")
    status, said = faults(clone)
    assert status and "the text holds the number 42" in said and r"\hybridSavesAG is no number" in said


def test_a_number_leads_to_its_runs(built):
    status, said = make(built, "trace", r"NUMBER=\hybridCostAG")
    assert not status, said
    assert "hybridCostAG: 0." in said and "made by: nbs/paper_figures.ipynb" in said and "of 6 records" in said
    for folder in built.glob(f"{HYBRID}/seed-*"):
        about = json.loads((folder / "summary.json").read_text())
        assert str(folder.relative_to(built)) in said and f"code {about['code']}, made at {about['commit'][:12]}" in said, said
    status, said = make(built, "trace", "NUMBER=hybridPrice")
    assert status and "NUMBER is 'hybridPrice'; allowed are" in said


def test_without_tex_it_says_what_is_missing(built, tmp_path):
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*") if Path(folder).is_dir() else ():
            if program.name not in ("latexmk", "tectonic") and not (tmp_path / program.name).is_symlink():
                (tmp_path / program.name).symlink_to(program)
    status, said = make(built, "paper", PATH=str(tmp_path))
    assert status and "TeX is missing: apt-get install latexmk texlive-latex-recommended texlive-fonts-recommended" in said, said
    assert (built / "paper/build/numbers.tex").exists() and (built / "paper/build/curves.pdf").exists()
