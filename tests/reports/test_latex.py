"""LaTeX of reports, compiled."""

import shutil

import pytest

LATEX = pytest.mark.debian(packages=["texlive-latex-recommended"], programs=["pdflatex"])


@LATEX
def test_pdflatex_is_there():
    assert shutil.which("pdflatex")
