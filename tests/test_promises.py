"""What is promised in docs/promises.md: each promise names a test, and the test is there."""

import re

import pytest
from shared import ROOT

TEXT = (ROOT / "docs/promises.md").read_text("utf-8")
PROMISES = re.findall(r"^\d+\. (.*)$", TEXT, re.MULTILINE)


def test_there_are_ten():
    assert len(PROMISES) == 10 and "**Not defended against**" in TEXT


@pytest.mark.parametrize("promise", PROMISES, ids=range(1, len(PROMISES) + 1))
def test_a_promise_names_a_test_that_is_there(promise):
    named = re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", promise)
    assert named, promise
    for name, file in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text("utf-8"), f"{name} is not in {file}"


def test_how_to_report_leads_somewhere():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    assert "private vulnerability reporting" in text and "@" not in text, "no address that nobody reads"
    for target in re.findall(r"\]\(([^)#]+)\)", text + TEXT.replace("](../", "](")):
        assert (ROOT / target).exists(), target
